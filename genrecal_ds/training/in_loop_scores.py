"""Scores the student's own greedy answers on a few held-out samples while it trains."""

from dataclasses import dataclass

from genrecal_ds import dist
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.reader import BadSample, Sample, ShardReader
from genrecal_ds.errors import UserError
from genrecal_ds.evaluate.metrics import METRICS, metric_of
from genrecal_ds.models.vlm import VLM
from genrecal_ds.training.decoding import decode, likeliest


@dataclass(frozen=True)
class InLoopScores:
    """A collective between steps that gives {"evaluation/overall": score, "evaluation/KIND": ..}.

    reader: reads shards with answers. num_samples: how many, from the first, the ranks share.
    """

    encoders: PairEncoders  # for the student alone
    reader: ShardReader
    num_samples: int
    batch_size: int
    max_new_tokens: int

    def __call__(self, student: VLM) -> dict[str, float]:
        numbers = range(min(self.num_samples, len(self.reader)))
        own = list(numbers[dist.rank() :: dist.world_size()])
        rounds = -(-len(numbers) // (self.batch_size * dist.world_size()))
        own_scores: list[tuple[str, float]] = []
        for first in range(0, rounds * self.batch_size, self.batch_size):
            samples = [self.reader.read(n) for n in own[first : first + self.batch_size]]
            texts = decode(student, self.encoders, samples, self.max_new_tokens, likeliest)
            own_scores += [
                (s.kind, self._score(s, text)) for s, text in zip(samples, texts, strict=True)
            ]
        everywhere = [pair for part in dist.gather_objects(own_scores) for pair in part]
        kinds = {"overall": [score for _, score in everywhere]}
        for kind, score in everywhere:
            kinds.setdefault(kind, []).append(score)
        return {f"evaluation/{kind}": sum(of) / len(of) for kind, of in sorted(kinds.items()) if of}

    def refuse(self) -> None:
        """Raise UserError, before any training, for a sample that cannot be scored."""
        for number in range(min(self.num_samples, len(self.reader))):
            try:
                sample = self.reader.read(number)
            except BadSample as error:  # later, it would end one rank and leave the others waiting
                raise UserError(f"log.evaluate_every: data.validation: {error}") from None
            if not sample.answers:
                raise UserError(
                    f"log.evaluate_every: sample {sample.key} of data.validation has no answers to "
                    "score against; build shards with them, or set it to 0"
                )
            self._score(sample, "")

    def _score(self, sample: Sample, text: str) -> float:
        return float(METRICS[metric_of(sample.kind)](text, sample.answers))
