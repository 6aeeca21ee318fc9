"""Turns logits over tokens into distributions over the next byte, and compares two by a KL.

Two models with different tokens become comparable at the next byte instead of the next token. At
the start of a token, probabilities of tokens are summed by the tokens' first byte. Inside a token,
after d of its bytes, the sum runs over the tokens that start with these d bytes, by byte d.
The text is assumed to be split by its own tokenizer, so a token that ends at the boundary stands
for the next bytes with which no longer token goes on (`rest` below).

Symbols: the 256 bytes; END for the end of the turn, only at the start of a token; STOP for tokens
that end at the boundary.

Shapes: I boundaries between bytes, n rows, V vocabulary, W tokens that stand for text, sorted by
their bytes, D most bytes of a token, C = 258 symbols.
"""

from typing import NamedTuple

import torch
from torch import Tensor

END, STOP, NUM_SYMBOLS = 256, 257, 258
NARROW = 16  # a boundary from which more than 1 in NARROW tokens go on is summed densely
_TINY = 1e-38  # added in a logarithm, so that a mass lost in rounding is not taken for absent


class ByteVocabulary(NamedTuple):
    """Tables of which tokens go on with which byte; models/token_bytes.py makes them."""

    first_V: Tensor  # int64: symbol of each token's first byte; STOP for tokens without text
    token_W: Tensor  # int64: token ids, in the order of their bytes
    place_V: Tensor  # int64: where a token stands in token_W, -1 for none
    symbol_WD: Tensor  # int16: byte d of a token; STOP behind its last
    low_WD: Tensor  # int32: the tokens that share a token's first d bytes are low up to high - 1
    high_WD: Tensor


class Boundaries(NamedTuple):
    """Boundaries between bytes, for one model; each field is [I]."""

    row: Tensor  # int64: the row of logits
    token: Tensor  # int64: the token that the boundary stands in
    depth: Tensor  # int64: bytes of that token before the boundary, below D


def next_byte_log_mass(logits_nV: Tensor, at: Boundaries, vocabulary: ByteVocabulary) -> Tensor:
    """Return log masses [I, C], fp32 or wider, up to a constant per row; -inf: no such symbol."""
    is_start = at.depth == 0
    place = vocabulary.place_V[at.token.masked_fill(is_start, 0)]  # a start asks for no token
    low, high = (table[place, at.depth].long() for table in (vocabulary.low_WD, vocabulary.high_WD))
    is_wide = ~is_start & (high - low > len(vocabulary.token_W) // NARROW)
    is_narrow = ~is_start & ~is_wide
    mass = logits_nV.new_empty(len(at.row), NUM_SYMBOLS)
    mass[is_start] = _dense(logits_nV.index_select(0, at.row[is_start]), vocabulary.first_V)
    mass[is_start, STOP] = -torch.inf  # tokens without text are no continuation of one
    # Few are wide: half of many vocabularies begins with a blank, 1 token in 60 with one letter.
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
    """Return KL(teacher || student) [I] of two log masses, over the symbols that both have.

    All other symbols, and the tokens that end there, are one symbol `rest`, if both sides have one.
    If a side has no `rest`, `rest` is left out and both are conditioned on the shared symbols.
    """
    is_shared = (teacher_IC > -torch.inf) & (student_IC > -torch.inf)
    is_shared[:, STOP] = False
    sides = [_with_rest(mass, is_shared) for mass in (teacher_IC, student_IC)]
    has_rest = torch.stack([side[:, -1] > -torch.inf for side in sides]).all(0)
    taken = torch.cat([is_shared, has_rest[:, None]], 1)
    taken[:, -1] |= ~taken.any(1)  # nothing to compare: one symbol of mass 1 on both sides
    # Symbols that are not taken get a finite number: -inf would make the gradient NaN.
    log_p, log_q = (
        side.masked_fill(~taken, -1e30).masked_fill(side == -torch.inf, -1e30).log_softmax(-1)
        for side in sides
    )
    return ((log_p.exp() * (log_p - log_q)) * taken).sum(-1)


def _with_rest(mass_IC: Tensor, is_shared: Tensor) -> Tensor:
    """Append the mass of all symbols that are not shared: [I, C + 1]."""
    others = mass_IC.masked_fill(is_shared, -torch.inf)
    is_there = (others > -torch.inf).any(-1)
    safe = others.masked_fill(~is_there[:, None], 0.0)  # logsumexp of nothing has a NaN gradient
    rest = safe.logsumexp(-1).masked_fill(~is_there, -torch.inf)
    return torch.cat([mass_IC, rest[:, None]], 1)


def _dense(logits_iw: Tensor, symbol_w: Tensor) -> Tensor:
    """Return [i, C] for boundaries from which the same tokens go on."""
    shifted = logits_iw - logits_iw.detach().amax(-1, keepdim=True)
    summed = shifted.new_zeros(len(shifted), NUM_SYMBOLS).index_add(1, symbol_w, shifted.exp())
    is_there = torch.zeros(NUM_SYMBOLS, dtype=torch.bool, device=symbol_w.device)
    is_there[symbol_w] = True
    return (summed + _TINY).log().masked_fill(~is_there, -torch.inf)


def _sparse(
    logits_nV: Tensor, at: Boundaries, low_I: Tensor, high_I: Tensor, vocabulary: ByteVocabulary
) -> Tensor:
    """Return [I, C]; each boundary has its own tokens, those at low up to high - 1."""
    sizes = high_I - low_I
    item = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    first = sizes.cumsum(0) - sizes
    candidate = torch.arange(len(item), device=sizes.device) - first[item] + low_I[item]
    symbol = vocabulary.symbol_WD[candidate, at.depth[item]].long()
    # One index, not two: a GPU sorts the gradient of two indices before adding.
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
