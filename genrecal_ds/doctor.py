"""Says, without a GPU and before any training, whether a recipe will run and what it teaches.

    python -m genrecal_ds.doctor RECIPE.yaml [key=value ...] [--gpus N] [--gpu-memory GIB]
    python -m genrecal_ds.doctor RECIPE.yaml [key=value ...] --hostfile HOSTS

Every refusal is one line that names file or key and the fix. Exit code 0, or 2 with any refusal.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from genrecal_ds.console.arguments import command_parser, positive
from genrecal_ds.console.refusals import Findings
from genrecal_ds.errors import UserError
from genrecal_ds.estimate.memory import GIB, NOT_COUNTED, Estimate, estimate
from genrecal_ds.recipe.config import ModelSource, Recipe
from genrecal_ds.recipe.hostfile import Cluster, cluster_of
from genrecal_ds.recipe.recipe_file import load_recipe
from genrecal_ds.recipe.stage_config import StageConfig

if TYPE_CHECKING:
    from genrecal_ds.data.index import ShardIndex
    from genrecal_ds.models.chat import ChatEncoder

NUM_SAMPLES = 20
ONE_RELEASE = "take all its files from one release"


@dataclass
class Case:
    """Holds what the sections share; a part that was refused is missing."""

    recipe: Recipe
    report: Findings
    cluster: Cluster | None = None
    indices: "dict[str, ShardIndex]" = field(default_factory=dict)
    encoders: "dict[str, ChatEncoder]" = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)  # sides with an architecture that we cannot build

    @property
    def sources(self) -> dict[str, ModelSource]:
        """Return models by side; the teacher only if a stage needs one, the same as in training."""
        own: dict[str, ModelSource] = {"student": self.recipe.student}
        if self.recipe.teacher and any(stage.facts.has_teacher for stage in self.recipe.stages):
            return {"teacher": self.recipe.teacher, **own}
        return own


def models(case: Case) -> None:
    """Show both models, from their config and the headers of their weights."""
    from genrecal_ds.estimate.describe import describe_blocks
    from genrecal_ds.estimate.sizes import body_of
    from genrecal_ds.models.loading import Checkpoint, find_sources
    from genrecal_ds.models.packing import OURS
    from genrecal_ds.models.processors import backend
    from genrecal_ds.models.replica import int8_quantizer
    from genrecal_ds.training.inputs import allow_code

    report = case.report
    for side, source in case.sources.items():
        report.say(f"{side}: {source.path}")
        case.broken.add(side)
        with report.attempt(f"{side}.path", ONE_RELEASE):
            allow_code(source)
            try:
                vlm = body_of(source)
            except ImportError as error:  # the package of this attention is missing
                raise UserError(f"attention: {' '.join(str(error).split())}; install it") from None
            config = vlm.model.config
            total = sum(parameter.numel() for parameter in vlm.parameters())
            tied = "tied" if vlm.is_tied else "not tied"
            report.say(f"  family {config.model_type}, class {type(vlm.model).__name__}")
            report.say(f"  {total:,} parameters, head and embeddings {tied}")
            scale, softcap = vlm.head.transform
            report.say(f"  behind the head: scale {scale:g}, softcap {softcap or 'none'}")
            attention = vlm.model.get_decoder().config._attn_implementation
            attention = "ours, within each sample" if attention == OURS else attention
            packing = "samples packed" if vlm.pack else "samples padded"
            report.say(f"  {packing}, attention {attention}")
            report.say(f"  pixels from {backend(config.model_type)}")
            case.broken.discard(side)
            checkpoint = Checkpoint(source.path)
            sources = find_sources(vlm.model, checkpoint)
            report.say(
                f"  weights: every one of {len(sources)} tensors is there, in its shape; "
                f"{' and '.join(checkpoint.dtypes())} in the files"
            )
    if "teacher" in case.sources and "student" not in case.broken:
        with report.attempt("teacher.placement"):
            if case.recipe.teacher and case.recipe.teacher.placement == "replica_int8":
                int8_quantizer()
        with report.attempt("recalibrator"):
            report.say(f"recalibrator: {describe_blocks(case.recipe)}")


def tokenizers(case: Case) -> None:
    """Show the vocabularies and templates that every sample goes through."""
    from genrecal_ds.models.chat import ChatEncoder
    from genrecal_ds.models.config_file import read_config
    from genrecal_ds.training.inputs import allow_code

    for side, source in case.sources.items():
        with case.report.attempt(f"{side}.path", ONE_RELEASE):
            allow_code(source)  # repeats a refusal of models(), in the same words
            encoder = ChatEncoder(source.path, source.max_length)
            case.encoders[side] = encoder
            vocabulary = encoder.tokenizer.get_vocab()
            rows = read_config(source.path).get_text_config().vocab_size
            end = encoder.tokenizer.convert_ids_to_tokens(encoder.end_of_turn)
            kind = type(encoder.tokenizer.backend_tokenizer.model).__name__
            case.report.say(f"{side}: {type(encoder.tokenizer).__name__}, fast {kind}")
            case.report.say(
                f"  {len(vocabulary):,} tokens, ids up to {max(vocabulary.values()):,}; "
                f"{rows:,} embedding rows"
            )
            case.report.say(f"  end of turn {end} (id {encoder.end_of_turn})")
            for line in encoder.template.described():
                case.report.say(f"  {line}")


def samples(case: Case) -> None:
    """Show what is taught on real samples, the samples' lengths, and why some are left out."""
    from genrecal_ds.analysis import samples as view
    from genrecal_ds.data.loader import PairEncoders

    report, index = case.report, case.indices.get(case.recipe.data.train)
    if index is None or case.encoders.keys() != case.sources.keys():
        report.say("skipped: needs data.train and every tokenizer")
        return
    student, teacher = case.encoders["student"], case.encoders.get("teacher")
    encoders = PairEncoders(student, teacher, case.recipe.data.too_long)
    looks = view.look_at(index, encoders, NUM_SAMPLES)
    for look in looks:
        report.say(look.name + (", truncated" if look.is_truncated else ""))
        if look.reason:
            report.say(f"  left out: {look.reason}")
        for side, chat in look.taught.items():
            shown = view.marked(chat, case.encoders[side], report.in_colour)
            report.say(Text(f"  {side}: ").append_text(shown))
    report.section(f"Lengths of these {len(looks)} samples")
    for side, encoder in case.encoders.items():
        lengths = [look.lengths[side] for look in looks if side in look.lengths]
        visual = [look.visual[side] for look in looks if side in look.visual]
        _lengths(report, side, np.array(lengths, int), np.array(visual, int), encoder.max_length)
    for reason, count in view.reasons(looks).most_common():
        report.say(f"left out: {count} of {len(looks)}: {reason}")
    for look in looks:
        if look.ends_the_run:
            report.refuse(
                f"data.too_long: error, and {look.name} is {look.reason}; raise max_length, or "
                "set drop or truncate_question"
            )
    if all(look.reason for look in looks):
        reason = view.reasons(looks).most_common(1)[0][0]
        report.refuse(f"data.train: none of {len(looks)} samples can be used: {reason}")


