"""Generates a plain Hugging Face model's greedy answers to the last turn of every sample.

Shapes: B prompts of one batch, T longest prompt.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from genrecal_ds.data.batch import collate_vision
from genrecal_ds.data.pair import Messages
from genrecal_ds.data.reader import Sample
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.vlm import plain_model

disable_progress_bar()  # of loading weights: ours is the one that shows progress


@dataclass
class Generator:
    """Answers with a model folder, by the folder's own generation settings."""

    folder: Path
    max_new_tokens: int = 32
    instruction: str = ""  # a line of its own behind every question
    max_length: int = 1 << 20  # prompts are never cut

    def __post_init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = ChatEncoder(self.folder, self.max_length)
        self.model = plain_model(self.folder)
        self.model.to(self.device).eval()

    def answers(self, samples: Sequence[Sample], batch_size: int) -> Iterator[list[str]]:
        """The generated texts of each batch, in order."""
        for start in range(0, len(samples), batch_size):
            yield self._answer(samples[start : start + batch_size])

    @torch.no_grad()
    def _answer(self, samples: Sequence[Sample]) -> list[str]:
        prompts = [
            self.encoder.prompt(instructed(s.messages[:-1], self.instruction), s.images)
            for s in samples
        ]
        inputs = left_pad(prompts, self.encoder)
        inputs = {key: value.to(self.device) for key, value in inputs.items()}
        tokens = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(self.encoder.stops),
            pad_token_id=self.encoder.end_of_turn,
        )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return self.encoder.tokenizer.batch_decode(new, skip_special_tokens=True)


def instructed(messages: Messages, instruction: str) -> Messages:
    """Return the turns with a line added to the last turn."""
    if not instruction:
        return messages
    last = copy.deepcopy(messages[-1])
    last["content"].append({"type": "text", "text": "\n" + instruction})
    return [*messages[:-1], last]


def left_pad(prompts: Sequence[dict[str, Tensor]], encoder: ChatEncoder) -> dict[str, Tensor]:
    """Pad prompts on the left, so that all end in the column where generation goes on."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch: dict[str, Tensor] = {}
    fills = {"input_ids": encoder.end_of_turn, "attention_mask": 0}
    fills.update(dict.fromkeys(encoder.per_token, 0))
    for key, fill in fills.items():
        rows = []
        for prompt in prompts:
            row = prompt[key] if key in prompt else torch.ones_like(prompt["input_ids"])
            rows.append(torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=fill))
        batch[key] = torch.cat(rows)
    return batch | collate_vision(prompts, encoder.vision_rules)
