"""Opens and checks what a run reads, before any model is loaded: tokenizers and shards."""

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
    """The parts of a run that can be refused before a model is loaded."""

    encoders: dict[bool, PairEncoders]  # by "has a teacher"
    indices: dict[str, ShardIndex]
    lengths: dict[tuple[str, bool], Lengths]  # training data, by folder and "has a teacher"


def open_inputs(recipe: Recipe) -> Inputs:
    """Open tokenizers, templates and shard indices. Raises UserError for the first that fails."""
    for source in filter(None, (recipe.student, recipe.teacher)):
        allow_code(source)
    student = ChatEncoder(recipe.student.path, recipe.student.max_length)
    encoders = {False: PairEncoders(student, too_long=recipe.data.too_long)}
    if any(stage.facts.has_teacher for stage in recipe.stages):
        assert recipe.teacher is not None  # a rule of config.Recipe
        teacher = ChatEncoder(recipe.teacher.path, recipe.teacher.max_length)
        encoders[True] = PairEncoders(student, teacher, recipe.data.too_long)
        _refuse_two_tokenizers(recipe, student, teacher)
        if any(stage.facts.matches_bytes for stage in recipe.stages):
            for encoder in (student, teacher):  # raises for a tokenizer that it cannot spell
                token_bytes(encoder.tokenizer, encoder.folder)
    folders = {recipe.data.train, recipe.data.validation, *(s.data for s in recipe.stages)}
    indices = {folder: ShardIndex.load(store_of(folder, recipe)) for folder in folders if folder}
    of_stages: dict[tuple[str, bool], Lengths] = {}
    for stage in recipe.stages:
        key = folder, has_teacher = (stage.data or recipe.data.train, stage.facts.has_teacher)
        if key not in of_stages:
            of_stages[key] = _lengths(indices[folder], encoders, has_teacher, recipe)
    return Inputs(encoders, indices, of_stages)


def _refuse_two_tokenizers(recipe: Recipe, student: ChatEncoder, teacher: ChatEncoder) -> None:
    for stage in recipe.stages:
        if stage.facts.needs_one_tokenizer:
            if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
                raise UserError(
                    f"stages.{stage.name}: {stage.kind} needs one tokenizer, and teacher.path and "
                    "student.path have two; take distill or uld"
                )


def allow_code(source: ModelSource) -> None:
    """Allow a folder's code, before anything else opens. Raises UserError for an unlisted file."""
    if code := source.allow_remote_code:
        allow(source.path, code.files, Family(code.components, dict(code.vision_inputs)))


def store_of(folder: str, recipe: Recipe) -> ShardStore:
    """Open a folder of shards, or a URL behind the recipe's cache."""
    cache = recipe.data.cache
    if cache is None:
        return ShardStore(folder, recipe.data.remote)
    return ShardStore(folder, recipe.data.remote, cache.dir, int(cache.max_gib * 2**30))


def _lengths(
    index: ShardIndex, encoders: dict[bool, PairEncoders], has_teacher: bool, recipe: Recipe
) -> Lengths:
    """Read lengths for the models a stage uses. All stages share one table of the recipe's pair."""
    if recipe.data.lengths == "estimated":
        return lengths.estimated(index)
    pair, used = encoders[True in encoders].by_side, encoders[has_teacher].by_side
    digests = {side: encoder.digest for side, encoder in pair.items()}
    limits = {side: encoder.max_length for side, encoder in used.items()}
    return lengths.measured(index, digests, limits)
