"""The student's own head against the teacher's, byte by byte: for any two tokenizers. Ours.

    D = sum over shared boundaries of KL( next byte by head_l(z_l) || next byte by head_s(z_s) )

Every answer row of the student is taught, through the head that is exported, and nothing is thrown
away; see ops/next_byte.py for what is compared and docs/method.md for when it pays. A boundary
that only one tokenisation can be asked at (data/alignment.py) has no part.

Shapes: M student loss rows, N teacher loss rows, D student width, H teacher width, I shared
boundaries, C symbols.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genrecal_ds.config import LossConfig
from genrecal_ds.data.batch import PairBatch
from genrecal_ds.metrics import Clock
from genrecal_ds.models.head import ReplicatedHead
from genrecal_ds.models.vlm import VLM
from genrecal_ds.objectives import TeacherRows
from genrecal_ds.objectives.token_kd import StudentKD
from genrecal_ds.ops.next_byte import (
    Boundaries,
    ByteVocabulary,
    next_byte_kl,
    next_byte_log_mass,
)

CHUNK_BOUNDARIES = 512


class ByteKD(StudentKD):
    def __init__(
        self,
        student: VLM,
        teacher_head: ReplicatedHead,
        vocabularies: tuple[ByteVocabulary, ByteVocabulary],
        losses: LossConfig,
        clock: Clock | None = None,
    ):
        """vocabularies: (teacher's, student's)."""
        super().__init__(student, losses, clock)
        self.teacher_head, self.vocabularies = teacher_head, vocabularies

    def kd(
        self, rows_MD: Tensor, batch: PairBatch, teacher_rows: TeacherRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        theirs, ours = self._boundaries(batch)
        logits_MV = self.student.head.logits(rows_MD)
        parts = [
            self._kl(logits_MV, teacher_rows.targets_NH, *chunk)
            for chunk in zip(_chunks(theirs), _chunks(ours), strict=True)
        ]
        kl_I = torch.cat(parts) if parts else logits_MV.new_zeros(0)
        kl_M = kl_I.new_zeros(len(logits_MV)).index_add(0, ours.row, kl_I.detach())
        is_taught_M = torch.zeros(len(logits_MV), dtype=torch.bool, device=kl_I.device)
        is_taught_M[ours.row] = True
        # In the graph even where nothing is shared: ZeRO-3 wants a gradient in every micro-step.
        return kl_I.sum() + 0.0 * logits_MV.sum(), kl_M, is_taught_M

    def _boundaries(self, batch: PairBatch) -> tuple[Boundaries, Boundaries]:
        """(teacher's, student's), without those deeper in a token than the tables go."""
        assert batch.teacher is not None and batch.shared_bytes is not None
        shared = batch.shared_bytes
        theirs = Boundaries(
            shared.teacher_I, batch.teacher.labels_N[shared.teacher_I], shared.teacher_depth_I
        )
        ours = Boundaries(
            shared.student_I, batch.student.labels_M[shared.student_I], shared.student_depth_I
        )
        limits = [vocabulary.symbol_WD.shape[1] for vocabulary in self.vocabularies]
        is_known = (theirs.depth < limits[0]) & (ours.depth < limits[1])
        theirs, ours = (Boundaries(*(part[is_known] for part in side)) for side in (theirs, ours))
        return theirs, ours

    def _kl(
        self, logits_MV: Tensor, targets_NH: Tensor, theirs: Boundaries, ours: Boundaries
    ) -> Tensor:
        """[I]; the student's masses are computed again in backward: only a chunk's live at once."""
        with torch.no_grad():
            # Boundaries of one token ask the same row.
            rows, row = theirs.row.unique(return_inverse=True)
            logits_nW = self.teacher_head.logits(targets_NH.index_select(0, rows))
            teacher_IC = next_byte_log_mass(
                logits_nW, theirs._replace(row=row), self.vocabularies[0]
            )

        def of_chunk(logits_MV: Tensor) -> Tensor:
            rows, row = ours.row.unique(return_inverse=True)
            logits_mV = logits_MV.index_select(0, rows).to(teacher_IC.dtype)
            student_IC = next_byte_log_mass(logits_mV, ours._replace(row=row), self.vocabularies[1])
            return next_byte_kl(teacher_IC, student_IC)

        kl_I: Tensor = checkpoint(of_chunk, logits_MV, use_reentrant=False)
        return kl_I


def _chunks(at: Boundaries) -> list[Boundaries]:
    return [
        Boundaries(*parts)
        for parts in zip(*(part.split(CHUNK_BOUNDARIES) for part in at), strict=True)
    ]
