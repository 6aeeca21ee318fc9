"""Generates answers of a student in training, by the modules that train, on all ranks together.

Every step of decoding reads the sequences again, without a cache of keys. Decoding thus costs
more, but needs only the body that trains, packed or not. All ranks do the same number of forwards,
however much they have to answer, and leave together: under ZeRO-3 a forward gathers from all ranks.

Shapes: B conversations, S longest sequence so far, D student width, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genrecal_ds import dist
from genrecal_ds.data.batch import pad_side, to_device
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.pair import EncodedChat
from genrecal_ds.data.reader import Sample
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.vlm import VLM

# Chooses next tokens from logits [B, V]; rows after those of the samples are placeholders.
Choice = Callable[[Tensor], list[int]]


def likeliest(logits_BV: Tensor) -> list[int]:
    tokens: list[int] = logits_BV.argmax(-1).tolist()
    return tokens


def drawn(
    temperature: float, generators: Sequence[torch.Generator], encoder: ChatEncoder
) -> Choice:
    """Draw from softmax(logits / temperature); each sample has its own generator.

    Only tokens that may stand in an answer are drawn: no special token but those that end the
    answer, and no column of the head that the tokenizer does not know.
    """
    special = set(encoder.special_ids.tolist()) - encoder.stops
    known_V = torch.tensor([token not in special for token in range(len(encoder.tokenizer))])

    def choose(logits_BV: Tensor) -> list[int]:
        known = known_V[: logits_BV.shape[1]].nonzero().flatten().to(logits_BV.device)
        allowed_BV = torch.full_like(logits_BV, -torch.inf, dtype=torch.float32)
        allowed_BV[:, known] = logits_BV[:, known].float() / temperature
        shares_BV = allowed_BV.softmax(-1).cpu()
        tokens = [
            int(torch.multinomial(row, 1, generator=generator))
            for row, generator in zip(shares_BV, generators, strict=False)
        ]
        return tokens + [0] * (len(shares_BV) - len(tokens))

    return choose


@torch.no_grad()
def decode(
    student: VLM,
    encoders: PairEncoders,
    samples: Sequence[Sample],
    max_new_tokens: int,
    choose: Choice,
) -> list[str]:
    """Generate the last answers of the samples, without special tokens. A collective.

    The image token is never chosen: a body that meets it without a picture raises on one rank.
    """
    encoder = encoders.student
    assert isinstance(encoder, ChatEncoder)
    prompts = [_as_chat(encoder, sample) for sample in samples]
    lengths = [len(prompt.input_ids_T) for prompt in prompts]
    if not any(prompt.vision for prompt in prompts):  # see data.batch.collate
        prompts.append(encoders.placeholder().student)
    chats, is_done = list(prompts), [n >= len(samples) for n in range(len(prompts))]
    for _ in range(max_new_tokens):
        waiting = torch.tensor([float(not all(is_done))], device=dist.device())
        if not dist.sum_over_ranks(waiting).item():
            break
        logits_BV = _next_logits(student, chats, encoder.vision_rules)
        if encoder.image_token is not None:  # some heads have no column for it
            logits_BV[:, encoder.image_token : encoder.image_token + 1] = -torch.inf
        tokens = choose(logits_BV)
        for place, token in enumerate(tokens):
            if not is_done[place]:
                chats[place] = _longer(chats[place], token, encoder.is_prefix_lm)
                is_done[place] = token in encoder.stops
    new = [chat.input_ids_T[n:] for chat, n in zip(chats, lengths, strict=False)]
    texts: list[str] = encoder.tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts[: len(samples)]  # no tokens at all decode to one empty text


def _as_chat(encoder: ChatEncoder, sample: Sample) -> EncodedChat:
    """Encode what stands before the last answer."""
    prompt = encoder.prompt(sample.messages[:-1], sample.images)
    per_token = {key: prompt[key][0] for key in encoder.per_token}
    vision = {key: prompt[key] for key in encoder.vision_rules if key in prompt}
    return EncodedChat(prompt["input_ids"][0], (), per_token, vision)


def _longer(chat: EncodedChat, token: int, is_prefix_lm: bool) -> EncodedChat:
    def grown(values: Tensor, value: int) -> Tensor:
        return torch.cat([values, values.new_tensor([value])])

    # An answer's tokens get 1 if the family marks what follows the prompt.
    marks = {"token_type_ids": int(is_prefix_lm)}
    per_token = {key: grown(v, marks.get(key, 0)) for key, v in chat.per_token.items()}
    return EncodedChat(grown(chat.input_ids_T, token), (), per_token, chat.vision)


def _next_logits(
    student: VLM, chats: Sequence[EncodedChat], vision_rules: dict[str, str]
) -> Tensor:
    """Return the logits of the next tokens, [B, V]."""
    side = to_device(pad_side(list(chats), vision_rules), dist.device())
    hidden_BSD = student.body(*side)
    longest = hidden_BSD.shape[1]
    ends = [b * longest + len(chat.input_ids_T) - 1 for b, chat in enumerate(chats)]
    rows_BD = hidden_BSD.flatten(0, 1)[torch.tensor(ends, device=hidden_BSD.device)]
    logits_BV: Tensor = student.head.logits(rows_BD)
    return logits_BV
