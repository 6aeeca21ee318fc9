"""Defines one stage of a recipe: its keys and their rules; config.py has the whole tree."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from genrecal_ds.recipe.kinds import KINDS, Component, Kind


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"no kind of stage; there are {', '.join(KINDS)}")
    return kind


Regularizer = Literal["none", "ce", "kl", "ce+kl", "mse"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LossConfig(Section):
    """Weights of the terms; 0 switches a term off (the paper's ablations)."""

    ar: float = Field(1.0, ge=0)  # L_ar, cross entropy through the teacher's head
    kl: float = Field(1.0, ge=0)  # L_kl, forward KL through the teacher's head
    regularizer: Regularizer = "ce+kl"  # form of the regular pass of stage 1 (Algorithm 2)
    boundary: bool = True  # false: the teacher's terms leave out each turn's first loss row
    student_ce: float = Field(1.0, ge=0)
    first_token_ce: float = Field(0.0, ge=0)  # extra CE weight on each turn's first answer token
    # logit_kd reads these three, the mix only for skew_kl and jsd (objectives/logit_kd.py)
    divergence: Literal["forward_kl", "reverse_kl", "skew_kl", "jsd"] = "forward_kl"
    divergence_mix: float = Field(0.1, gt=0, lt=1)
    temperature: float = Field(1.0, gt=0)


class OnPolicyConfig(Section):
    """Answers that the student generates in training and the teacher comments on. The paper has
    no such answers."""

    share: float = Field(0.0, ge=0, le=1)  # share of conversations with a generated last answer
    max_new_tokens: int = Field(64, gt=0)
    temperature: float = Field(1.0, gt=0)


class StageConfig(Section):
    """One stage. `student` starts it: a folder, or `stage:NAME` for an earlier stage's export."""

    kind: Annotated[str, AfterValidator(_known)]
    name: str = ""
    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    student: str | None = None  # default: the stage before, else the recipe's student
    recalibrator: str | None = None  # default: the latest stage before that trained one
    train: tuple[Component, ...] | None = None  # default: recipe/kinds.py
    losses: LossConfig = LossConfig()
    on_policy: OnPolicyConfig = OnPolicyConfig()
    lr: float | None = Field(None, gt=0)
    final_lr: float | None = Field(None, ge=0)
    global_batch: int | None = Field(None, gt=0)
    micro_batch: int | None = Field(None, gt=0)
    data: str | None = None  # other shards than data.train (the paper's stage 3)
    seed: int | None = None  # for the sample order; default: the recipe's seed

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
        if self.train is not None and not self.facts.trains_student:
            raise ValueError(f"train: {self.kind} trains the Recalibrator only; use kind distill")
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(
                f"name {self.name!r}: letters, digits, - and _ only (it names a folder)"
            )
        self._refuse_terms()
        return self

    def _refuse_terms(self) -> None:
        losses, facts = self.losses, self.facts
        if facts.has_recalibrator and losses.ar == losses.kl == 0:
            raise ValueError("losses.ar and losses.kl are both 0: nothing teaches the Recalibrator")
        if not facts.has_teacher and losses.student_ce == 0:
            raise ValueError("losses.student_ce is 0: this stage has no other term")
        if self.on_policy.share:
            if not facts.takes_own_answers:
                kinds = " and ".join(k for k, facts in KINDS.items() if facts.takes_own_answers)
                raise ValueError(f"on_policy: only for {kinds}; this stage is {self.kind}")
            if losses.student_ce or (facts.has_recalibrator and losses.ar):
                raise ValueError(
                    "on_policy: the student's own answer may be wrong, so no cross entropy is "
                    "trained on it; set losses.student_ce and losses.ar to 0"
                )

    @property
    def facts(self) -> Kind:
        return KINDS[self.kind]

    @property
    def has_regular(self) -> bool:
        """True if the Recalibrator also runs the regular pass."""
        return self.facts.has_regular and self.losses.regularizer != "none"

    @property
    def trained_components(self) -> tuple[Component, ...]:
        """List the student's components that train."""
        return self.facts.trains if self.train is None else self.train
