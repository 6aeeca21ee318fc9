"""Defines the recipe: its tree of keys and the rules between them; recipe_file.py reads one.

A renamed key is an unknown key; the error names the nearest valid key. Every number has one
owner: batch sizes, learning rates and precision live here, never in ds_configs/*.json.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from genrecal_ds.errors import UserError
from genrecal_ds.recipe.kinds import Component
from genrecal_ds.recipe.stage_config import Section, StageConfig

# Where the teacher's body lies. zero3: a share per rank, gathered layer by layer. zero3_host: each
# host holds all shares, so gathering stays inside a host (hpZ without its first copy).
# zero3_offload: shares in host memory. replica: whole on every rank, for teachers that fit.
# replica_int8: a replica with the decoder's weights in 8 bits (torchao).
Placement = Literal["zero3", "zero3_host", "zero3_offload", "replica", "replica_int8"]


class RemoteCode(Section):
    """Permission to run Python files of a model folder, and facts about a family not known here.

    components and vision_inputs mean the same as in models/families.py.
    """

    files: dict[str, str]  # every .py of the folder: its sha256
    components: dict[str, Component]
    vision_inputs: dict[
        str, Literal["rows", "tokens", "tiles", "canvas", "columns", "patches"]
    ] = {}


class ModelSource(Section):
    """A Hugging Face folder: config, safetensors, tokenizer, processor, chat template."""

    path: Path
    max_length: int = Field(2048, gt=0)  # tokens, images included; longer: whole turns dropped
    # a micro-batch's samples as one sequence; default: true if the family's attention is plain
    pack: bool | None = None
    # the body's attention, by transformers' names; default: transformers' choice for the family
    attention: Literal["eager", "sdpa", "flex_attention", "flash_attention_2"] | None = None
    allow_remote_code: RemoteCode | None = None  # off: no code of a folder is ever run


class TeacherSource(ModelSource):
    placement: Placement = "zero3"
    compile: bool = False  # torch.compile of the decoder blocks
    # micro-batches of one forward: fewer gathers of weights, more memory for activations
    forward_batches: int = Field(1, gt=0)
    # a folder for the teacher's rows: align writes them, distill reads them and runs no teacher
    cache: Path | None = None
    cache_rows: Literal["exact", "int8"] = "exact"  # int8: half of bf16's bytes, rounded

    @model_validator(mode="after")
    def _keys_agree(self) -> "TeacherSource":
        if self.compile and self.is_sharded:
            raise ValueError("compile: true needs placement: replica or replica_int8")
        return self

    @property
    def is_sharded(self) -> bool:
        return self.placement.startswith("zero3")


class LoraConfig(Section):
    """Low-rank adapters that train in place of the student's decoder layers; merged on export."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(32, gt=0)  # the change is alpha / rank * B A
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ()  # last names of linear layers, such as q_proj; () = all


class StudentSource(ModelSource):
    gradient_checkpointing: bool = False  # backward computes the blocks again
    lora: LoraConfig | None = None


class CacheConfig(Section):
    """Copies of shards on this node's own disk, shared by its ranks and by runs."""

    dir: Path
    max_gib: float = Field(500, gt=0)  # the least recently used shards go first


class DataConfig(Section):
    """Folders made by data_tools.build: local paths, or URLs of a scheme listed in `remote`."""

    train: str
    validation: str | None = None
    num_workers: int = Field(0, ge=0)  # DataLoader workers per rank
    lengths: Literal["estimated", "measured"] = "estimated"  # measured: data_tools.tokens
    # Global batches that are sorted by length together. Above 1 batches pad less, but they are no
    # random samples: if length depends on content, learning suffers (docs/log.md).
    length_window: int = Field(1, gt=0)
    too_long: Literal["drop", "error", "truncate_question"] = "drop"
    max_unreadable: float = Field(0.001, ge=0, le=1)  # share of damaged samples that ends the run
    cache: CacheConfig | None = None
    remote: tuple[Literal["s3", "gs", "hf", "file"], ...] = ()


class BatchConfig(Section):
    global_batch: int = Field(gt=0)  # samples of one optimizer step over all ranks
    micro_batch: int = Field(gt=0)  # samples of one forward on one rank


class RecalibratorConfig(Section):
    depth: int = Field(2, gt=0)  # decoder blocks of the Rec-body
    # packed: no padding, the last block on loss rows alone; auto: packed if the family has blocks
    blocks: Literal["auto", "packed", "transformers"] = "auto"
    attention: Literal["sdpa", "varlen", "flash"] = "sdpa"  # for packed blocks; never falls back
    # new: the paper's NPE, 0..n-1 over the joined sequence; own: each row keeps the position of
    # its token in the sequence of its own model (the paper's ablation)
    positions: Literal["new", "own"] = "new"

    @model_validator(mode="after")
    def _attention_is_of_packed_blocks(self) -> "RecalibratorConfig":
        if self.attention != "sdpa" and self.blocks == "transformers":
            raise ValueError(f"attention: {self.attention} needs blocks: packed")
        return self


class OptimizerConfig(Section):
    lr: float = Field(1e-4, gt=0)
    final_lr: float = Field(1e-5, ge=0)  # linear decay from lr, no warm-up
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)  # never on norms and biases
    clip: float = Field(1.0, ge=0)  # global gradient norm; 0 = off


class DeepSpeedConfig(Section):
    """Names of files in ds_configs/ (without .json), or paths to your own."""

    student: str = "student_zero3"
    teacher: str | None = None  # default: by teacher.placement


