"""Pairs become one micro-batch: padded sides, loss rows, and the passes of the Recalibrator.

Shapes: B conversations, T teacher length, S student length, A teacher rows entering the
Recalibrator, N teacher loss rows (one pass), M student loss rows, P packed rows, I boundaries
between bytes that both tokenisations share.

The row shift (paper section 3.3, our choice (c)): a hidden state predicts the NEXT token, so the
loss rows of turn k are the last row of q_k, then the rows of a_k but its last. Their labels are
all tokens of a_k. The first of them is the BOUNDARY row, the only one that hears the student.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genrecal_ds import IGNORE
from genrecal_ds.data.byte_matching import Aligner
from genrecal_ds.data.packed import Packing, TurnRows, pack
from genrecal_ds.data.pair import EncodedChat, Pair
from genrecal_ds.data.passes import aligned, mixed, regular


class Alignment(NamedTuple):
    """What a stage wants of the two tokenisations' bytes; see data/byte_matching.py."""

    aligner: Aligner
    answers: Literal["teacher", "student", "both"] = "teacher"  # whose rows a pass reads
    next_bytes: bool = False
    more: tuple[Aligner, ...] = ()  # of further teachers

    def seen_by(self, teacher: int) -> "Alignment":
        """0 is the first teacher."""
        return self._replace(aligner=self.more[teacher - 1], more=()) if teacher else self


class SideBatch(NamedTuple):
    """One model's inputs, right-padded."""

    input_ids: Tensor  # int64 [B, T]
    attention_mask: Tensor  # int64 [B, T]
    vision: dict[str, Tensor]
    real_P: Tensor  # int64: the real tokens, flat in [B*T], sample by sample


class TeacherBatch(NamedTuple):
    """What the teacher reads, and which of its rows are used for what."""

    inputs: SideBatch
    rows_A: Tensor  # int64, flat in [B*T]: answer rows, then (regular pass) question rows
    targets_N: Tensor  # int64, flat in [B*T]: the teacher's own rows z that predict the labels
    labels_N: Tensor  # int64 in the teacher's vocabulary, IGNORE for placeholders
    boundary_N: Tensor  # bool: the first loss row of a turn
    packing: Packing  # of the passes: mixed (q student's, a teacher's), aligned, regular
    # bool: loss rows of the aligned pass whose student row has read exactly what theirs has
    exact_N: Tensor | None = None


class StudentBatch(NamedTuple):
    inputs: SideBatch
    rows_M: Tensor  # int64, flat in [B*S]: rows that predict the student's answer tokens
    labels_M: Tensor  # int64 in the student's vocabulary, IGNORE for placeholders
    boundary_M: Tensor  # bool


class SharedBytes(NamedTuple):
    """Where both models predict the same next byte: rows of either side, with the bytes that the
    row's token has before it. int64 [I]."""

    student_I: Tensor  # of the M rows
    student_depth_I: Tensor
    teacher_I: Tensor  # of the N rows
    teacher_depth_I: Tensor


class TeacherView(NamedTuple):
    """What a further teacher sees of a micro-batch; fields as PairBatch has them."""

    teacher: TeacherBatch
    num_teacher_rows: int
    shared_bytes: SharedBytes | None


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
    unreadable: tuple[str, ...] = ()  # damaged ones, by shard and key
    shared_bytes: SharedBytes | None = None
    more: tuple[TeacherView, ...] = ()  # of further teachers, in order

    def seen_by(self, teacher: int) -> "PairBatch":
        """The same micro-batch beside this teacher; 0 is the first."""
        return self._replace(**self.more[teacher - 1]._asdict()) if teacher else self


def collate(
    pairs: list[Pair],
    placeholder: Pair,
    vision_rules: tuple[dict[str, str] | None, dict[str, str]],
    with_regular: bool,
    alignment: Alignment | None = None,
    more_rules: Sequence[dict[str, str]] = (),
) -> PairBatch:
    """A micro-batch of any composition that calls the same modules on every rank.

    vision_rules: (teacher's, student's), key -> a rule of models/families.py; more_rules: of
    further teachers.
    Without a picture (or a sample) the placeholder joins, with labels that teach nothing:
    a rank whose vision tower stays silent leaves the others waiting in its all-gather. A pair of
    which one side reads text only has no picture anywhere, the placeholder included.
    """
    has_picture = any(pair.student.vision for pair in pairs)
    if not pairs or (placeholder.student.vision and not has_picture):
        pairs = [*pairs, placeholder]
    student = _student_batch(pairs, vision_rules[1])
    views = []
    if placeholder.teacher is not None:
        width = student.inputs.input_ids.shape[1]
        for k, rules in enumerate([vision_rules[0] or {}, *more_rules]):
            seen = [pair.seen_by(k) for pair in pairs]
            own = alignment and alignment.seen_by(k)
            views.append(_teacher_view(seen, rules, width, with_regular, own))
    return PairBatch(
        student,
        views[0].teacher if views else None,
        num_samples=sum(not pair.is_placeholder for pair in pairs),
        num_student_rows=int((student.labels_M != IGNORE).sum()),
        num_teacher_rows=views[0].num_teacher_rows if views else 0,
        num_truncated=sum(pair.is_truncated for pair in pairs),
        shared_bytes=views[0].shared_bytes if views else None,
        more=tuple(views[1:]),
    )


