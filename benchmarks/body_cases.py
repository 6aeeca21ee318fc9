"""token_align and the Recalibrator beside what one would write without them.

Shapes: B conversations, S student length, D student width, H teacher width, A teacher rows,
P packed rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from benchmarks.race import Contestants
from genrecal_ds.data.batch import PairBatch, collate, to_device
from genrecal_ds.data.pair import EncodedChat, Pair
from genrecal_ds.models.recalibrator import Recalibrator
from genrecal_ds.ops.token_align import token_align

RULES = ({"pixels": "rows"}, {"pixels": "rows"})


def batch_of(lengths: list[tuple[int, int]]) -> PairBatch:
    """One turn a conversation, of (question, answer) tokens on both sides; mixed pass only."""

    def chat(question: int, answer: int) -> EncodedChat:
        ids = torch.ones(question + answer, dtype=torch.int64)
        pixels = {"pixels": torch.ones(1, 2)}
        return EncodedChat(ids, ((question, question + answer),), {}, pixels)

    pairs = [Pair(chat(*turn), chat(*turn)) for turn in lengths]
    return collate(pairs, pairs[0], RULES, with_regular=False)


class BodyNumbers:
    """Hidden states and a layout whose sequences fill a padded batch to about `fill`."""

    def __init__(
        self, num_answers: int, question_share: float, fill: float, width: int,
        teacher_width: int, dtype: torch.dtype, answer: int = 150,
    ):  # fmt: skip
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        mean = round(answer / (1 - question_share))
        longest = round(mean / fill)
        shortest = max(answer + 1, 2 * mean - longest)  # half short, half long: the mean stays
        ends = (shortest, longest)
        lengths = [(ends[b % 2] - answer, answer) for b in range(max(2, num_answers // answer))]
        batch = batch_of(lengths)
        assert batch.teacher is not None
        self.layout = to_device(batch.teacher.layout, self.device)
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device).to(dtype)

        self.student = normal(*batch.student.inputs.input_ids.shape, width)
        self.teacher = normal(len(batch.teacher.rows_A), teacher_width)
        self.weight = normal(width, teacher_width) / teacher_width**0.5
        self.fill = len(self.layout.source_P) / self.layout.num_sequences / (
            self.layout.max_seqlen
        )  # fmt: skip


def align_cases(numbers: BodyNumbers) -> Contestants:
    """Forward and backward to dq and dW."""
    layout = numbers.layout

    def run(forward: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        shape = forward(numbers.student, numbers.weight).shape
        gradient = torch.ones(shape, device=numbers.device, dtype=numbers.student.dtype)

        def step() -> None:
            student = numbers.student.detach().requires_grad_()
            weight = numbers.weight.detach().requires_grad_()
            out = forward(student, weight)
            out.backward(gradient)

        return step

    def op(impl: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda student, weight: token_align(
            student, numbers.teacher, weight, layout.source_P, layout.uses_RU, impl=impl
        )

    def padded(student: Tensor, weight: Tensor) -> Tensor:
        """As a padded batch: project, then write both sides into [C, L, D]."""
        packed = op("reference")(student, weight)
        slots = layout.sequence_P * layout.max_seqlen + layout.position_ids_P
        flat = packed.new_zeros(layout.num_sequences * layout.max_seqlen, packed.shape[1])
        return flat.index_copy(0, slots, packed)

    def floor() -> None:
        projected = torch.mm(numbers.teacher, numbers.weight.t())
        torch.mm(projected.t(), numbers.teacher)

    return {
        "two bare GEMMs": floor,
        "ours": run(op("auto")),
        "torch: Linear, cat, index_select": run(op("reference")),
        "torch: padded batch": run(padded),
    }


def recalibrator_cases(numbers: BodyNumbers, config: dict, attention: str) -> Contestants:
    """Forward and backward to the student's rows and every parameter."""

    def build(blocks: Any, backend: Any) -> Callable[[], None]:
        text_config = AutoConfig.for_model("qwen2", **config)
        width = numbers.teacher.shape[1]
        module = Recalibrator(
            text_config, width, dtype=numbers.student.dtype, blocks=blocks, attention=backend
        ).to(numbers.device)
        module.initialize(0.02, None)

        def step() -> None:
            student = numbers.student.detach().requires_grad_()
            module.zero_grad(set_to_none=True)
            module(student, numbers.teacher, numbers.layout).float().sum().backward()

        return step

    cases = {
        "transformers, padded": build("transformers", "sdpa"),
        "ours, packed, sdpa": build("packed", "sdpa"),
    }
    if attention != "sdpa":
        cases[f"ours, packed, {attention}"] = build("packed", attention)
    return cases
