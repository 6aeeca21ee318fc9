"""Distils by multi-level optimal transport, any two tokenizers (Cui et al., arXiv 2412.14528).

    D = HAD + SEQUENTIAL sum_t -t log s + SINKHORN <P, C>

Each side's columns are ordered by their SUM of probability over one conversation; the 50 largest
stay. A column thus means the same along the sequence. In uld.py each row has its own order.
    HAD    sum |t - s|; HAD and -t log s compare tokens at the same place of the same turn
    <P, C> compares all tokens with all: C is their L1 distance at temperature 2, P Sinkhorn's plan
losses.kl is the paper's alpha, which is .15 there. P's columns, the teacher's tokens, sum to 1.

Shapes: M student and N teacher loss rows of the micro-batch; of one conversation: m student, n
teacher rows; V student's, W teacher's vocabulary, K kept columns.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from genrecal_ds import IGNORE
from genrecal_ds.data.batch import PairBatch
from genrecal_ds.objectives.base import Ingredients, TeacherRows
from genrecal_ds.objectives.student_kd import StudentKD, paired_rows

KEPT = 50
SEQUENTIAL, SINKHORN = 0.1, 0.1  # the paper's beta and gamma
TEMPERATURE, ENTROPY, ITERATIONS = 2.0, 0.1, 20  # of the Sinkhorn distance
LEAST = 1e-8  # probability of a column that the student does not have


def build(parts: Ingredients) -> "MultiLevelOT":
    return MultiLevelOT(parts)


class MultiLevelOT(StudentKD):
    def kd(
        self, rows_MD: Tensor, batch: PairBatch, teacher_rows: TeacherRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert batch.teacher is not None
        index_M, is_paired_M = paired_rows(batch)
        is_taught_M = batch.student.labels_M != IGNORE
        student_sizes = _rows_of(batch.student.rows_M, batch.student.inputs.input_ids)
        teacher_sizes = _rows_of(batch.teacher.targets_N, batch.teacher.inputs.input_ids)
        starts = accumulate(student_sizes, initial=0)
        ends = accumulate(teacher_sizes)
        theirs = {
            start: slice(end - n, end)
            for start, size, end, n in zip(starts, student_sizes, ends, teacher_sizes, strict=False)
            if size
        }  # first student row of a conversation -> teacher rows of that conversation

        def of_conversation(logits_mV: Tensor, part: slice) -> Tensor:
            """Return the distances of one conversation: every chunk is one."""
            rows = theirs.get(part.start, slice(0, 0))
            distance_m = self._of_conversation(
                logits_mV, teacher_rows.targets_NH[rows], index_M[part] - rows.start,
                is_paired_M[part],
            )  # fmt: skip
            return distance_m * is_taught_M[part]

        distance = self.student.head.distance(rows_MD, of_conversation, student_sizes)
        return *distance, is_taught_M

    def _of_conversation(
        self, logits_mV: Tensor, targets_nH: Tensor, index_m: Tensor, is_paired_m: Tensor
    ) -> Tensor:
        teacher_nW = self.teacher_head.logits(targets_nH)
        student_mK, teacher_nK = (ranked(x.softmax(-1)) for x in (logits_mV, teacher_nW))
        beside_mK = teacher_nK[index_m.where(is_paired_m, 0)]
        absolute_m = (beside_mK - student_mK).abs().sum(-1)
        sequential_m = -(beside_mK * student_mK.clamp(min=LEAST).log()).sum(-1)
        soft_mK, soft_nK = (ranked((x / TEMPERATURE).softmax(-1)) for x in (logits_mV, teacher_nW))
        return (
            is_paired_m * (absolute_m + SEQUENTIAL * sequential_m)
            + SINKHORN * transport(soft_mK, soft_nK)
        )  # fmt: skip


def ranked(probabilities_mV: Tensor) -> Tensor:
    """Return the columns with the largest sums over the sequence, falling, 0-padded: [m, K]."""
    kept = min(KEPT, probabilities_mV.shape[-1])
    columns = probabilities_mV.detach().sum(0).topk(kept).indices
    return F.pad(probabilities_mV[:, columns], (0, KEPT - kept))


def transport(student_mK: Tensor, teacher_nK: Tensor) -> Tensor:
    """Return each student row's share of Sinkhorn's cost, [m]. Logarithms do not underflow."""
    cost_mn = torch.cdist(student_mK, teacher_nK, p=1)
    plan_mn = -cost_mn / ENTROPY
    for _ in range(ITERATIONS):
        plan_mn = plan_mn.log_softmax(1)
        plan_mn = plan_mn.log_softmax(0)
    return (plan_mn.exp() * cost_mn).sum(1)


def _rows_of(rows: Tensor, input_ids: Tensor) -> list[int]:
    """Count how many of the flat rows, in order, each conversation of the batch has."""
    return torch.bincount(rows // input_ids.shape[1], minlength=len(input_ids)).tolist()