class JoinedTeacher(NamedTuple):
    """The teacher's side of several micro-batches as one forward's inputs."""

    inputs: SideBatch
    rows_A: Tensor
    targets_N: Tensor
    sizes: list[tuple[int, int]]  # rows and targets of each micro-batch, in order


def join_teacher(batches: list[PairBatch], rules: dict[str, str]) -> JoinedTeacher:
    """One forward over several micro-batches; rules: the teacher's, as collate has them.

    Under ZeRO-3 a forward gathers every weight of the teacher whatever its batch is, so fewer and
    larger ones move fewer bytes.
    """
    views = [batch.teacher for batch in batches if batch.teacher is not None]
    longest = max(view.inputs.input_ids.shape[1] for view in views)
    ids, masks, real, rows, targets, sizes, first = [], [], [], [], [], [], 0
    per_token: dict[str, list[Tensor]] = {}
    for view in views:
        inputs = view.inputs
        count, width = inputs.input_ids.shape

        def moved(flat: Tensor, width: int = width, first: int = first) -> Tensor:
            row = torch.div(flat, width, rounding_mode="floor")
            return (row + first) * longest + flat - row * width

        # Padding repeats the last column: in each row an end-of-turn token, padding or not.
        padding = inputs.input_ids[:, -1:].expand(-1, longest - width)
        ids.append(torch.cat([inputs.input_ids, padding], 1))
        masks.append(_grown(inputs.attention_mask, 1, longest))
        for key in inputs.vision.keys() - rules.keys():
            per_token.setdefault(key, []).append(_grown(inputs.vision[key], 1, longest))
        real.append(moved(inputs.real_P))
        rows.append(moved(view.rows_A))
        targets.append(moved(view.targets_N))
        sizes.append((len(view.rows_A), len(view.targets_N)))
        first += count
    vision = {key: torch.cat(values) for key, values in per_token.items()}
    vision |= collate_vision([view.inputs.vision for view in views], rules)
    joined = SideBatch(torch.cat(ids), torch.cat(masks), vision, torch.cat(real))
    return JoinedTeacher(joined, torch.cat(rows), torch.cat(targets), sizes)


def to_device(batch: Any, device: torch.device) -> Any:
    """A copy of a (nested) batch with its tensors on `device`, asynchronously where pinned."""
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


def _teacher_view(
    pairs: list[Pair],
    rules: dict[str, str],
    student_width: int,
    with_regular: bool,
    alignment: Alignment | None,
) -> TeacherView:
    """Of pairs seen by one teacher."""
    inputs = pad_side([pair.teacher for pair in pairs if pair.teacher], rules)
    teacher = _teacher_batch(pairs, inputs, student_width, with_regular, alignment)
    shared = None
    if alignment and alignment.next_bytes:
        shared = _shared_bytes(pairs, alignment.aligner)
    return TeacherView(teacher, int((teacher.labels_N != IGNORE).sum()), shared)


def _teacher_batch(
    pairs: list[Pair],
    inputs: SideBatch,
    student_width: int,
    with_regular: bool,
    alignment: Alignment | None,
) -> TeacherBatch:
    """student_width: of the student's padded sequences."""
    views = [pair.teacher for pair in pairs if pair.teacher is not None]
    targets, labels, boundary = _loss_rows(pairs, views, inputs)
    width = inputs.input_ids.shape[1]
    answer_rows = [_rows(view.answers, b * width) for b, view in enumerate(views)]
    question_rows = [_rows(view.questions, b * width) for b, view in enumerate(views)]
    rows_A = np.concatenate(answer_rows + (question_rows if with_regular else []))
    num_answers = sum(map(len, answer_rows))
    sequences: list[list[TurnRows]] = []
    exact = None
    if alignment is None or alignment.answers != "student":
        sequences += mixed(pairs, student_width)
    if alignment and alignment.answers != "teacher":
        own, exact = aligned(pairs, student_width, alignment.aligner)
        sequences += own
    if with_regular:
        sequences += regular(views, num_answers)
    packing = pack(sequences, len(pairs) * student_width, len(rows_A))
    return TeacherBatch(inputs, _tensor(rows_A), targets, labels, boundary, packing, exact)


def _shared_bytes(pairs: list[Pair], aligner: Aligner) -> SharedBytes:
    """Of all pairs but placeholders, which teach nothing."""
    parts: list[tuple[np.ndarray, ...]] = [(np.empty(0, np.int64),) * 4]
    first_m = first_n = 0
    for pair in pairs:
        assert pair.teacher is not None
        turns = zip(
            aligner.next_bytes(pair), pair.student.answers, pair.teacher.answers, strict=True
        )
        for found, (start, end), (teacher_start, teacher_end) in turns:
            if not pair.is_placeholder:
                at, depth, teacher_at, teacher_depth = found
                parts.append((at + first_m, depth, teacher_at + first_n, teacher_depth))
            first_m, first_n = first_m + end - start, first_n + teacher_end - teacher_start
    return SharedBytes(*(_tensor(np.concatenate(column)) for column in zip(*parts, strict=True)))


def pad_side(views: list[EncodedChat], rules: dict[str, str]) -> SideBatch:
    """One model's inputs of several conversations; rules: collate's, of this side."""
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
    """Vision inputs of several samples as one batch's; see models/families.py for the rules."""
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
    """Numbers of each sample's own patches, as numbers among those of all samples before it too."""
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
