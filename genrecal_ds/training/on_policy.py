"""Replaces some of a step's given answers by answers that the student generates.

A generated answer is tokenised again for both models and taught by the teacher's distributions
alone. It may be wrong, so no cross entropy is trained on it (a rule of stage_config.StageConfig).
The draw depends on the recipe's seed, the step and the sample, not on ranks, so that a resumed run
draws the same answers.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch

from genrecal_ds.data.batch import PairBatch
from genrecal_ds.data.loader import PairDataset
from genrecal_ds.data.pair import Messages, Pair, Unusable
from genrecal_ds.data.reader import Sample
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.vlm import VLM
from genrecal_ds.recipe.stage_config import OnPolicyConfig
from genrecal_ds.training.decoding import decode, drawn


@dataclass(frozen=True)
class OnPolicy:
    """A collective that generates answers. dataset: the stage's training data, with a teacher."""

    dataset: PairDataset
    config: OnPolicyConfig
    seed: int

    def __call__(self, student: VLM, step: int, micro: list[PairBatch]) -> list[PairBatch]:
        """Return the step's micro-batches with generated answers. A collective: every rank decodes
        once for each micro-batch, even if no sample of the micro-batch was chosen."""
        return [self._one(student, step, batch) for batch in micro]

    def _one(self, student: VLM, step: int, batch: PairBatch) -> PairBatch:
        samples = [
            s for s in self.dataset.reader.read_many(batch.used_ids) if isinstance(s, Sample)
        ]
        given = [self._given(*of) for of in zip(samples, batch.used_ids, strict=True)]
        entropies = [[self.seed, step, number] for number in batch.used_ids]
        is_chosen = [
            np.random.default_rng(e).random() < self.config.share and self._has_room(pairs[-1])
            for e, pairs in zip(entropies, given, strict=True)
        ]
        chosen = [s for s, mine in zip(samples, is_chosen, strict=True) if mine]
        generators = [
            torch.Generator().manual_seed(int(np.random.default_rng([*e, 1]).integers(2**62)))
            for e, mine in zip(entropies, is_chosen, strict=True)
            if mine
        ]
        texts = iter(decode(
            student, self.dataset.encoders, chosen, self.config.max_new_tokens,
            drawn(self.config.temperature, generators, self._encoder),
        ))  # fmt: skip
        if not chosen:
            return batch
        answered = [
            self._answered(sample, number, next(texts), pairs) if mine else pairs
            for sample, number, mine, pairs in zip(
                samples, batch.used_ids, is_chosen, given, strict=True
            )
        ]
        new = self.dataset.collate([pair for pairs in answered for pair in pairs])
        kept = (
            "num_samples", "sample_ids", "used_ids", "unusable_ids", "unusable", "unusable_keys",
            "unreadable",
        )  # fmt: skip
        return new._replace(
            turns_of=tuple(sum(len(p.student.answers) for p in pairs) for pairs in answered),
            **{name: getattr(batch, name) for name in kept},
        )

    @property
    def _encoder(self) -> ChatEncoder:
        encoder = self.dataset.encoders.student
        assert isinstance(encoder, ChatEncoder)
        return encoder

    def _given(self, sample: Sample, number: int) -> list[Pair]:
        return self.dataset.encoders.encode(sample.messages, sample.images, number)

    def _has_room(self, pair: Pair) -> bool:
        """True if a whole answer fits after the whole question; False for a cut conversation."""
        start, _ = pair.student.answers[-1]
        return not pair.is_truncated and (
            start + self.config.max_new_tokens <= self._encoder.max_length
        )

    def _answered(self, sample: Sample, number: int, text: str, given: list[Pair]) -> list[Pair]:
        """Encode the sample with `text` as its last answer; return `given` if that is unusable."""
        messages = _with_answer(sample.messages, text)
        try:
            return self.dataset.encoders.encode(messages, sample.images, number)
        except Unusable:
            return given


def _with_answer(messages: Messages, text: str) -> Messages:
    answered = copy.copy(messages)
    answered[-1] = {**messages[-1], "content": [{"type": "text", "text": text.strip()}]}
    return answered
