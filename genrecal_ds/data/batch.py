"""Joins pairs into one micro-batch: padded sides, loss rows, the Recalibrator's passes.

Shapes: B conversations, T teacher length, S student length, A teacher rows entering the
Recalibrator, N teacher loss rows (one pass), M student loss rows, P packed rows, I boundaries
between bytes that both tokenisations share.

The row shift (paper section 3.3, our choice (c)): a hidden state predicts the NEXT token, so the
loss rows of turn k are the last row of q_k, then the rows of a_k but its last. Their labels are
all tokens of a_k. The first is the BOUNDARY row; in the mixed pass it is the student's own row.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genrecal_ds import IGNORE
from genrecal_ds.data.byte_matching import ByteMatcher
from genrecal_ds.data.pair import EncodedChat, Pair
from genrecal_ds.data.passes import mixed, regular
from genrecal_ds.data.recalibrator_input import RecalibratorInput, lay_out


class SideBatch(NamedTuple):
    """One model's inputs, right-padded."""

    input_ids: Tensor  # int64 [B, T]
    attention_mask: Tensor  # int64 [B, T]
    vision: dict[str, Tensor]
    real_P: Tensor  # int64: the real tokens, flat in [B*T], sample by sample


class TeacherBatch(NamedTuple):
    """The teacher's inputs, and which of the teacher's rows are used for what."""

    inputs: SideBatch
    rows_A: Tensor  # int64, flat in [B*T]: answer rows, then (regular pass) question rows
    targets_N: Tensor  # int64, flat in [B*T]: the teacher's own rows z that predict the labels
    labels_N: Tensor  # int64 in the teacher's vocabulary, IGNORE for placeholders
    boundary_N: Tensor  # bool: the first loss row of a turn
    layout: RecalibratorInput  # of the passes: mixed (q student's, a teacher's), then regular


class StudentBatch(NamedTuple):
    inputs: SideBatch
    rows_M: Tensor  # int64, flat in [B*S]: rows that predict the student's answer tokens
    labels_M: Tensor  # int64 in the student's vocabulary, IGNORE for placeholders
    boundary_M: Tensor  # bool


class SharedBytes(NamedTuple):
    """The rows of both sides that predict the same next byte, one entry per shared boundary.

    depth: how many bytes of the row's token stand before the boundary. int64 [I]."""

    student_I: Tensor  # of the M rows
    student_depth_I: Tensor
    teacher_I: Tensor  # of the N rows
    teacher_depth_I: Tensor


class PairBatch(NamedTuple):
    """One micro-batch. Counts are of real rows only; they normalise the step's loss."""

    student: StudentBatch
    teacher: TeacherBatch | None
    num_samples: int
    num_student_rows: int
    num_teacher_rows: int
    num_truncated: int = 0
    sample_ids: tuple[int, ...] = ()  # all that were asked for, the rejected ones included
    used_ids: tuple[int, ...] = ()  # those that are in it, in order, and their turns
    turns_of: tuple[int, ...] = ()
    unusable_ids: tuple[int, ...] = ()
    unusable: tuple[str, ...] = ()  # reasons of samples that this pair cannot learn from
    unusable_keys: tuple[str, ...] = ()  # and their keys
    unreadable: tuple[str, ...] = ()  # damaged ones, by shard and key
    shared_bytes: SharedBytes | None = None


def collate(
    pairs: list[Pair],
    placeholder: Pair,
    vision_rules: tuple[dict[str, str] | None, dict[str, str]],
    with_regular: bool,
    matcher: ByteMatcher | None = None,
) -> PairBatch:
    """Make a micro-batch that calls the same modules on every rank, whatever it is composed of.

    vision_rules: (teacher's, student's), key -> a rule of models/families.py. matcher: finds
    shared_bytes, for the kinds of stages that compare next bytes.
    Without a picture (or a sample) the placeholder joins, with labels that teach nothing:
    a rank whose vision tower stays silent leaves the others waiting in its all-gather. A pair of
    which one side reads text only has no picture anywhere, the placeholder included.
    """
    has_picture = any(pair.student.vision for pair in pairs)
    if not pairs or (placeholder.student.vision and not has_picture):
        pairs = [*pairs, placeholder]
    student = _student_batch(pairs, vision_rules[1])
    teacher = None
    if placeholder.teacher is not None:
        width = student.inputs.input_ids.shape[1]
        teacher = _teacher_batch(pairs, vision_rules[0] or {}, width, with_regular)
    return PairBatch(
        student,
        teacher,
        num_samples=sum(not pair.is_placeholder for pair in pairs),
        num_student_rows=int((student.labels_M != IGNORE).sum()),
        num_teacher_rows=0 if teacher is None else int((teacher.labels_N != IGNORE).sum()),
        num_truncated=sum(pair.is_truncated for pair in pairs),
        shared_bytes=_shared_bytes(pairs, matcher) if matcher else None,
    )


