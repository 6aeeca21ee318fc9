"""Several teachers of one student, each with terms of its own. Ours.

    align, distill   sum over k of share_k (L_ar + L_kl) of teacher k  [ + CE(head_s(z_as), gt_s) ]
    byte_kd          CE(head_s(z_s), gt_s) + losses.kl sum over k of share_k D of teacher k

Every teacher has its own tokens, rows, frozen head and, in align and distill, Recalibrator. The
student is one: its body runs once, its own cross entropy counts once. Each teacher's mean is over
its own rows, so that the shares say what each counts for, whatever its tokenizer.

Shapes: B conversations, S student length, D student width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genrecal_ds.data.batch import PairBatch
from genrecal_ds.models.vlm import VLM
from genrecal_ds.objectives import TeacherRows, Totals
from genrecal_ds.objectives.genrecal import GenRecal
from genrecal_ds.objectives.report import Clock, Report
from genrecal_ds.objectives.token_kd import StudentKD


class SeveralTeachers(nn.Module):
    def __init__(
        self,
        student: VLM,
        parts: Sequence[GenRecal | StudentKD],
        shares: Sequence[float],
        clock: Clock | None = None,
    ):
        """parts: one for each teacher, built as if it were alone; their students are this one."""
        super().__init__()
        self.student = student
        for part in parts:
            # Read by the parts, owned here alone: DeepSpeed hooks the children of every module,
            # so that one with three parents would gather its weights three times.
            del part.student
            object.__setattr__(part, "student", student)
        self.parts = nn.ModuleList(parts)
        self.shares, self.clock = tuple(shares), clock or Clock()
        self.trains_student = parts[0].trains_student

    def forward(
        self,
        batch: PairBatch,
        teacher_rows: Sequence[TeacherRows],
        totals: Totals,
        probe: bool = False,
    ) -> tuple[Tensor, Report]:
        """As GenRecal's and StudentKD's. The report has the first teacher's numbers under their
        names, those of the k-th under `teacherk/`; they are not weighted."""
        seen = [batch.seen_by(k) for k in range(len(self.parts))]
        rows = [p.answered(b, r) for p, b, r in zip(self.parts, seen, teacher_rows, strict=True)]
        with self.clock.phase("student"):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_student):
                hidden_BSD = self.student.body(*batch.student.inputs)
        report, loss = Report(), hidden_BSD.new_zeros(())
        for k, (part, share) in enumerate(zip(self.parts, self.shares, strict=True)):
            own, of_k = Report(), (hidden_BSD, seen[k], rows[k], totals.seen_by(k))
            loss = loss + share * part.teacher_loss(*of_k, own)
            if probe:
                part.probe(*of_k, own)
            report = report + (own.under(f"teacher{k + 1}/") if k else own)
        if self.trains_student:
            loss = loss + self.parts[0].student_loss(hidden_BSD, batch, totals, report)
        return loss, report