class LogConfig(Section):
    every: int = Field(1, gt=0)  # steps per jsonl line
    probes_every: int = Field(0, ge=0)  # what each class of rows learns, and from where; 0 = off
    validate_every: int = Field(0, ge=0)  # validation loss; 0 = only at the end of a stage
    validation_samples: int = Field(256, gt=0)
    evaluate_every: int = Field(0, ge=0)  # scores of answers to data.validation; 0 = off
    evaluation_samples: int = Field(64, gt=0)
    evaluation_tokens: int = Field(32, gt=0)  # the longest answer
    tensorboard: bool = False
    wandb: str | None = None  # the project's name


class CheckpointConfig(Section):
    every: int = Field(0, ge=0)  # steps; 0 = only when stopped, and the stage's result
    keep: int = Field(2, gt=0)  # how many of the newest stay
    keep_every: int = Field(0, ge=0)  # checkpoints of multiples of so many steps stay too; 0 = none
    trust: bool = False  # load files that others own or may write; a checkpoint is code


class FaultConfig(Section):
    """When a step counts as a fault, and when faults end a run."""

    max_skipped: int = Field(10, gt=0)  # steps in a row without a finite gradient
    spike_sigmas: float = Field(6.0, ge=0)  # loss or gradient norm this far up is noted; 0 = off
    stall_seconds: float = Field(1800, ge=0)  # without progress; 0 = wait for ever


class Recipe(Section):
    """The whole run. See docs/configuration.md for every key."""

    run_dir: Path
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    deterministic: bool = False  # torch.use_deterministic_algorithms
    # auto: the newest whole checkpoint. latest: what the file latest names, or an error. step-N:
    # that one. new_data: a checkpoint's weights, and a new epoch of changed shards or order
    resume: str = Field("auto", pattern=r"^(auto|latest|never|new_data|step-\d{8})$")
    profile: str | None = Field(None, pattern=r"^\d+:\d+$")  # steps a:b of the first stage run
    teacher: TeacherSource | None = None
    student: StudentSource
    data: DataConfig
    batch: BatchConfig
    recalibrator: RecalibratorConfig = RecalibratorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()
    stages: tuple[StageConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _cross_field_rules(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        if duplicates := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"stages: duplicate name {sorted(duplicates)}; give each a name")
        for position, stage in enumerate(self.stages):
            if stage.facts.has_teacher and self.teacher is None:
                raise ValueError(f"stages.{stage.name}: kind {stage.kind} needs teacher.path")
            for key in ("student", "recalibrator"):
                source = getattr(stage, key)
                if source and source.startswith("stage:") and source[6:] not in names[:position]:
                    raise ValueError(
                        f"stages.{stage.name}.{key}: {source} is not an earlier stage; "
                        f"earlier: {names[:position]}"
                    )
        if self.teacher and self.teacher.cache and self.data.too_long == "truncate_question":
            raise ValueError(
                "teacher.cache: truncate_question cuts by the student's tokens, and a cache serves "
                "any student; set data.too_long to drop or error"
            )
        if self.teacher and self.teacher.cache and self.recalibrator.positions == "own":
            raise ValueError(
                "teacher.cache: holds no question, so recalibrator.positions must be new"
            )
        own = [stage.name for stage in self.stages if stage.on_policy.share]
        if own and self.teacher and self.teacher.cache:
            raise ValueError(
                f"stages.{own[0]}.on_policy: a cache holds rows of given answers; leave out "
                "teacher.cache"
            )
        if self.teacher and self.teacher.path.resolve() == self.student.path.resolve():
            raise ValueError("teacher.path and student.path are the same folder; name two models")
        if self.log.evaluate_every and not self.data.validation:
            raise ValueError("log.evaluate_every: needs data.validation, shards to answer")
        if self.profile:
            first, last = map(int, self.profile.split(":"))
            if first >= last:
                raise ValueError("profile: a:b needs a < b")
        return self

    def micro_batch(self, stage: StageConfig) -> int:
        return stage.micro_batch or self.batch.micro_batch

    def global_batch(self, stage: StageConfig) -> int:
        return stage.global_batch or self.batch.global_batch

    def accumulation_steps(self, stage: StageConfig, world_size: int) -> int:
        """Return the micro-steps of one optimizer step on each rank.

        Raises UserError, listing the sizes that work, if the global batch does not divide.
        """
        micro, total = self.micro_batch(stage), self.global_batch(stage)
        unit = micro * world_size
        if total % unit:
            below = total // unit * unit
            sizes = sorted({size for size in (below, below + unit, below + 2 * unit) if size > 0})
            raise UserError(
                f"stage {stage.name}: batch.global_batch {total} is not a multiple of micro_batch "
                f"{micro} x {world_size} ranks; sizes that are: {', '.join(map(str, sizes))}, ..."
            )
        return total // unit

    @property
    def teacher_ds_config(self) -> str:
        """Name the teacher's file of ds_configs/."""
        assert self.teacher is not None
        offload = "_offload" if self.teacher.placement == "zero3_offload" else ""
        return self.deepspeed.teacher or f"teacher_zero3{offload}"

    def reads_cache(self, stage: StageConfig) -> bool:
        """True if the stage reads the teacher's rows from disk."""
        return (
            self.teacher is not None and self.teacher.cache is not None and stage.facts.reads_cache
        )

    def student_source(self, stage: StageConfig) -> str:
        """Return the folder, or stage:NAME, that the stage's student is loaded from."""
        if stage.student:
            return stage.student
        position = self.stages.index(stage)
        return f"stage:{self.stages[position - 1].name}" if position else str(self.student.path)

    def recalibrator_source(self, stage: StageConfig) -> str | None:
        """Return the folder, or stage:NAME, of the Recalibrator to load; None = a fresh one."""
        if stage.recalibrator or not stage.facts.has_recalibrator:
            return stage.recalibrator
        earlier = [s for s in self.stages[: self.stages.index(stage)] if s.facts.has_recalibrator]
        return f"stage:{earlier[-1].name}" if earlier else None
