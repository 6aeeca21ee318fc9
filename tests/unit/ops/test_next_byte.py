"""Next-byte distributions and their KL: against sums over tokens written out one by one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecal_ds.models.token_bytes import MOST_BYTES, byte_vocabulary
from genrecal_ds.ops.next_byte import (
    END,
    NUM_SYMBOLS,
    Boundaries,
    next_byte_kl,
    next_byte_log_mass,
)
from tests.next_byte import kl_spelt_out, spelt_out

pytestmark = pytest.mark.unit
TEACHER = [None, b"a", b"b", b"ab", b"abc", b" ", b" a", b"\x00", b"\xff\x00", b"c", None, b"a"]
STUDENT = [b"a", b"b", b"c", None, b" ab", b" ", b"abcd", b"d", b"ba", b"\x00"]
ENDS = (10, 3)
PADDED = (14, 10)


@pytest.fixture(autouse=True, params=[100, 3, 1], ids=["dense", "both", "sparse"])
def narrow(request, monkeypatch):
    """All boundaries by one way of summing, all by the other, some by each."""
    monkeypatch.setattr("genrecal_ds.ops.next_byte.NARROW", request.param)


def tables(dtype=torch.float64):
    return [
        byte_vocabulary(pieces, end, size, torch.device("cpu"))
        for pieces, end, size in zip((TEACHER, STUDENT), ENDS, PADDED, strict=True)
    ]


def boundaries_of(pieces, end):
    return [(t, d) for t, piece in enumerate(pieces) if piece for d in range(len(piece))] + [
        (end, 0)
    ]


def test_masses_are_sums_over_tokens_at_every_boundary():
    torch.manual_seed(0)
    for pieces, end, size, vocabulary in zip(
        (TEACHER, STUDENT), ENDS, PADDED, tables(), strict=True
    ):
        at = boundaries_of(pieces, end)
        logits = torch.randn(len(at), size, dtype=torch.float64) * 3
        where = Boundaries(torch.arange(len(at)), *torch.tensor(at).T)
        mass = next_byte_log_mass(logits, where, vocabulary)
        assert mass.shape == (len(at), NUM_SYMBOLS)
        for row, (token, depth) in enumerate(at):
            expected = spelt_out(logits[row].softmax(-1), pieces, end, token, depth)
            assert set((mass[row] > -math.inf).nonzero().flatten().tolist()) == expected.keys()
            values = torch.stack([mass[row, symbol] for symbol in expected]).softmax(-1)
            truth = torch.stack(list(expected.values()))
            torch.testing.assert_close(values, truth / truth.sum(), rtol=1e-12, atol=0)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(boundaries_of(TEACHER, ENDS[0])),
            st.sampled_from(boundaries_of(STUDENT, ENDS[1])),
        ),
        min_size=1, max_size=4,
    ),
    st.integers(0, 2**20),
)  # fmt: skip
def test_kl_and_its_gradient_equal_the_sum_over_symbols(pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    num = len(pairs)
    theirs = torch.randn(num, PADDED[0], generator=generator, dtype=torch.float64) * 2
    ours = (
        torch.randn(num, PADDED[1], generator=generator, dtype=torch.float64) * 2
    ).requires_grad_()
    rows, (teacher_table, student_table) = torch.arange(num), tables()
    at_teacher, at_student = (
        Boundaries(rows, *torch.tensor([pair[side] for pair in pairs]).T) for side in (0, 1)
    )
    kl = next_byte_kl(
        next_byte_log_mass(theirs, at_teacher, teacher_table),
        next_byte_log_mass(ours, at_student, student_table),
    )
    (gradient,) = torch.autograd.grad(kl.sum(), ours)
    expected = [
        torch.as_tensor(kl_spelt_out(
            spelt_out(theirs[i].softmax(-1), TEACHER, ENDS[0], *there),
            spelt_out(ours[i].softmax(-1), STUDENT, ENDS[1], *here),
        ), dtype=torch.float64) + 0.0 * ours.sum()
        for i, (there, here) in enumerate(pairs)
    ]  # fmt: skip
    (truth,) = torch.autograd.grad(sum(expected), ours)
    torch.testing.assert_close(kl, torch.stack(expected), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-12)


def test_equal_models_of_one_vocabulary_have_no_kl_and_far_ones_stay_finite():
    _, table = tables()
    at = boundaries_of(STUDENT, ENDS[1])
    where = Boundaries(torch.arange(len(at)), *torch.tensor(at).T)
    logits = torch.randn(len(at), PADDED[1])
    mass = next_byte_log_mass(logits, where, table)
    assert next_byte_kl(mass, mass).abs().max() < 1e-6
    far = (torch.eye(len(STUDENT))[torch.randint(len(STUDENT), (len(at),))] * 200).requires_grad_()
    kl = next_byte_kl(mass, next_byte_log_mass(far, where, table))
    kl.sum().backward()
    assert kl.isfinite().all() and far.grad.isfinite().all()


def test_long_tokens_are_known_up_to_a_depth():
    long = b"x" * (MOST_BYTES + 9)
    table = byte_vocabulary([long, long + b"y", b"x", None], 3, 4, torch.device("cpu"))
    assert table.symbol_WD.shape[1] == MOST_BYTES + 1
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    at = Boundaries(*torch.tensor([[0], [0], [MOST_BYTES]]))
    mass = next_byte_log_mass(logits, at, table)
    assert (mass > -math.inf).nonzero()[:, 1].tolist() == [ord("x")]


def test_a_head_without_the_last_tokens():
    """Molmo2's: the tokens of pictures stand behind those that the head knows."""
    table = byte_vocabulary([b"x", b"xy", None, b"z"], 2, 3, torch.device("cpu"))
    at = Boundaries(*torch.tensor([[0], [0], [0]]))
    mass = next_byte_log_mass(torch.zeros(1, 3), at, table)
    assert (mass > -math.inf).nonzero()[:, 1].tolist() == [ord("x"), END]