def _lengths(
    report: Findings, side: str, lengths: np.ndarray, visual: np.ndarray, max_length: int
) -> None:
    from genrecal_ds.analysis import samples as view

    report.say(f"{side}: {view.visual_tokens(visual)}; tokens of a sample:")
    for line in view.histogram(lengths, max_length):
        report.say(f"  {line}")


def all_lengths(case: Case) -> None:
    """Show the lengths of every sample if data.lengths is measured."""
    from genrecal_ds.data.lengths import load_table

    if case.recipe.data.lengths != "measured":
        case.report.say("not measured: data.lengths is estimated")
    elif case.encoders.keys() != case.sources.keys():
        case.report.say("skipped: needs every tokenizer")
    else:
        digests = {side: encoder.digest for side, encoder in case.encoders.items()}
        trained = {s.data or case.recipe.data.train for s in case.recipe.stages}
        for folder in sorted(trained & case.indices.keys()):
            with case.report.attempt("data.lengths"):
                table, _ = load_table(case.indices[folder], digests)
                case.report.say(f"{folder}: {len(table):,} samples")
                for side, encoder in case.encoders.items():
                    good = table[table[side] >= 0]
                    visual = good[f"{side}_visual"]
                    _lengths(case.report, side, good[side], visual, encoder.max_length)
                    if lost := len(table) - len(good):
                        case.report.say(f"  cannot be encoded: {lost:,}")


def stages(case: Case) -> None:
    """Show what trains in each stage, and what the stage starts from."""
    from genrecal_ds.estimate.describe import freeze_map

    for stage in case.recipe.stages:
        key = f"stages.{stage.name}"
        if not case.broken:
            with case.report.attempt(key):
                for line in freeze_map(case.recipe, stage):
                    case.report.say(line)
            _starts(case, stage)
    if case.broken:
        case.report.say(f"skipped: needs the {' and the '.join(sorted(case.broken))}")


def _starts(case: Case, stage: StageConfig) -> None:
    """Check the folders that a stage names; folders of earlier stages do not exist yet."""
    import torch

    from genrecal_ds.models.config_file import text_width
    from genrecal_ds.models.loading import Checkpoint, find_sources
    from genrecal_ds.models.recalibrator import check_recalibrator, unfilled
    from genrecal_ds.models.vlm import skeleton
    from genrecal_ds.training.weights import refuse_other_architecture

    key = f"stages.{stage.name}"
    if stage.student and not stage.student.startswith("stage:"):
        with case.report.attempt(f"{key}.student", ONE_RELEASE):
            refuse_other_architecture(stage.student, case.recipe.student.path)
            find_sources(skeleton(stage.student).model, Checkpoint(stage.student))
    folder = stage.recalibrator if stage.facts.has_recalibrator else None
    if folder and not folder.startswith("stage:"):
        assert case.recipe.teacher is not None  # a rule of config.Recipe
        with case.report.attempt(f"{key}.recalibrator", "name a stage's result"):
            width = text_width(case.recipe.teacher.path)
            with torch.device("meta"):
                text_config = skeleton(case.recipe.student.path).text_config
                module = unfilled(case.recipe.recalibrator, text_config, width)
            check_recalibrator(module, Path(folder))