class JoinedTeacher(NamedTuple):
    """The teacher's side of several micro-batches as one forward's inputs."""

    inputs: SideBatch
    rows_A: Tensor
    targets_N: Tensor
    sizes: list[tuple[int, int]]  # rows and targets of each micro-batch, in order


def join_teacher(batches: list[PairBatch], rules: dict[str, str]) -> JoinedTeacher:
    """Join several micro-batches for one forward of the teacher; rules: its vision rules.

    Under ZeRO-3 a forward gathers every weight of the teacher, whatever its batch is. So fewer and
    larger forwards move fewer bytes.
    """
    views = [batch.teacher for batch in batches if batch.teacher is not None]
    longest = max(view.inputs.input_ids.shape[1] for view in views)
    sides = [_widened(view.inputs, longest, rules) for view in views]
    per_token = sides[0].vision.keys()
    vision = {key: torch.cat([side.vision[key] for side in sides]) for key in per_token}
    vision |= collate_vision([view.inputs.vision for view in views], rules)
    firsts = [0, *accumulate(len(side.input_ids) for side in sides)]

    def moved(flats: list[Tensor]) -> Tensor:
        """Turn flat rows of every view into flat rows of the joined sequences."""
        parts = []
        for flat, view, first in zip(flats, views, firsts, strict=False):
            width = view.inputs.input_ids.shape[1]
            row = torch.div(flat, width, rounding_mode="floor")
            parts.append((row + first) * longest + flat - row * width)
        return torch.cat(parts)

    joined = SideBatch(
        torch.cat([side.input_ids for side in sides]),
        torch.cat([side.attention_mask for side in sides]),
        vision,
        moved([view.inputs.real_P for view in views]),
    )
    sizes = [(len(view.rows_A), len(view.targets_N)) for view in views]
    rows_A = moved([view.rows_A for view in views])
    return JoinedTeacher(joined, rows_A, moved([view.targets_N for view in views]), sizes)


