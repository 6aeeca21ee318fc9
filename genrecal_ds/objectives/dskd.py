"""Compares projected student rows with the teacher's through its head (DSKD's teacher space).

    D = KL( softmax head_l(z_l) || softmax head_l(W z_s) )

After Zhang et al., arXiv 2406.17328. Their loss has a second half in the student's space and pairs
tokens by an attention over both models' embeddings. This file has the half in the teacher's space
and pairs the i-th token of a turn's answer with the teacher's i-th token, like uld.py. W [H, D]
trains with the student and is thrown away. GenRecal has decoder blocks in place of W.

Shapes: M student loss rows, N teacher loss rows, D student width, H teacher width.
"""

from torch import Tensor, nn

from genrecal_ds import IGNORE
from genrecal_ds.data.batch import PairBatch
from genrecal_ds.objectives.base import Ingredients, TeacherRows
from genrecal_ds.objectives.student_kd import StudentKD, paired_rows


def build(parts: Ingredients) -> "ProjectedKD":
    return ProjectedKD(parts)


class ProjectedKD(StudentKD):
    def __init__(self, parts: Ingredients):
        super().__init__(parts)
        config, dtype = self.student.text_config, self.student.head.weight.dtype
        teacher_width = self.teacher_head.head.weight_VH.shape[1]
        self.projection = nn.Linear(config.hidden_size, teacher_width, bias=False, dtype=dtype)
        nn.init.normal_(self.projection.weight, std=getattr(config, "initializer_range", 0.02))

    def kd(
        self, rows_MD: Tensor, batch: PairBatch, teacher_rows: TeacherRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert batch.teacher is not None
        index_M, is_paired_M = paired_rows(batch)
        targets_MH = teacher_rows.targets_NH.index_select(0, index_M)
        labels_M = batch.teacher.labels_N[index_M].where(is_paired_M, IGNORE)
        rows_MH = self.projection(rows_MD)
        out = self.teacher_head.loss(rows_MH[None], targets_MH, labels_M, [0.0], [1.0])
        # W stays in the graph where no row is paired: ZeRO-3 wants a gradient in every micro-step.
        return out.loss_sum + 0.0 * rows_MH.sum(), out.kl_KN[0], is_paired_M
