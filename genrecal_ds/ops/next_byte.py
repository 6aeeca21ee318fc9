"""Turns logits over tokens into next-byte distributions; KL between two vocabularies.

Two models with different tokens say the same kind of thing once asked for the next byte instead of
the next token: at the start of a token the tokens' probabilities are summed by their first byte;
inside one, after d of its bytes, over the tokens that start with these bytes, by the one behind.
The text is taken to be split as its tokenizer splits it: a token that ends before stands for a
next byte with which no longer token goes on (`rest` below).

Symbols: the 256 bytes, END for the end of the turn (a token's start only), and STOP for tokens
that end where the boundary is.

Shapes: I boundaries between bytes, n rows, V vocabulary, W tokens that stand for text, sorted by
their bytes, D most bytes of a token, C = 258 symbols.
"""

from typing import NamedTuple

import torch
from torch import Tensor

END, STOP, NUM_SYMBOLS = 256, 257, 258
# Of the logits' size that both functions together hold at once: 6, and 2 of a softcapped head.
NARROW = 16  # a boundary that more than 1 in so many tokens go on from is summed densely
_TINY = 1e-38  # in a logarithm: what is there but lost in rounding is not taken for absent


class ByteVocabulary(NamedTuple):
    """Which tokens go on with which byte; models/token_bytes.py makes it."""

    first_V: Tensor  # int64: symbol of each token's first byte; STOP for tokens without text
    token_W: Tensor  # int64: token ids, in the order of their bytes
    place_V: Tensor  # int64: where a token stands in that order, -1 for none
    symbol_WD: Tensor  # int16: byte d of a token; STOP behind its last
    low_WD: Tensor  # int32: the tokens that share a token's first d bytes are low up to high - 1
    high_WD: Tensor


class Boundaries(NamedTuple):
    """Of one model, [I] each."""

    row: Tensor  # int64: whose logits
    token: Tensor  # int64: the token that the boundary stands in
    depth: Tensor  # int64: bytes of that token before the boundary, below D


def next_byte_log_mass(logits_nV: Tensor, at: Boundaries, vocabulary: ByteVocabulary) -> Tensor:
    """[I, C] fp32 or wider, logarithms up to a constant of each row; -inf for absent symbols."""
    is_start = at.depth == 0
    place = vocabulary.place_V[at.token.masked_fill(is_start, 0)]  # a start asks for no token
    low, high = (table[place, at.depth].long() for table in (vocabulary.low_WD, vocabulary.high_WD))
    is_wide = ~is_start & (high - low > len(vocabulary.token_W) // NARROW)
    is_narrow = ~is_start & ~is_wide
    mass = logits_nV.new_empty(len(at.row), NUM_SYMBOLS)
    mass[is_start] = _dense(logits_nV.index_select(0, at.row[is_start]), vocabulary.first_V)
    mass[is_start, STOP] = -torch.inf  # tokens without text are no continuation of one
    # Few: what begins with a blank is half of many vocabularies, what begins with a letter 1 in 60.
    places = torch.stack([low, high, at.depth], 1)
    for first, last, depth in places[is_wide].unique(dim=0).tolist():
        here = is_wide & (low == first) & (at.depth == depth)
        of_tokens = logits_nV.index_select(1, vocabulary.token_W[first:last])
        symbols = vocabulary.symbol_WD[first:last, depth].long()
        mass[here] = _dense(of_tokens.index_select(0, at.row[here]), symbols)
    inside = Boundaries(*(part[is_narrow] for part in at))
    mass[is_narrow] = _sparse(logits_nV, inside, low[is_narrow], high[is_narrow], vocabulary)
    return mass


def next_byte_kl(teacher_IC: Tensor, student_IC: Tensor) -> Tensor:
    """KL(teacher || student) [I] of two log masses, over the symbols that both can say.

    All others, and the tokens that end there, are one symbol, `rest`, where both have such. A side
    that has none cannot stop there: then it is left out, and both are conditioned on the others.
    """
    is_shared = (teacher_IC > -torch.inf) & (student_IC > -torch.inf)
    is_shared[:, STOP] = False
    sides = [_with_rest(mass, is_shared) for mass in (teacher_IC, student_IC)]
    has_rest = torch.stack([side[:, -1] > -torch.inf for side in sides]).all(0)
    taken = torch.cat([is_shared, has_rest[:, None]], 1)
    taken[:, -1] |= ~taken.any(1)  # nothing to compare: one symbol of mass 1 on both sides
    # Where nothing is taken a finite number stands: -inf would make the gradient NaN.
    log_p, log_q = (
        side.masked_fill(~taken, -1e30).masked_fill(side == -torch.inf, -1e30).log_softmax(-1)
        for side in sides
    )
    return ((log_p.exp() * (log_p - log_q)) * taken).sum(-1)


def _with_rest(mass_IC: Tensor, is_shared: Tensor) -> Tensor:
    """[I, C + 1]: the mass of all symbols that are not shared behind the others."""
    others = mass_IC.masked_fill(is_shared, -torch.inf)
    is_there = (others > -torch.inf).any(-1)
    safe = others.masked_fill(~is_there[:, None], 0.0)  # logsumexp of nothing has a NaN gradient
    rest = safe.logsumexp(-1).masked_fill(~is_there, -torch.inf)
    return torch.cat([mass_IC, rest[:, None]], 1)


def _dense(logits_iw: Tensor, symbol_w: Tensor) -> Tensor:
    """[i, C] of boundaries that the same tokens go on from."""
    shifted = logits_iw - logits_iw.detach().amax(-1, keepdim=True)
    summed = shifted.new_zeros(len(shifted), NUM_SYMBOLS).index_add(1, symbol_w, shifted.exp())
    is_there = torch.zeros(NUM_SYMBOLS, dtype=torch.bool, device=symbol_w.device)
    is_there[symbol_w] = True
    return (summed + _TINY).log().masked_fill(~is_there, -torch.inf)


def _sparse(
    logits_nV: Tensor, at: Boundaries, low_I: Tensor, high_I: Tensor, vocabulary: ByteVocabulary
) -> Tensor:
    """[I, C], each boundary with tokens of its own, those at low up to high - 1."""
    sizes = high_I - low_I
    item = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    first = sizes.cumsum(0) - sizes
    candidate = torch.arange(len(item), device=sizes.device) - first[item] + low_I[item]
    symbol = vocabulary.symbol_WD[candidate, at.depth[item]].long()
    # One index, not two: the gradient of two is sorted by them on a GPU before it is added.
    where = at.row[item] * logits_nV.shape[1] + vocabulary.token_W[candidate]
    values = logits_nV.flatten().index_select(0, where)
    highest = values.new_full((len(sizes),), -torch.inf)
    highest = highest.scatter_reduce(0, item, values.detach(), "amax")
    cell = item * NUM_SYMBOLS + symbol
    flat = values.new_zeros(len(sizes) * NUM_SYMBOLS)
    summed = flat.index_add(0, cell, (values - highest[item]).exp())
    is_there = torch.zeros_like(flat, dtype=torch.bool)
    is_there[cell] = True
    mass = (summed + _TINY).log().masked_fill(~is_there, -torch.inf)
    return mass.unflatten(0, (-1, NUM_SYMBOLS))