def _widened(side: SideBatch, longest: int, rules: dict[str, str]) -> SideBatch:
    """A side padded to `longest`, as pad_side pads, with its inputs per token alone as vision."""
    ids = side.input_ids
    # Padding repeats the last column: in each row an end-of-turn token, padding or not.
    padding = ids[:, -1:].expand(-1, longest - ids.shape[1])
    per_token = {key: side.vision[key] for key in side.vision if key not in rules}
    return side._replace(
        input_ids=torch.cat([ids, padding], 1),
        attention_mask=_grown(side.attention_mask, 1, longest),
        vision={key: _grown(value, 1, longest) for key, value in per_token.items()},
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """Copy a (nested) batch to `device`, asynchronously where its memory is pinned."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):  # a loader that pins memory makes lists of plain tuples
        return tuple(to_device(value, device) for value in batch)
    return batch


def _student_batch(pairs: list[Pair], rules: dict[str, str]) -> StudentBatch:
    inputs = pad_side([pair.student for pair in pairs], rules)
    rows, labels, boundary = _loss_rows(pairs, [p.student for p in pairs], inputs)
    return StudentBatch(inputs, rows, labels, boundary)


def _teacher_batch(
    pairs: list[Pair], rules: dict[str, str], student_width: int, with_regular: bool
) -> TeacherBatch:
    """student_width: of the student's padded sequences."""
    views = [pair.teacher for pair in pairs if pair.teacher is not None]
    inputs = pad_side(views, rules)
    targets, labels, boundary = _loss_rows(pairs, views, inputs)
    width = inputs.input_ids.shape[1]
    answer_rows = [_rows(view.answers, b * width) for b, view in enumerate(views)]
    question_rows = [_rows(view.questions, b * width) for b, view in enumerate(views)]
    rows_A = np.concatenate(answer_rows + (question_rows if with_regular else []))
    sequences = mixed(pairs, student_width)
    if with_regular:
        sequences += regular(views, num_answers=sum(map(len, answer_rows)))
    layout = lay_out(sequences, len(pairs) * student_width, len(rows_A))
    return TeacherBatch(inputs, _tensor(rows_A), targets, labels, boundary, layout)


def _shared_bytes(pairs: list[Pair], matcher: ByteMatcher) -> SharedBytes:
    """The shared boundaries of all pairs; placeholders have none, since they teach nothing."""
    parts: list[tuple[np.ndarray, ...]] = [(np.empty(0, np.int64),) * 4]
    first_m = first_n = 0
    for pair in pairs:
        assert pair.teacher is not None
        turns = zip(
            matcher.next_bytes(pair), pair.student.answers, pair.teacher.answers, strict=True
        )
        for boundaries, (start, end), (teacher_start, teacher_end) in turns:
            if not pair.is_placeholder:
                at, depth, teacher_at, teacher_depth = boundaries
                parts.append((at + first_m, depth, teacher_at + first_n, teacher_depth))
            first_m, first_n = first_m + end - start, first_n + teacher_end - teacher_start
    return SharedBytes(*(_tensor(np.concatenate(column)) for column in zip(*parts, strict=True)))


def pad_side(views: list[EncodedChat], rules: dict[str, str]) -> SideBatch:
    """Pad several conversations into one model's inputs; rules: this side's vision rules."""
    longest = max(len(view.input_ids_T) for view in views)
    input_ids = torch.empty(len(views), longest, dtype=torch.int64)
    attention_mask = torch.zeros(len(views), longest, dtype=torch.int64)
    per_token = {
        key: torch.zeros(len(views), longest, dtype=torch.int64) for key in views[0].per_token
    }
    for b, view in enumerate(views):
        length = len(view.input_ids_T)
        input_ids[b, :length] = view.input_ids_T
        # Padding repeats the end-of-turn token: in every vocabulary, and never an image token.
        input_ids[b, length:] = view.input_ids_T[-1]
        attention_mask[b, :length] = 1
        for key, values in view.per_token.items():
            per_token[key][b, :length] = values
    vision = collate_vision([view.vision for view in views], rules)
    real_P = attention_mask.flatten().nonzero().squeeze(-1)
    return SideBatch(input_ids, attention_mask, {**per_token, **vision}, real_P)


# The dims that a collate rule pads with zeros.
PADDED_DIMS = {"rows": (), "columns": (), "patches": (), "tiles": (1,), "canvas": (2, 3)}


def collate_vision(samples: list[dict[str, Tensor]], rules: dict[str, str]) -> dict[str, Tensor]:
    """Join several samples' vision inputs into one batch's; models/families.py has the rules."""
    joined = {}
    for key, rule in rules.items():
        tensors = [sample[key] for sample in samples if key in sample]
        if not tensors:
            continue
        if rule == "patches":
            tensors = _counted_on(tensors, [s["pixel_values"] for s in samples if key in s])
        for dim in PADDED_DIMS[rule]:
            most = max(tensor.shape[dim] for tensor in tensors)
            tensors = [_grown(tensor, dim, most) for tensor in tensors]
        joined[key] = torch.cat(tensors, -1 if rule == "columns" else 0)
    return joined


def _counted_on(numbers: list[Tensor], pixels: list[Tensor]) -> list[Tensor]:
    """Shift each sample's patch numbers by the number of patches of all samples before it."""
    moved, first = [], 0
    for own, patches in zip(numbers, pixels, strict=True):
        moved.append(torch.where(own < 0, own, own + first))
        first += patches.shape[0] * patches.shape[1]
    return moved


def _grown(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _loss_rows(
    pairs: list[Pair], views: list[EncodedChat], inputs: SideBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """(flat rows, labels, boundary) of all answer tokens of one side, in order."""
    width = inputs.input_ids.shape[1]
    rows, labels, boundary = [], [], []
    for b, (pair, view) in enumerate(zip(pairs, views, strict=True)):
        for start, end in view.answers:
            rows.append(np.arange(start - 1, end - 1) + b * width)
            ids = view.input_ids_T[start:end].numpy()
            labels.append(np.full_like(ids, IGNORE) if pair.is_placeholder else ids)
            boundary.append(np.arange(end - start) == 0)
    joined = [np.concatenate(parts) for parts in (rows, labels, boundary)]
    return _tensor(joined[0]), _tensor(joined[1]), torch.from_numpy(joined[2])


def _rows(spans: tuple[tuple[int, int], ...], offset: int) -> np.ndarray:
    return np.concatenate([np.arange(start, end) + offset for start, end in spans])


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
