"""What a run reads, opened and checked before any model is loaded: both tokenizers, all shards."""

from dataclasses import dataclass

from genrecal_ds.data import lengths
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.lengths import Lengths
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.store import ShardStore
from genrecal_ds.errors import UserError
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.families import Family
from genrecal_ds.models.remote import allow
from genrecal_ds.models.token_bytes import token_bytes
from genrecal_ds.recipe.config import ModelSource, Recipe


@dataclass(frozen=True)
class Inputs:
    """Everything about a run that can be refused before a model is loaded."""

    encoders: dict[bool, PairEncoders]  # by "has a teacher"
    indices: dict[str, ShardIndex]
    lengths: dict[tuple[str, bool], Lengths]  # by folder and "has a teacher"; of training data


def open_inputs(recipe: Recipe) -> Inputs:
    """Tokenizers, templates and shard indices. Raises UserError for the first that fails."""
    for source in (recipe.student, *recipe.teachers):
        allow_code(source)
    student = ChatEncoder(recipe.student.path, recipe.student.max_length)
    encoders = {False: PairEncoders(student, too_long=recipe.data.too_long)}
    if any(stage.needs_teacher for stage in recipe.stages):
        assert recipe.teacher is not None  # a rule of config.Recipe
        teacher, *more = (ChatEncoder(t.path, t.max_length) for t in recipe.teachers)
        encoders[True] = PairEncoders(student, teacher, recipe.data.too_long, tuple(more))
        _refuse_two_tokenizers(recipe, student, teacher)
        if any(stage.needs_alignment for stage in recipe.stages):
            for encoder in (student, teacher, *more):  # raises for what it cannot spell
                token_bytes(encoder.tokenizer, encoder.folder)
    folders = {recipe.data.train, recipe.data.validation, *(s.data for s in recipe.stages)}
    indices = {folder: ShardIndex.load(store_of(folder, recipe)) for folder in folders if folder}
    found: dict[tuple[str, bool], Lengths] = {}
    for stage in recipe.stages:
        key = (stage.data or recipe.data.train, stage.needs_teacher)
        if key not in found:
            found[key] = _lengths(indices[key[0]], encoders, stage.needs_teacher, recipe)
    return Inputs(encoders, indices, found)


def _refuse_two_tokenizers(recipe: Recipe, student: ChatEncoder, teacher: ChatEncoder) -> None:
    """logit_kd compares the probabilities of equal ids."""
    for stage in recipe.stages:
        if stage.kind == "logit_kd":
            if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
                raise UserError(
                    f"stages.{stage.name}: logit_kd needs one tokenizer, and teacher.path and "
                    "student.path have two; take distill or uld"
                )


def allow_code(source: ModelSource) -> None:
    """Before anything else of the folder is opened. Raises UserError for a file not as listed."""
    if code := source.allow_remote_code:
        allow(source.path, code.files, Family(code.components, dict(code.vision_inputs)))


def store_of(folder: str, recipe: Recipe) -> ShardStore:
    """A folder of shards, or a URL behind the recipe's cache."""
    cache = recipe.data.cache
    if cache is None:
        return ShardStore(folder, recipe.data.remote)
    return ShardStore(folder, recipe.data.remote, cache.dir, int(cache.max_gib * 2**30))


def _lengths(
    index: ShardIndex, encoders: dict[bool, PairEncoders], has_teacher: bool, recipe: Recipe
) -> Lengths:
    """Of the sides that a stage uses. One table serves all stages: it is the recipe's pair's.

    The order is by the first teacher's tokens and the student's, whatever teachers stand beside.
    """
    if recipe.data.lengths == "estimated":
        return lengths.estimated(index)
    pair = encoders[True in encoders].by_side
    used = encoders[has_teacher].by_side
    return lengths.measured(
        index,
        {side: encoder.digest for side, encoder in pair.items() if side in lengths.SIDES},
        {side: encoder.max_length for side, encoder in used.items() if side in lengths.SIDES},
    )
