"""Scores of the student's own answers while it trains: greedy, on a few held-out samples.

Every step of decoding reads the sequences again, without a cache of keys: that costs more, and
needs nothing of a family but the body that trains, packed or not. Ranks do the same number of
forwards whatever they have to answer, and leave together: under ZeRO-3 each gathers from all.

Shapes: B conversations, S longest sequence so far, D student width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genrecal_ds import dist
from genrecal_ds.data.batch import pad_side, to_device
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.pair import EncodedChat
from genrecal_ds.data.reader import BadSample, Sample, ShardReader
from genrecal_ds.errors import UserError
from genrecal_ds.evaluate.metrics import METRICS, metric_of
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.vlm import VLM


@dataclass(frozen=True)
class InLoopScores:
    """Called between steps, a collective: {"evaluation/overall": score, "evaluation/KIND": ..}.

    reader: of shards with answers. num_samples: the first ones, dealt out to the ranks.
    """

    encoders: PairEncoders  # of the student alone
    reader: ShardReader
    num_samples: int
    batch_size: int
    max_new_tokens: int

    def __call__(self, student: VLM) -> dict[str, float]:
        numbers = range(min(self.num_samples, len(self.reader)))
        own = list(numbers[dist.rank() :: dist.world_size()])
        rounds = -(-len(numbers) // (self.batch_size * dist.world_size()))
        found: list[tuple[str, float]] = []
        for first in range(0, rounds * self.batch_size, self.batch_size):
            samples = [self.reader.read(n) for n in own[first : first + self.batch_size]]
            texts = self._answers(student, samples)
            found += [
                (s.kind, self._score(s, text)) for s, text in zip(samples, texts, strict=True)
            ]
        everywhere = [pair for part in dist.gather_objects(found) for pair in part]
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

    @torch.no_grad()
    def _answers(self, student: VLM, samples: Sequence[Sample]) -> list[str]:
        encoder = self.encoders.student
        assert isinstance(encoder, ChatEncoder)
        prompts = [_as_chat(encoder, sample) for sample in samples]
        lengths = [len(prompt.input_ids_T) for prompt in prompts]
        if not any(prompt.vision for prompt in prompts):  # see data.batch.collate
            prompts.append(self.encoders.placeholder().student)
        chats, is_done = list(prompts), [n >= len(samples) for n in range(len(prompts))]
        for _ in range(self.max_new_tokens):
            waiting = torch.tensor([float(not all(is_done))], device=dist.device())
            if not dist.sum_over_ranks(waiting).item():
                break
            for place, token in enumerate(_next_tokens(student, chats, encoder.vision_rules)):
                if not is_done[place]:
                    chats[place] = _longer(chats[place], token, encoder.is_prefix_lm)
                    is_done[place] = token == encoder.end_of_turn
        new = [chat.input_ids_T[n:] for chat, n in zip(chats, lengths, strict=False)]
        return encoder.tokenizer.batch_decode(new, skip_special_tokens=True)


def _as_chat(encoder: ChatEncoder, sample: Sample) -> EncodedChat:
    """What stands before the last answer."""
    prompt = encoder.prompt(sample.messages[:-1], sample.images)
    per_token = {key: prompt[key][0] for key in encoder.per_token}
    vision = {key: prompt[key] for key in encoder.vision_rules if key in prompt}
    return EncodedChat(prompt["input_ids"][0], (), per_token, vision)


def _longer(chat: EncodedChat, token: int, is_prefix_lm: bool) -> EncodedChat:
    def grown(values: Tensor, value: int) -> Tensor:
        return torch.cat([values, values.new_tensor([value])])

    # Of an answer's tokens: 1 where a family marks what follows its prompt.
    marks = {"token_type_ids": int(is_prefix_lm)}
    per_token = {key: grown(v, marks.get(key, 0)) for key, v in chat.per_token.items()}
    return EncodedChat(grown(chat.input_ids_T, token), (), per_token, chat.vision)


def _next_tokens(
    student: VLM, chats: Sequence[EncodedChat], vision_rules: dict[str, str]
) -> list[int]:
    side = to_device(pad_side(list(chats), vision_rules), dist.device())
    hidden_BSD = student.body(*side)
    longest = hidden_BSD.shape[1]
    ends = [b * longest + len(chat.input_ids_T) - 1 for b, chat in enumerate(chats)]
    rows_BD = hidden_BSD.flatten(0, 1)[torch.tensor(ends, device=hidden_BSD.device)]
    return student.head.logits(rows_BD).argmax(-1).tolist()