def memory(case: Case) -> None:
    """Check that the ranks divide the batch and that each stage fits in memory."""
    from genrecal_ds.estimate.sizes import load_of

    report, cluster = case.report, case.cluster
    if cluster is None:
        report.say("skipped: needs the cluster")
        return
    report.say(cluster.described)
    report.say(f"an estimate: {NOT_COUNTED}")
    for stage in case.recipe.stages:
        with report.attempt(f"stage {stage.name}"):
            micro_steps = case.recipe.accumulation_steps(stage, cluster.gpus)
            report.say(f"stage {stage.name}: {micro_steps} micro-batches a step on each GPU")
        if case.broken:
            continue
        with report.attempt(f"stages.{stage.name}"):
            load = load_of(case.recipe, stage, cluster.gpus, cluster.per_host)
            _fit(report, stage.name, estimate(load), cluster)
    if case.broken:
        report.say(f"skipped: needs the {' and the '.join(sorted(case.broken))}")


def _fit(report: Findings, stage: str, demand: Estimate, cluster: Cluster) -> None:
    for part in demand.parts:
        place = part.place if part.place == "host" else f"gpu {part.phase}"
        report.say(f"  {part.name:<32} {part.bytes / GIB:>9.3f} GiB  {place:<12} {part.formula}")
    ranks = min(cluster.per_host, cluster.gpus)
    host = demand.host(ranks)
    report.say(f"  peak of a GPU {demand.gpu / GIB:.2f} of {cluster.gpu_bytes / GIB:.0f} GiB")
    known = f" of {cluster.host_bytes / GIB:.0f}" if cluster.host_bytes else ""
    report.say(f"  host of {ranks} ranks {host / GIB:.2f}{known} GiB")
    needs = {"gpu": (demand.gpu, cluster.gpu_bytes), "host": (host, cluster.host_bytes)}
    for place, (needed, there) in needs.items():
        if there and needed > there:
            part = demand.largest(place)
            report.refuse(
                f"stages.{stage}: a {place} needs {needed / GIB:.1f} of {there / GIB:.1f} GiB; "
                f"largest: {part.name}, {part.bytes / GIB:.1f} GiB per rank; {part.fix}"
            )


def data(case: Case) -> None:
    """Show every folder of shards; case.indices holds the folders that open_shards could read."""
    for key, folder in _folders(case.recipe).items():
        index = case.indices.get(folder)
        facts = "refused, see above"
        if index is not None:
            facts = f"{len(index):,} samples, {index.fingerprint}"
        case.report.say(f"{key}: {folder}: {facts}")


def open_shards(case: Case) -> None:
    from genrecal_ds.data.index import ShardIndex
    from genrecal_ds.training.inputs import store_of

    for key, folder in _folders(case.recipe).items():
        if folder not in case.indices:
            with case.report.attempt(key):
                case.indices[folder] = ShardIndex.load(store_of(folder, case.recipe))


def _folders(recipe: Recipe) -> dict[str, str]:
    named = {"data.train": recipe.data.train, "data.validation": recipe.data.validation}
    named |= {f"stages.{stage.name}.data": stage.data for stage in recipe.stages}
    return {key: folder for key, folder in named.items() if folder is not None}


def examine(recipe: Recipe, arguments: argparse.Namespace, report: Findings) -> None:
    """Run all sections in order; each prints what it can."""
    from genrecal_ds.dist import local_gpus

    case = Case(recipe, report)
    open_shards(case)
    with report.attempt("--hostfile"):
        stated = arguments.gpus, arguments.gpu_memory, arguments.hostfile
        case.cluster = cluster_of(*stated, local_gpus())
    marks = "answers green, boundary rows yellow"
    if not report.in_colour:
        marks = "answers in [[ ]], boundary rows in (( ))"
    titles = {
        "Models": models,
        "Tokenizers and templates": tokenizers,
        f"What is taught, on {NUM_SAMPLES} samples of data.train at most ({marks})": samples,
        "Lengths of all samples": all_lengths,
        "What trains": stages,
        "Memory": memory,
        "Data": data,
    }
    for title, section in titles.items():
        report.section(title)
        with report.attempt(title):
            section(case)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if the recipe will run, 2 if something was refused."""
    arguments = _parse(argv)
    report = Findings(Console())
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        examine(recipe, arguments, report)
    except UserError as error:
        report.refuse(str(error))
    report.section("Refusals" if report.refusals else "No refusals")
    for line in report.refusals:
        report.say(line, "red")
    return 2 if report.refusals else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("python -m genrecal_ds.doctor", __doc__)
    parser.add_argument("recipe", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", type=positive(int), metavar="N", help="ranks in all")
    parser.add_argument("--gpu-memory", type=positive(float), metavar="GIB", help="of one GPU")
    parser.add_argument("--hostfile", type=Path, metavar="HOSTS", help="`hostname slots=N` a line")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
