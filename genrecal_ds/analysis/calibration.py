"""Measures how sure a model is and how often it is right then (the paper's table 14).

The confidence of an answer is the geometric mean of its tokens' probabilities, end of turn
included. The model reads its own answer in place of the gold answer. ECE has 10 bins of equal
width.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genrecal_ds.data.batch import collate
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.pair import Unusable
from genrecal_ds.data.reader import Sample
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.vlm import load_vlm

NUM_BINS = 10
BATCH = 32


@torch.no_grad()
def confidences(model: Path, samples: Sequence[Sample], answers: Sequence[str]) -> list[float]:
    """One confidence per sample; NaN for an answer that makes no sequence, such as an empty one."""
    vlm = load_vlm(model).eval()
    encoders = PairEncoders(ChatEncoder(model, 1 << 20), None)
    values = [float("nan")] * len(samples)
    places, pairs = [], []
    for place, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        messages = copy.deepcopy(sample.messages)
        messages[-1]["content"] = [{"type": "text", "text": answer}]
        try:
            pairs.append(encoders.encode(messages, sample.images)[-1])
            places.append(place)
        except Unusable:
            continue
    for first in range(0, len(pairs), BATCH):
        chunk = pairs[first : first + BATCH]
        student = collate(chunk, encoders.placeholder(), encoders.vision_rules, False).student
        hidden_BSD = vlm.body(*student.inputs)
        rows_MD = hidden_BSD.flatten(0, 1).index_select(0, student.rows_M)
        log_probs = vlm.head.logits(rows_MD).float().log_softmax(-1)
        labels_M = student.labels_M.clamp(min=0)
        of_label_M = log_probs.gather(1, labels_M[:, None])[:, 0]
        start = 0
        for place, pair in zip(places[first : first + BATCH], chunk, strict=True):
            lengths = [end - begin for begin, end in pair.student.answers]
            start += sum(lengths)
            values[place] = float(of_label_M[start - lengths[-1] : start].mean().exp())
    return values


def calibration(values: Sequence[float], scores: Sequence[float]) -> dict[str, Any]:
    """ECE, and the mean confidence of right (score 1) and wrong answers."""
    sure, score = np.asarray(values, float), np.asarray(scores, float)
    known = np.isfinite(sure)
    sure, score = sure[known], score[known]
    bins = np.minimum((sure * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [
        (bins == b).mean() * abs(sure[bins == b].mean() - score[bins == b].mean())
        for b in np.unique(bins)
    ]

    def mean_where(mask: np.ndarray) -> float | None:
        return float(sure[mask].mean()) if mask.any() else None

    return {
        "ece": float(sum(gaps)),
        "right": mean_where(score == 1),
        "wrong": mean_where(score < 1),
        "n": int(known.sum()),
        "left_out": int((~known).sum()),
    }
