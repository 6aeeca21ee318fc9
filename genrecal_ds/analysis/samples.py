"""Shows what the models are taught on real samples: answer masks, lengths, refusals."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
from rich.text import Text

from genrecal_ds.console.text import printable
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.pair import EncodedChat, TooLong, Unusable
from genrecal_ds.data.reader import BadSample, ShardReader
from genrecal_ds.models.chat import ChatEncoder

BARS, BAR_WIDTH = 8, 40  # of a histogram up to max_length
# What a position is, and how it shows: (style in colour, marks without).
MARKS = {
    "answer": ("green", "[[", "]]"),
    "boundary": ("yellow", "((", "))"),
    "other": ("", "", ""),
}


@dataclass
class Look:
    """One sample as it is taught, by side; `taught` is empty where the sample is left out."""

    name: str
    taught: dict[str, EncodedChat] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)  # before max_length cuts
    visual: dict[str, int] = field(default_factory=dict)
    reason: str = ""  # why it is left out
    ends_the_run: bool = False
    is_truncated: bool = False


def look_at(index: ShardIndex, encoders: PairEncoders, most: int) -> list[Look]:
    """Look at samples spread evenly over the folder, so that every source of a mix may appear."""
    count = min(most, len(index))
    numbers = [i * len(index) // count for i in range(count)]
    looks = []
    for number, sample in zip(numbers, ShardReader(index).read_many(numbers), strict=True):
        if isinstance(sample, BadSample):
            looks.append(Look(f"sample {number}", reason=f"damaged: {sample}"))
            continue
        name = f"sample {number}, key {sample.key}"
        look = Look(name)
        try:
            for side, encoder in encoders.by_side.items():
                chat = encoder.encode(sample.messages, sample.images, last_turn=True)
                look.lengths[side] = len(chat.input_ids_T)
                look.visual[side] = encoder.num_visual(chat)
            pairs = encoders.encode(sample.messages, sample.images)
        except Unusable as error:
            look.reason, look.ends_the_run = str(error), isinstance(error, TooLong)
            looks.append(look)
            continue
        for turn, pair in enumerate(pairs, 1):
            taught = dict(zip(encoders.by_side, pair.sides, strict=True))
            own = replace(look, taught=taught, is_truncated=pair.is_truncated)
            if len(pairs) > 1:
                own.name = f"{name}, turn {turn} by itself"
                own.lengths = {side: len(chat.input_ids_T) for side, chat in taught.items()}
            looks.append(own)
    return looks


def marked(chat: EncodedChat, encoder: ChatEncoder, in_colour: bool) -> Text:
    """Show tokens as text on one line; answers green or in [[ ]], pictures as one <image x N>.

    The token before an answer is yellow or in (( )): its row is the boundary row, which predicts
    the answer's first token.
    """
    ids = chat.input_ids_T.tolist()
    role = {start - 1: "boundary" for start, _ in chat.answers}
    role |= {i: "answer" for start, end in chat.answers for i in range(start, end)}

    def kind(position: int) -> tuple[str, bool]:
        is_visual = encoder.image_token is not None and ids[position] == encoder.image_token
        return role.get(position, "other"), is_visual

    shown, last = Text(), 0
    for (name, is_visual), run in groupby(range(len(ids)), kind):
        positions = list(run)
        first, end = positions[0], positions[-1] + 1
        text = f"<image x {end - first}>" if is_visual else _decode(encoder, ids, last, first, end)
        style, before, behind = MARKS[name]
        if in_colour:
            shown.append(printable(text), style)
        else:
            shown.append(f"{before}{printable(text)}{behind}")
        last = first
    return shown


def _decode(encoder: ChatEncoder, ids: list[int], before: int, first: int, end: int) -> str:
    """Decode tokens [first, end) behind their neighbours.

    A sentencepiece tokenizer leaves out the blank in front of the text that it decodes."""
    whole = encoder.tokenizer.decode(ids[before:end], clean_up_tokenization_spaces=False)
    left = encoder.tokenizer.decode(ids[before:first], clean_up_tokenization_spaces=False)
    if whole.startswith(left):
        return whole[len(left) :]
    return encoder.tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False)


def visual_tokens(counts: np.ndarray) -> str:
    """Least, median and most visual tokens of samples with any; counts: one per sample."""
    counts = counts[counts > 0]
    if not len(counts):
        return "no visual tokens"
    return (
        f"{counts.min()} to {counts.max()} visual tokens, median {np.median(counts):.0f}, in "
        f"{len(counts):,} samples with pictures"
    )


def histogram(lengths: np.ndarray, max_length: int) -> Iterator[str]:
    """Draw bars of equal width up to max_length, a line that marks it, and one bar behind it."""
    step = -(-max_length // BARS)
    numbers = np.where(lengths > max_length, BARS, np.maximum(lengths - 1, 0) // step)
    bins = np.bincount(numbers, minlength=BARS + 1).tolist()
    tallest = max(*bins, 1)
    for number in range(BARS + 1):
        if number == BARS:
            yield f"{'-- max_length':>15} {max_length} {'-' * BAR_WIDTH}"
        first, last = number * step + 1, min((number + 1) * step, max_length)
        label = f"{first} to {last}" if number < BARS else f"above {max_length}"
        if first > max_length and number < BARS:
            continue
        bar = "#" * -(-bins[number] * BAR_WIDTH // tallest)
        yield f"{label:>15} {bar} {bins[number]:,}"


def reasons(looks: Sequence[Look]) -> Counter[str]:
    """Count why samples are left out."""
    return Counter(look.reason for look in looks if look.reason)
