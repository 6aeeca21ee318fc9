"""Pairs become one micro-batch: padded sides, loss rows, and the Recalibrator's packing.

Everything that depends on lengths is decided here, on the CPU: later rooms only gather, and no
kernel waits for a number from the device.

Shapes: B conversations, T teacher length, S student length, A teacher rows entering the
Recalibrator, N teacher loss rows (one pass), M student loss rows, P packed rows, C packed
sequences, R = B*S + A source rows of the packed ones, U most uses of one source row.

The row shift (paper section 3.3, our choice (c)): a hidden state predicts the NEXT token, so the
loss rows of turn k are the last row of q_k, then the rows of a_k but its last. Their labels are
all tokens of a_k. The first of them is the BOUNDARY row, the only one that hears the student.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genrecal_ds.data.pair import EncodedChat, Pair

IGNORE = -100  # label of rows that teach nothing


class Turns(NamedTuple):
    """For the block whose output is read at the loss rows alone: what each turn attends to.

    A turn's loss rows are consecutive, and see their sequence up to the last of them. Sequences
    of several turns repeat their keys, so that each turn is one span of its own.
    """

    keys: Tensor  # int64: packed rows, turn by turn
    cu_queries: Tensor  # int32 [turns + 1], into loss_rows
    cu_keys: Tensor  # int32 [turns + 1], into keys
    max_queries: int
    max_keys: int


class Packing(NamedTuple):
    """Where every packed row comes from, and which rows predict.

    A packed sequence is `q1 a1 q2 a2 .. qK aK` of one conversation, `a` always the teacher's.
    The mixed sequences (q of the student) come first; stage 1 adds the regular ones (q of the
    teacher), with the same loss rows in the same order.
    """

    source_P: Tensor  # int32; i >= 0: student row i of [B*S]; i < 0: teacher row -i-1 of [A]
    uses_RU: Tensor  # int32; its inverse: packed rows that each source row went to, -1 for none
    sequence_P: Tensor  # int64; the packed sequence of each row
    position_ids_P: Tensor  # int64; NPE: 0..n-1 within each sequence
    own_position_ids_P: Tensor  # int64; without NPE: each token's place in its own model's sequence
    loss_rows: Tensor  # int64 [N], or [2N] with the regular pass
    cu_seqlens: Tensor  # int32 [C + 1]; sequence c is the packed rows cu_seqlens[c : c + 2]
    turns: Turns
    num_sequences: int
    max_seqlen: int


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
    packing: Packing


class StudentBatch(NamedTuple):
    inputs: SideBatch
    rows_M: Tensor  # int64, flat in [B*S]: rows that predict the student's answer tokens
    labels_M: Tensor  # int64 in the student's vocabulary, IGNORE for placeholders
    boundary_M: Tensor  # bool


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


def collate(
    pairs: list[Pair],
    placeholder: Pair,
    vision_rules: tuple[dict[str, str] | None, dict[str, str]],
    with_regular: bool,
) -> PairBatch:
    """A micro-batch of any composition that calls the same modules on every rank.

    vision_rules: (teacher's, student's), key -> a rule of models/families.py.
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
        teacher = _teacher_batch(pairs, vision_rules[0] or {}, student, with_regular)
    return PairBatch(
        student,
        teacher,
        num_samples=sum(not pair.is_placeholder for pair in pairs),
        num_student_rows=int((student.labels_M != IGNORE).sum()),
        num_teacher_rows=int((teacher.labels_N != IGNORE).sum()) if teacher else 0,
        num_truncated=sum(pair.is_truncated for pair in pairs),
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
    return batch


def _student_batch(pairs: list[Pair], rules: dict[str, str]) -> StudentBatch:
    inputs = pad_side([pair.student for pair in pairs], rules)
    rows, labels, boundary = _loss_rows(pairs, [p.student for p in pairs], inputs)
    return StudentBatch(inputs, rows, labels, boundary)


def _teacher_batch(
    pairs: list[Pair], rules: dict[str, str], student: StudentBatch, with_regular: bool
) -> TeacherBatch:
    views = [pair.teacher for pair in pairs if pair.teacher is not None]
    inputs = pad_side(views, rules)
    targets, labels, boundary = _loss_rows(pairs, views, inputs)
    width = inputs.input_ids.shape[1]
    answer_rows = [_rows(view.answers, b * width) for b, view in enumerate(views)]
    question_rows = [_rows(view.questions, b * width) for b, view in enumerate(views)]
    rows = answer_rows + (question_rows if with_regular else [])
    student_width = student.inputs.input_ids.shape[1]
    rows_A = np.concatenate(rows)
    packing = _pack(pairs, student_width, len(rows_A), with_regular)
    return TeacherBatch(inputs, _tensor(rows_A), targets, labels, boundary, packing)


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


def _pack(
    pairs: list[Pair], student_width: int, num_teacher_rows: int, with_regular: bool
) -> Packing:
    """The packed sequences of a micro-batch; see Packing for their order."""
    teachers = [pair.teacher for pair in pairs if pair.teacher is not None]
    answer_lengths = [[end - start for start, end in view.answers] for view in teachers]
    answers = _numbered(answer_lengths, first=0)
    num_answers = sum(map(sum, answer_lengths))
    mixed_questions = [
        [np.arange(start, end) + b * student_width for start, end in pair.student.questions]
        for b, pair in enumerate(pairs)
    ]
    sequences = list(zip(mixed_questions, answers, strict=True))
    if with_regular:
        question_lengths = [[end - start for start, end in view.questions] for view in teachers]
        questions = _numbered(question_lengths, first=num_answers)
        sequences += [
            ([-turn - 1 for turn in turns], answer)
            for turns, answer in zip(questions, answers, strict=True)
        ]
    source: list[np.ndarray] = []
    sequence, positions, loss_rows, keys, offset = [], [], [], [], 0
    for number, (turn_questions, turn_answers) in enumerate(sequences):
        length = 0
        for question, answer in zip(turn_questions, turn_answers, strict=True):
            source += [question, -answer - 1]
            boundary = offset + length + len(question) - 1
            loss_rows.append(np.arange(boundary, boundary + len(answer)))
            keys.append(np.arange(offset, boundary + len(answer)))
            length += len(question) + len(answer)
        sequence.append(np.full(length, number))
        positions.append(np.arange(length))
        offset += length
    source_P = np.concatenate(source)
    return Packing(
        _tensor(source_P, np.int32),
        _tensor(_uses(source_P, len(pairs) * student_width, num_teacher_rows), np.int32),
        _tensor(np.concatenate(sequence)),
        _tensor(np.concatenate(positions)),
        _own_positions([pair.student for pair in pairs], teachers, with_regular),
        _tensor(np.concatenate(loss_rows)),
        _cumulative(sequence),
        Turns(
            _tensor(np.concatenate(keys)),
            _cumulative(loss_rows),
            _cumulative(keys),
            max_queries=max(map(len, loss_rows)),
            max_keys=max(map(len, keys)),
        ),
        num_sequences=len(sequences),
        max_seqlen=max(map(len, sequence)),
    )


def _own_positions(
    students: list[EncodedChat], teachers: list[EncodedChat], with_regular: bool
) -> Tensor:
    """[P]: places of the packed rows' tokens in the sequences that their models read."""
    asking = students + (teachers if with_regular else [])
    answering = teachers * (2 if with_regular else 1)
    runs = [
        np.arange(*span)
        for asks, answers in zip(asking, answering, strict=True)
        for turn in zip(asks.questions, answers.answers, strict=True)
        for span in turn
    ]
    return _tensor(np.concatenate(runs))


def _cumulative(runs: list[np.ndarray]) -> Tensor:
    """int32 [runs + 1]: where each run begins, and the end of the last."""
    return _tensor(np.cumsum([0, *map(len, runs)]), np.int32)


def _uses(source_P: np.ndarray, num_student_rows: int, num_teacher_rows: int) -> np.ndarray:
    """[R, U]: where each source row went, in order; student rows first, -1 where fewer than U."""
    row_P = np.where(source_P >= 0, source_P, num_student_rows - 1 - source_P)
    order_P = np.argsort(row_P, kind="stable")
    sorted_P = row_P[order_P]
    starts_P = np.searchsorted(sorted_P, sorted_P)
    use_P = np.arange(len(row_P)) - starts_P
    uses_RU = np.full((num_student_rows + num_teacher_rows, use_P.max() + 1), -1)
    uses_RU[sorted_P, use_P] = order_P
    return uses_RU


def _numbered(lengths: list[list[int]], first: int) -> list[list[np.ndarray]]:
    """Consecutive numbers from `first`, one run per turn of each conversation."""
    numbered, number = [], first
    for turns in lengths:
        runs = []
        for length in turns:
            runs.append(np.arange(number, number + length))
            number += length
        numbered.append(runs)
    return numbered


def _rows(spans: tuple[tuple[int, int], ...], offset: int) -> np.ndarray:
    return np.concatenate([np.arange(start, end) + offset for start, end in spans])


def _tensor(array: np.ndarray, dtype: type = np.int64) -> Tensor:
    return torch.from_numpy(array.astype(dtype))
