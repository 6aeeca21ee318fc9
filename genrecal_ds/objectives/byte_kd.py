"""Compares the student's own head with the teacher's, byte by byte, for any two tokenizers. Ours.

    D = sum over shared boundaries of KL( next byte by head_l(z_l) || next byte by head_s(z_s) )

D teaches every answer row of the student, through the head that is exported. No module is thrown
away. ops/next_byte.py says what is compared, docs/method.md when it pays. A boundary that only one
tokenisation has (data/byte_matching.py) adds nothing.

Shapes: M student loss rows, N teacher loss rows, D student width, H teacher width, I shared
boundaries, C symbols.
"""

import torch
from torch import Tensor

from genrecal_ds.data.batch import PairBatch
from genrecal_ds.models.token_bytes import byte_vocabulary
from genrecal_ds.objectives.base import Ingredients, TeacherRows
from genrecal_ds.objectives.student_kd import StudentKD
from genrecal_ds.ops.gemm import wide
from genrecal_ds.ops.next_byte import (
    NUM_SYMBOLS,
    Boundaries,
    ByteVocabulary,
    next_byte_kl,
    next_byte_log_mass,
)


def build(parts: Ingredients) -> "ByteKD":
    return ByteKD(parts, _vocabularies(parts))


def _vocabularies(parts: Ingredients) -> tuple[ByteVocabulary, ByteVocabulary]:
    """Build (teacher's, student's) byte vocabulary."""
    matcher, theirs, ours = parts.matcher, parts.encoders.teacher, parts.encoders.student
    assert parts.head is not None and matcher is not None and theirs is not None
    columns, student_columns = len(parts.head.head.weight_VH), parts.student.head.out_features
    device = parts.head.head.weight_VH.device
    return (
        byte_vocabulary(matcher.teacher, theirs.end_of_turn, columns, device),
        byte_vocabulary(matcher.student, ours.end_of_turn, student_columns, device),
    )


class ByteKD(StudentKD):
    def __init__(self, parts: Ingredients, vocabularies: tuple[ByteVocabulary, ByteVocabulary]):
        """vocabularies: (teacher's, student's)."""
        super().__init__(parts)
        self.vocabularies = vocabularies

    def kd(
        self, rows_MD: Tensor, batch: PairBatch, teacher_rows: TeacherRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        theirs, ours = self._boundaries(batch)
        is_taught_M = torch.zeros(len(rows_MD), dtype=torch.bool, device=rows_MD.device)
        is_taught_M[ours.row] = True

        def of_chunk(logits_nV: Tensor, part: slice) -> Tensor:
            inside_I = (ours.row >= part.start) & (ours.row < part.stop)
            there, here = (Boundaries(*(x[inside_I] for x in side)) for side in (theirs, ours))
            teacher_IC = self.teacher_mass(teacher_rows.targets_NH, there, len(logits_nV))
            at = here._replace(row=here.row - part.start)
            student_IC = next_byte_log_mass(logits_nV, at, self.vocabularies[1])
            kl_I = next_byte_kl(teacher_IC, student_IC)
            return kl_I.new_zeros(len(logits_nV)).index_add(0, at.row, kl_I)

        columns = len(self.teacher_head.head.weight_VH)
        distance = self.student.head.distance(
            rows_MD, of_chunk, teacher_vocabulary=columns, matrices=self.matrices
        )
        return *distance, is_taught_M

    def _boundaries(self, batch: PairBatch) -> tuple[Boundaries, Boundaries]:
        """Return (teacher's, student's) boundaries that are within the depth of the tables."""
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

    @torch.no_grad()
    def teacher_mass(self, targets_NH: Tensor, at: Boundaries, most: int) -> Tensor:
        """Return log masses [I, C], from at most `most` of the teacher's rows at once. Where the
        teacher's tokens are shorter, a chunk of student rows meets several times as many rows."""
        rows, row = at.row.unique(return_inverse=True)  # boundaries in one token share a row
        mass_IC = targets_NH.new_empty(len(row), NUM_SYMBOLS, dtype=wide(targets_NH))
        for start in range(0, len(rows), most):
            logits_nW = self.teacher_head.logits(targets_NH[rows[start : start + most]])
            here = (row >= start) & (row < start + most)
            inside = Boundaries(row[here] - start, at.token[here], at.depth[here])
            mass_IC[here] = next_byte_log_mass(logits_nW, inside, self.vocabularies[0])
        return mass_IC
