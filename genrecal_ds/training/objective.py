"""What a stage minimises, built from the recipe: heads, Recalibrators, tables, then the module."""

from pathlib import Path

from torch import nn

from genrecal_ds import dist
from genrecal_ds.data.batch import Alignment
from genrecal_ds.data.byte_matching import Aligner
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.head import FrozenHead, load_frozen_head
from genrecal_ds.models.recalibrator import load_recalibrator
from genrecal_ds.models.token_bytes import byte_vocabulary, token_bytes
from genrecal_ds.models.vlm import VLM
from genrecal_ds.objectives.answer_inputs import AnswerInputs
from genrecal_ds.objectives.byte_kd import ByteKD
from genrecal_ds.objectives.dskd import ProjectedKD
from genrecal_ds.objectives.genrecal import GenRecal
from genrecal_ds.objectives.logit_kd import divergence
from genrecal_ds.objectives.mot import MultiLevelOT
from genrecal_ds.objectives.report import Clock
from genrecal_ds.objectives.several_teachers import SeveralTeachers
from genrecal_ds.objectives.supervised import Supervised
from genrecal_ds.objectives.token_kd import TokenKD
from genrecal_ds.objectives.uld import sorted_distance
from genrecal_ds.ops.next_byte import ByteVocabulary
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.recipe.stage_config import StageConfig
from genrecal_ds.training.weights import (
    DTYPES,
    new_recalibrator,
    recalibrator_folder_of,
    teacher_width,
)


def alignment_of(stage: StageConfig, encoders: PairEncoders) -> Alignment | None:
    """What the stage wants to know of both tokenizations. Raises UserError; see token_bytes."""
    if not stage.needs_alignment:
        return None

    def pieces(encoder: ChatEncoder) -> list[bytes | None]:
        return token_bytes(encoder.tokenizer, encoder.folder)

    teachers = [pieces(encoder) for encoder in encoders.teachers]
    student = pieces(encoders.student)
    first, *more = (Aligner(teacher, student) for teacher in teachers)
    return Alignment(first, stage.answers.rows, stage.kind == "byte_kd", tuple(more))


def build_objective(
    recipe: Recipe,
    stage: StageConfig,
    student: VLM,
    recalibrator_folder: Path | None,
    encoders: PairEncoders,
    clock: Clock,
    alignment: Alignment | None,
) -> nn.Module:
    if not stage.needs_teacher:
        return Supervised(student, stage.losses, clock)
    # In the recipe's order: the first one's Recalibrator begins as it would alone.
    parts = [
        _of_one_teacher(
            recipe, stage, student, number,
            recalibrator_folder and recalibrator_folder_of(recalibrator_folder, number),
            encoders, clock, alignment and alignment.seen_by(number),
        )
        for number in range(len(recipe.teachers))
    ]  # fmt: skip
    if len(parts) == 1:
        return parts[0]
    return SeveralTeachers(student, parts, recipe.teacher_shares, clock)


def _of_one_teacher(
    recipe: Recipe,
    stage: StageConfig,
    student: VLM,
    number: int,
    recalibrator_folder: Path | None,
    encoders: PairEncoders,
    clock: Clock,
    alignment: Alignment | None,
) -> nn.Module:
    folder, dtype = recipe.teachers[number].path, DTYPES[recipe.precision]
    head = FrozenHead(load_frozen_head(folder, dtype, dist.device()))
    if stage.kind == "dskd":
        return ProjectedKD(student, head, teacher_width(recipe), stage.losses, clock)
    if stage.needs_logits:
        if stage.kind == "mot":
            return MultiLevelOT(student, head, stage.losses, clock)
        if stage.kind == "byte_kd":
            assert alignment is not None
            sides = encoders.teachers[number], encoders.student
            tables = _byte_vocabularies(alignment.aligner, sides, student, head)
            return ByteKD(student, head, tables, stage.losses, clock)
        distance = sorted_distance
        if stage.kind == "logit_kd":
            distance = divergence(stage.losses, len(encoders.student.tokenizer))
        return TokenKD(student, head, stage.losses, distance, clock)
    recalibrator = new_recalibrator(recipe, student, number)
    if recalibrator_folder:
        load_recalibrator(recalibrator, recalibrator_folder)
    return GenRecal(
        student,
        recalibrator,
        head,
        stage.losses,
        trains_student=stage.kind != "align",
        clock=clock,
        answers=AnswerInputs(stage.answers),
    )


def _byte_vocabularies(
    aligner: Aligner, encoders: tuple[ChatEncoder, ChatEncoder], student: VLM, head: FrozenHead
) -> tuple[ByteVocabulary, ByteVocabulary]:
    """(teacher's, student's), as are the encoders."""
    theirs, ours = encoders
    assert theirs.end_of_turn is not None and ours.end_of_turn is not None
    device, columns = dist.device(), len(head.head.weight_VH)
    return (
        byte_vocabulary(aligner.teacher, theirs.end_of_turn, columns, device),
        byte_vocabulary(aligner.student, ours.end_of_turn, student.head.out_features, device),
    )
