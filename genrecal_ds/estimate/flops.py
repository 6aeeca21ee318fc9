"""Counts a stage's floating-point operations by arithmetic, per sample and phase. No torch.

A multiply-add counts as two. Counted are products with weights, and attention's two products over
the pairs that a causal mask leaves. Norms, activations, softmax and the vision encoder's own
attention are not. Phases are those of a step's log: what runs forward under its own name, and
everything that runs backwards together.

    A answer tokens of a sample, alike on both sides    T, S tokens of the teacher's, the student's
    H, D widths                                         V vocabulary
"""

from typing import NamedTuple

from genrecal_ds.estimate.memory import Decoder, Load, Model

PHASES = ("teacher", "student", "recalibrator", "head", "backward")


class SampleTokens(NamedTuple):
    """Tokens of an average one; visual ones are part of both sides."""

    teacher: float
    student: float
    answer: float
    visual: float = 0


def of_stage(load: Load, sample: SampleTokens) -> dict[str, float]:
    """By phase, of one sample; `head` is both models'. Losses form their gradients forward."""
    counts = dict.fromkeys(PHASES, 0.0)
    body = decoder_forward(load.student, sample.student)
    counts["student"] = body + vision_forward(load.student, sample.visual)
    if load.trains_student:
        counts["backward"] += (3 if load.checkpointing else 2) * body
    counts["head"] = student_products(load) * head_product(load.student, sample.answer)
    if load.teacher is None:
        return counts
    counts["head"] += teacher_products(load) * head_product(load.teacher, sample.answer)
    if load.placement != "cache":
        counts["teacher"] = decoder_forward(load.teacher, sample.teacher)
        counts["teacher"] += vision_forward(load.teacher, sample.visual)
    if load.kind.projects:  # beside the loss, and timed with it
        projection = _projection(load, sample.answer)
        counts["head"] += projection
        counts["backward"] += 2 * projection
    if not load.depth:
        return counts
    counts["recalibrator"] = recalibrator_forward(load, sample)
    # Into the teacher's rows, frozen, Proj-pre sends no gradient.
    spared = _projection(load, _projected_rows(load, sample))
    counts["backward"] += 2 * counts["recalibrator"] - spared
    return counts


def student_products(load: Load) -> int:
    """Products with the student's own head. A term has logits and dx, and dW of a head that trains
    (as if what is below it did, too); a term that is only measured has logits alone."""
    kind, gradient = load.kind, 3 if load.trains_head else 2
    of_ce = kind.trains_student * (gradient if load.ce_trains else 1)
    return of_ce + gradient * kind.has_distance_at_own_head


def teacher_products(load: Load) -> int:
    """Products with the teacher's head: its own logits, and for each pass the student's logits and
    their gradient."""
    return 1 if load.kind.has_distance_at_own_head else 1 + 2 * load.passes


def decoder_forward(model: Model, tokens: float) -> float:
    """Decoder layers of one sequence."""
    return weights_forward(model, tokens) + _attention(model.decoder, model.decoder.layers, tokens)


def weights_forward(model: Model, tokens: float) -> float:
    """The same without attention's own products."""
    return 2 * model.matrices * tokens


def vision_forward(model: Model, visual_tokens: float) -> float:
    return 2 * model.vision * model.patches * visual_tokens


def head_product(model: Model, rows: float) -> float:
    """One of the products with a head: logits, or dx, or dW."""
    return 2 * model.vocab * model.decoder.hidden * rows


def _attention(decoder: Decoder, layers: int, tokens: float) -> float:
    """Scores and mixing: 2 * 2 T^2 heads head_dim, half of it under a causal mask."""
    return 2 * layers * decoder.heads * decoder.head_dim * tokens**2


def recalibrator_forward(load: Load, sample: SampleTokens) -> float:
    """The mixed pass has the student's questions, the regular one the teacher's."""
    rows = [sample.student, sample.teacher][: load.passes]
    blocks = sum(_blocks(load, count, sample.answer) for count in rows)
    projected = _projected_rows(load, sample) + load.passes * sample.answer
    return blocks + _projection(load, projected)


def _projected_rows(load: Load, sample: SampleTokens) -> float:
    """Through Proj-pre; the answer's are shared by the passes."""
    return sample.teacher if load.has_regular else sample.answer


def _projection(load: Load, rows: float) -> float:
    assert load.teacher is not None
    return 2 * load.student.decoder.hidden * load.teacher.decoder.hidden * rows


def _blocks(load: Load, rows: float, answer: float) -> float:
    """Of one sequence; the last packed block runs Q, O and MLP on the loss rows only."""
    student = load.student.decoder
    block = load.student.matrices / student.layers
    whole = 2 * block * rows + _attention(student, 1, rows)
    if not load.packed_recalibrator:
        return load.depth * whole
    keys_values = 2 * student.hidden * student.kv_heads * student.head_dim
    # Loss rows are few and late: each attends to nearly every row before it.
    reading = 4 * answer * rows * student.heads * student.head_dim
    last = 2 * keys_values * rows + 2 * (block - keys_values) * answer + reading
    return (load.depth - 1) * whole + last
