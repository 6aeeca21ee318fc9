"""One stage of a recipe: its keys and what they ask for; config.py has the whole tree."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Component = Literal["vision", "projector", "embeddings", "layers", "norm", "head"]
# The stages of the method; then baselines with a teacher, each a file of objectives/.
StageKind = Literal[
    "pretrain", "align", "distill", "sft", "uld", "logit_kd", "mot", "dskd", "byte_kd"
]
Regularizer = Literal["none", "ce", "kl", "ce+kl", "mse"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LossConfig(Section):
    """Weights of the terms; 0 switches a term off (the paper's ablations)."""

    ar: float = Field(1.0, ge=0)  # L_ar, cross entropy through the teacher's head
    kl: float = Field(1.0, ge=0)  # L_kl, forward KL through the teacher's head
    regularizer: Regularizer = "ce+kl"  # form of the regular pass of stage 1 (Algorithm 2)
    boundary: bool = True  # false: the teacher's terms leave out each turn's first loss row
    boundary_weight: float = Field(1.0, ge=1)  # of each turn's first loss row in the first pass
    student_ce: float = Field(1.0, ge=0)
    first_token_ce: float = Field(0.0, ge=0)  # extra CE weight on each turn's first answer token
    # of logit_kd; mix is read by skew_kl and jsd (objectives/logit_kd.py)
    divergence: Literal["forward_kl", "reverse_kl", "skew_kl", "jsd"] = "forward_kl"
    divergence_mix: float = Field(0.1, gt=0, lt=1)
    temperature: float = Field(1.0, gt=0)


class AnswersConfig(Section):
    """What the Recalibrator reads in the place of the answer; all but the default is not the
    paper's (docs/method.md, "Beyond the paper")."""

    # teacher: its rows z_al, the paper; student: its own answer rows, at the teacher's token ends;
    # both: a pass with each
    rows: Literal["teacher", "student", "both"] = "teacher"
    embeddings: float = Field(0.0, ge=0, le=1)  # share of conversations: token embeddings for z_al
    masked: float = Field(0.0, ge=0, lt=1)  # share of z_al that is zeroed, in spans
    noise: float = Field(0.0, ge=0)  # Gaussian on z_al, its standard deviation in units of a row's


class OnPolicyConfig(Section):
    """Answers that the student gives itself in training, for the teacher to comment. Not the
    paper's."""

    share: float = Field(0.0, ge=0, le=1)  # of conversations, whose last answer it gives
    max_new_tokens: int = Field(64, gt=0)
    temperature: float = Field(1.0, gt=0)


class StageConfig(Section):
    """One stage. `student` starts it: a folder, or `stage:NAME` for an earlier stage's export."""

    kind: StageKind
    name: str = ""
    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    student: str | None = None  # default: the stage before, else the recipe's student
    recalibrator: str | None = None  # default: the latest stage before that trained one
    train: tuple[Component, ...] | None = None  # default: training/stages.py
    losses: LossConfig = LossConfig()
    answers: AnswersConfig = AnswersConfig()
    on_policy: OnPolicyConfig = OnPolicyConfig()
    lr: float | None = Field(None, gt=0)
    final_lr: float | None = Field(None, ge=0)
    global_batch: int | None = Field(None, gt=0)
    micro_batch: int | None = Field(None, gt=0)
    data: str | None = None  # other shards than data.train (the paper's stage 3)
    seed: int | None = None  # of the sample order; default: the recipe's seed

    @model_validator(mode="before")
    @classmethod
    def _name_defaults_to_kind(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("name"):
            values = {**values, "name": values.get("kind", "")}
        return values

    @model_validator(mode="after")
    def _one_length(self) -> "StageConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(
                f"name {self.name!r}: letters, digits, - and _ only (it names a folder)"
            )
        losses = self.losses
        if self.kind in ("align", "distill") and losses.ar == losses.kl == 0:
            raise ValueError("losses.ar and losses.kl are both 0: nothing teaches the Recalibrator")
        if self.kind in ("pretrain", "sft") and losses.student_ce == 0:
            raise ValueError("losses.student_ce is 0: this stage has no other term")
        if self.answers != AnswersConfig() and not self.has_recalibrator:
            raise ValueError(f"answers: read by align and distill; {self.kind} has no Recalibrator")
        if self.on_policy.share:
            if self.kind not in ("distill", "byte_kd"):
                raise ValueError(f"on_policy: of distill and byte_kd; this stage is {self.kind}")
            if losses.student_ce or (self.kind == "distill" and losses.ar):
                raise ValueError(
                    "on_policy: an answer of the student's own is no truth; set losses.student_ce "
                    "and losses.ar to 0"
                )
        return self

    @property
    def has_recalibrator(self) -> bool:
        return self.kind in ("align", "distill")

    @property
    def needs_logits(self) -> bool:
        """Of the teacher, as numbers; a baseline that compares distributions."""
        return self.kind in ("uld", "logit_kd", "mot", "byte_kd")

    @property
    def needs_alignment(self) -> bool:
        """Of both tokenizations, by bytes."""
        return self.kind == "byte_kd" or self.answers.rows != "teacher"

    @property
    def needs_teacher(self) -> bool:
        return self.has_recalibrator or self.needs_logits or self.kind == "dskd"

    @property
    def takes_several_teachers(self) -> bool:
        return self.has_recalibrator or self.kind == "byte_kd" or not self.needs_teacher
