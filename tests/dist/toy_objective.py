"""An objective from outside the package: the student's rows become as long as the teacher's.

Its entry in the table of kinds is made by ranks_toy_kind.py; no other file knows it.

Shapes: M student loss rows, D student width, H teacher width.
"""

from genrecal_ds import IGNORE
from genrecal_ds.objectives.base import Ingredients, Objective
from genrecal_ds.objectives.student_kd import paired_rows


def build(parts: Ingredients) -> "RowLengths":
    return RowLengths(parts)


class RowLengths(Objective):
    def teacher_term(self, seen, report):
        student = seen.batch.student
        index_M, is_paired_M = paired_rows(seen.batch)
        own_M = seen.hidden_BSD.flatten(0, 1)[student.rows_M].norm(dim=-1)
        theirs_M = seen.teacher_rows.targets_NH[index_M].norm(dim=-1)
        error_M = (own_M - theirs_M).square() * is_paired_M
        report.add_rows("row_length", error_M, student.boundary_M, student.labels_M != IGNORE)
        return self.losses.kl * error_M.sum() / seen.totals.student_rows
