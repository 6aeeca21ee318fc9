"""Computes floating-point operations of a stage, per sample and phase. Imports no torch.

A multiply-add counts as two. Counted are products with weights, and attention's two products over
the pairs that a causal mask leaves. Norms, activations, softmax and the vision encoder's own
attention are not counted. The phases are those of a step's log: each forward part under its own
name, and one phase `backward` for all that runs backwards.

    A answer tokens of a sample, alike on both sides    T, S tokens of the teacher, the student
    H, D widths                                         V vocabulary
"""

from typing import NamedTuple

from genrecal_ds.estimate.memory import Decoder, Load, Model

PHASES = ("teacher", "student", "recalibrator", "head", "backward")


class SampleTokens(NamedTuple):
    """Tokens of an average sample; teacher and student both include the visual tokens."""

    teacher: float
    student: float
    answer: float
    visual: float = 0


def of_stage(load: Load, sample: SampleTokens) -> dict[str, float]:
    """Count one sample, by phase. `head` has both models' heads; losses form gradients there."""
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
    # Proj-pre sends no gradient into the teacher's rows, which are frozen.
    spared = _projection(load, _projected_rows(load, sample))
    counts["backward"] += 2 * counts["recalibrator"] - spared
    return counts


def student_products(load: Load) -> int:
    """Count products with the student's own head. A term has logits, dx, and dW if the head trains
    (dx counts even if nothing below trains). A term that is only measured has logits alone."""
    kind, gradient = load.kind, 3 if load.trains_head else 2
    of_ce = kind.trains_student * (gradient if load.ce_trains else 1)
    return of_ce + gradient * kind.has_distance_at_own_head


def teacher_products(load: Load) -> int:
    """Count products with the teacher's head: its own logits, and for each pass the student's
    logits and their gradient."""
    return 1 if load.kind.has_distance_at_own_head else 1 + 2 * load.passes


def decoder_forward(model: Model, tokens: float) -> float:
    """Count the decoder layers for one sequence."""
    return weights_forward(model, tokens) + _attention(model.decoder, model.decoder.layers, tokens)


def weights_forward(model: Model, tokens: float) -> float:
    """Count the decoder layers without attention's own products."""
    return 2 * model.matrices * tokens


def vision_forward(model: Model, visual_tokens: float) -> float:
    return 2 * model.vision * model.patches * visual_tokens


def head_product(model: Model, rows: float) -> float:
    """Count one product with a head: logits, or dx, or dW."""
    return 2 * model.vocab * model.decoder.hidden * rows


def _attention(decoder: Decoder, layers: int, tokens: float) -> float:
    """Count scores and mixing: 2 * 2 T^2 heads head_dim, half of that under a causal mask."""
    return 2 * layers * decoder.heads * decoder.head_dim * tokens**2


def recalibrator_forward(load: Load, sample: SampleTokens) -> float:
    """Count all passes: the mixed with the student's questions, the regular with the teacher's."""
    rows = [sample.student, sample.teacher][: load.passes]
    blocks = sum(_blocks(load, count, sample.answer) for count in rows)
    projected = _projected_rows(load, sample) + load.passes * sample.answer
    return blocks + _projection(load, projected)


def _projected_rows(load: Load, sample: SampleTokens) -> float:
    """Count the rows that go through Proj-pre; the passes share the answer's rows."""
    return sample.teacher if load.has_regular else sample.answer


def _projection(load: Load, rows: float) -> float:
    assert load.teacher is not None
    return 2 * load.student.decoder.hidden * load.teacher.decoder.hidden * rows


def _blocks(load: Load, rows: float, answer: float) -> float:
    """Count the blocks for one sequence; the last packed block runs Q, O, MLP on loss rows only."""
    student = load.student.decoder
    block = load.student.matrices / student.layers
    whole = 2 * block * rows + _attention(student, 1, rows)
    if not load.packed_recalibrator:
        return load.depth * whole
    keys_values = 2 * student.hidden * student.kv_heads * student.head_dim
    # Loss rows are few and late: each loss row attends to nearly all rows.
    reading = 4 * answer * rows * student.heads * student.head_dim
    last = 2 * keys_values * rows + 2 * (block - keys_values) * answer + reading
    return (load.depth - 1) * whole + last
