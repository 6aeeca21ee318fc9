"""Lists the kinds of stages: what a kind trains, needs and costs, and which module builds it.

A new objective is one file in genrecal_ds/objectives/ and one entry here. The rest of the program
asks the entry and never compares a kind's name, so this table is the only place that knows all
kinds. It imports no torch: a recipe is refused before torch is loaded.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Component = Literal["vision", "projector", "embeddings", "layers", "norm", "head"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
ALL_BUT_VISION = COMPONENTS[1:]
_OBJECTIVES = "genrecal_ds.objectives."


@dataclass(frozen=True)
class Kind:
    """Facts about a kind. Every fact holds for all recipes; weights of losses do not matter here.

    Every kind with a Recalibrator has the mixed pass. A `has_regular` kind also has the regular
    pass of Algorithm 2 while losses.regularizer is not none.
    """

    objective: str  # a module; its function build(Ingredients) returns the objective
    trains: tuple[Component, ...] = ALL_BUT_VISION  # student's parts, unless `train` is set
    has_teacher: bool = True
    has_recalibrator: bool = False
    has_regular: bool = False
    matches_bytes: bool = False  # batches say where both tokenisations share a byte boundary
    needs_one_tokenizer: bool = False  # compares the probabilities of equal ids
    takes_own_answers: bool = False  # on_policy may replace answers, as some term reads no label
    projects: bool = False  # a linear map [H, D] trains beside the student
    # How many matrices of a chunk's logits' size a distance at the student's head holds at once;
    # 0: no such distance. tests/unit/objectives/test_student_kd_memory.py measures it.
    head_matrices: int = 0
    takes_whole_conversations: bool = False  # a chunk of the distance is a whole conversation

    @property
    def trains_student(self) -> bool:
        return bool(self.trains)

    @property
    def has_distance_at_own_head(self) -> bool:
        return self.head_matrices > 0

    @property
    def reads_cache(self) -> bool:
        """True if the teacher's answer rows on disk are enough. The regular pass also reads
        question rows, which no cache holds."""
        return self.has_teacher and not self.has_regular


KINDS: dict[str, Kind] = {
    "pretrain": Kind(_OBJECTIVES + "supervised", COMPONENTS, has_teacher=False),
    "align": Kind(_OBJECTIVES + "genrecal", (), has_recalibrator=True, has_regular=True),
    # Input embeddings and head stay as they are, so that tied and untied students behave alike;
    # gradients flow through the frozen head.
    "distill": Kind(
        _OBJECTIVES + "genrecal", ("layers", "norm"), has_recalibrator=True, takes_own_answers=True
    ),
    "sft": Kind(_OBJECTIVES + "supervised", has_teacher=False),
    # ULD holds 10 and the GPU's memory for sorting, JSD 11; a softcapped head 2 more.
    "uld": Kind(_OBJECTIVES + "uld", head_matrices=16),
    "logit_kd": Kind(_OBJECTIVES + "logit_kd", needs_one_tokenizer=True, head_matrices=16),
    # MOT holds 6.1, and 2 of a softcapped head.
    "mot": Kind(_OBJECTIVES + "mot", head_matrices=9, takes_whole_conversations=True),
    "dskd": Kind(_OBJECTIVES + "dskd", projects=True),
    # The next-byte KL holds 6, and 2 of a softcapped head.
    "byte_kd": Kind(
        _OBJECTIVES + "byte_kd", matches_bytes=True, takes_own_answers=True, head_matrices=9
    ),
}
