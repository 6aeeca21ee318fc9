"""Chooses the metric of a kind of sample; each metric has a file of its own.

A metric takes a prediction and the accepted answers and gives 0 to 1. `kind` is what the shard's
builder wrote: the benchmark's name, or with a suffix a part of it whose score is its own.
"""

from collections.abc import Callable, Sequence
from functools import partial

from genrecal_ds.errors import UserError
from genrecal_ds.evaluate.metrics.boxes import box_accuracy
from genrecal_ds.evaluate.metrics.chart import relaxed_accuracy
from genrecal_ds.evaluate.metrics.document import anls
from genrecal_ds.evaluate.metrics.intervals import scores_by_kind
from genrecal_ds.evaluate.metrics.letter import letter_accuracy
from genrecal_ds.evaluate.metrics.vqa import vqa_accuracy
from genrecal_ds.evaluate.metrics.words import exact_match

Metric = Callable[[str, Sequence[str]], float]

METRICS: dict[str, Metric] = {
    "words": exact_match,
    "vqa": partial(vqa_accuracy, variant="always"),
    "vqa_official": partial(vqa_accuracy, variant="official"),
    "box": box_accuracy,
    "box_thousandths": partial(box_accuracy, convention="thousandths"),
    "relaxed": relaxed_accuracy,
    "anls": anls,
    "letter": letter_accuracy,
}
# The benchmark's own one, by how a kind begins; every other kind is scored by its last words.
OF_KIND = {
    "vqav2": "vqa", "okvqa": "vqa", "textvqa": "vqa", "refcoco": "box", "box": "box",
    "chartqa": "relaxed", "docvqa": "anls", "ai2d": "letter", "mmbench": "letter",
    "mmmu": "letter", "mathvista": "letter",
}  # fmt: skip


def metric_of(kind: str) -> str:
    """Return the name of a kind's metric."""
    return next((name for start, name in OF_KIND.items() if kind.startswith(start)), "words")


def named(name: str) -> Metric:
    """Return the metric of this name. Raises UserError listing the names."""
    if name not in METRICS:
        raise UserError(f"--metric {name}: there are {', '.join(METRICS)}")
    return METRICS[name]


__all__ = ["METRICS", "metric_of", "named", "scores_by_kind"]
