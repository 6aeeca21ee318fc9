"""Collects both models' boundary rows before and after the Recalibrator (figure 6).

before  what enters the decoder blocks: z_qs of the student, Proj-pre(z_ql) of the teacher
after   what the teacher's head reads: the same rows of the mixed and of the regular pass

Shapes: n conversations, D student width, H teacher width.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from genrecal_ds import IGNORE
from genrecal_ds.analysis.probes import TrainedStage
from genrecal_ds.data.pair import Pair
from genrecal_ds.models.head import load_final_norm
from genrecal_ds.models.recalibrator import Recalibrator
from genrecal_ds.models.vlm import load_vlm
from genrecal_ds.ops.head_loss import head_loss

Points = dict[str, tuple[np.ndarray, np.ndarray]]  # {"before", "after"}: (student's, teacher's)


def untrained(subject: TrainedStage, teacher: Path, student: Path, seed: int) -> TrainedStage:
    """Load the pair as it is before stage 1: the student's first weights, a fresh Recalibrator."""
    torch.manual_seed(seed)
    vlm = load_vlm(student).eval()
    old = subject.recalibrator
    width, depth = old.norm.weight.shape[0], len(old.blocks.layers)
    fresh = Recalibrator(vlm.text_config, width, depth, positions=old.positions).eval()
    std = getattr(vlm.text_config, "initializer_range", 0.02)
    fresh.initialize(std, load_final_norm(teacher))
    return replace(subject, student=vlm, recalibrator=fresh)


@torch.no_grad()
def boundary_points(subject: TrainedStage, pairs: list[Pair]) -> Points:
    """{"before": ([n, D], [n, D]), "after": ([n, H], [n, H])} of single-turn conversations."""
    batch = subject.batch(pairs, with_regular=True)
    assert batch.teacher is not None
    layout, boundary_N = batch.teacher.layout, batch.teacher.boundary_N
    inputs_AH, _ = subject.teacher_rows(batch)
    hidden_BSD = subject.student_hidden(batch)
    packed_PD = subject.recalibrator.proj_pre(hidden_BSD, inputs_AH, layout)
    entering = packed_PD.index_select(0, layout.loss_rows)
    leaving = subject.recalibrator(hidden_BSD, inputs_AH, layout)

    def sides(rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        mixed, regular = (side[boundary_N].numpy() for side in rows.chunk(2))
        return mixed, regular

    return {"before": sides(entering), "after": sides(leaving)}


@torch.no_grad()
def own_losses(subject: TrainedStage, pairs: list[Pair]) -> dict[str, float]:
    """Each model's own CE of the answers, through its own head, in its own tokens."""
    batch = subject.batch(pairs)
    assert batch.teacher is not None
    _, targets_NH = subject.teacher_rows(batch)
    labels_N = batch.teacher.labels_N
    out = head_loss(targets_NH[None], targets_NH, labels_N, subject.head, [1.0], [0.0])
    student = batch.student
    rows = subject.student_hidden(batch).flatten(0, 1).index_select(0, student.rows_M)
    logits = subject.student.head.logits(rows).float()
    return {
        "teacher": float(out.ce_KN.sum() / (labels_N != IGNORE).sum()),
        "student": float(cross_entropy(logits, student.labels_M, ignore_index=IGNORE)),
    }


def embed(points: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Embed both sides together by t-SNE: two arrays [n, 2]."""
    from sklearn.manifold import TSNE

    together = np.concatenate(points)
    perplexity = min(30.0, (len(together) - 1) / 3)
    flat = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(together)
    return flat[: len(points[0])], flat[len(points[0]) :]


def mixing(points: tuple[np.ndarray, np.ndarray]) -> float:
    """The share of rows whose nearest neighbour, in the full width, is the other model's.

    It is about .5 where the two models' rows are mixed, and 0 where they are apart.
    """
    together = np.concatenate(points).astype(np.float64)
    side = np.repeat([0, 1], [len(part) for part in points])
    distances = np.square(together[:, None] - together[None]).sum(-1)
    np.fill_diagonal(distances, np.inf)
    return float((side[distances.argmin(1)] != side).mean())
