"""Two tokenisations held together by bytes: against brute force, and speed-shaped inputs."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecal_ds.data.byte_matching import UNKNOWN, ByteMatcher, _folded, match_bytes
from genrecal_ds.data.pair import Pair
from tests.unit.data.test_batch import chat

pytestmark = pytest.mark.unit
TEXTS = st.text("ab 7\u00e9\u4e2d\U0001f600\ufb01", max_size=12).filter(
    lambda text: not text.startswith(" ")
)


@st.composite
def splits(draw, text: bytes):
    """Pieces that spell the text behind a blank or none, special tokens among them, then an end."""
    whole = b" " * draw(st.integers(0, 1)) + text
    cuts = sorted({0, len(whole), *draw(st.lists(st.integers(0, len(whole)), max_size=8))})
    pieces = [whole[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    if pieces and draw(st.booleans()):
        pieces.insert(draw(st.integers(0, len(pieces))), None)
    return [*pieces, None]


@st.composite
def turns(draw):
    text = draw(TEXTS).encode()
    return draw(splits(text)), draw(splits(text))


def read(pieces, count):
    """What the first `count` tokens have read, without the blank in front."""
    text = b"".join(piece or b"" for piece in pieces[:count])
    return text.removeprefix(b" ")


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(turns())
def test_next_bytes_are_the_same_byte_behind_the_same_text(turn):
    teacher, student = turn
    found = match_bytes(teacher, student)
    said = []
    for j, b, i, a in zip(*map(list, found), strict=True):
        if (j, i) == (len(student) - 1, len(teacher) - 1):
            assert (b, a) == (0, 0)
            continue
        assert student[j][b] == teacher[i][a]
        before = b"".join(p or b"" for p in student[:j]) + student[j][:b]
        others = b"".join(p or b"" for p in teacher[:i]) + teacher[i][:a]
        assert before.removeprefix(b" ") == others.removeprefix(b" ")
        said.append(student[j][b])
    text = b"".join(piece or b"" for piece in student)
    both = text.startswith(b" ") and b"".join(piece or b"" for piece in teacher).startswith(b" ")
    assert bytes(said) == (text if both else text.removeprefix(b" "))  # every byte of it, in order


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.text("ae\u0301\u00e9\ud55c\ufb01\uff21 ", max_size=10),
    st.sampled_from(["NFC", "NFKC", "lower"]),
)
def test_a_side_that_normalises_shares_the_boundaries_around_what_it_changed(text, form):
    changed = text.lower() if form == "lower" else unicodedata.normalize(form, text)
    by_character = [[c.encode() for c in side] + [None] for side in (text, changed)]
    found = match_bytes(*by_character)
    assert (np.diff(found.student_I) >= 0).all() and (np.diff(found.teacher_I) >= 0).all()
    ends = zip(
        found.student_I, found.student_depth_I, found.teacher_I, found.teacher_depth_I, strict=True
    )
    for ours, depth, theirs, teacher_depth in list(ends)[:-1]:
        if depth == teacher_depth == 0:  # between characters: inside one only bytes are compared
            same = [
                unicodedata.normalize("NFKD", part.lstrip(" ")).casefold()
                for part in (changed[:ours], text[:theirs])
            ]
            assert same[0] == same[1]


def test_what_one_vocabulary_lacks_is_left_out_and_the_rest_is_not():
    teacher = [b"ab", "\u4e2d".encode(), b"cd", None]
    for hidden in (UNKNOWN, None):  # None: a special token, whose name the other side spells
        student = [b"a", b"b", hidden, b"c", b"d", None]
        found = match_bytes(teacher, student)
        assert found.student_I.tolist() == [0, 1, 3, 4, 5]  # 3 reads the character, too
        assert found.teacher_I.tolist() == [0, 0, 2, 2, 3]


def test_an_unknown_token_is_not_taken_for_nothing():
    """Both sides' bytes may be equal, or begin alike, behind different texts."""
    spelt = [b"x", b"a", b"a", b"b", None]
    for student, expected in (
        ([b"x", UNKNOWN, b"a", b"b", None], [0, 2, 3, 4]),
        ([b"x", b"a", UNKNOWN, b"b", None], [0, 1, 3, 4]),
        ([b"x", UNKNOWN, b"b", None], [0, 3, 4]),
        ([b"x", UNKNOWN, b"a", b"a", b"b", None], [4]),  # where is the text of the unknown one?
        ([UNKNOWN, b"a", b"b", None], [2, 3, 4]),
        ([UNKNOWN, b"a", UNKNOWN, None], [4]),
        # What stands at an end may be blanks that the other side's template cuts off.
        ([UNKNOWN, b"x", b"a", b"a", b"b", None], [0, 1, 2, 3, 4]),
    ):
        assert match_bytes(spelt, student).teacher_I.tolist() == expected
    # Each side hides one of three: "a" of the one may be in either place of the other.
    both = match_bytes([UNKNOWN, b"a", UNKNOWN, None], [UNKNOWN, b"a", UNKNOWN, None])
    assert both.teacher_I.tolist() == [3]


UNITS = ["a", "b", " ", "\n", "e", "\u00e9", "e\u0301", "\ufb01", "f", "i", "\uff21", "\u4e2d"]


@st.composite
def sides(draw, units):
    """(pieces, {bytes before: characters of the true text before, folded}) of one vocabulary."""
    form = draw(st.sampled_from([None, "NFC", "NFD", "NFKC", "lower"]))
    text = "".join(units)
    if form:
        text = text.lower() if form == "lower" else unicodedata.normalize(form, text)
    is_fused, is_cut = draw(st.booleans()), draw(st.booleans())
    pieces, place_of, place, size = [b" "] * draw(st.integers(0, 2)), {}, 0, 0
    place_of = {size: size - len(pieces) for size in range(len(pieces))}
    size = len(pieces)
    for character in text:
        if draw(st.integers(0, 3)) == 0:
            if not (is_fused and pieces and pieces[-1] == UNKNOWN):
                pieces.append(UNKNOWN)
        else:
            place_of[size] = place
            piece = character.encode()
            size += len(piece)
            pieces += [piece] if is_cut or not pieces or not pieces[-1] else [pieces.pop() + piece]
        place += len(_folded(character))
    return [*pieces, None], place_of


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(st.data(), st.lists(st.sampled_from(UNITS), max_size=7))
def test_no_boundary_is_guessed_beside_unknown_tokens(data, units):
    """By the places in the true text, which only the test knows."""
    (teacher, theirs), (student, ours) = (data.draw(sides(units)) for _ in range(2))
    found = match_bytes(teacher, student)
    starts, own_starts = (np.cumsum([0] + [len(p or b"") for p in s]) for s in (teacher, student))
    places = [
        (theirs.get(starts[i] + depth), ours.get(own_starts[j] + own_depth))
        for j, own_depth, i, depth in list(zip(*found, strict=True))[:-1]
    ]
    assert all(place == own for place, own in places), places


def test_bytes_of_one_character_in_tokens_of_their_own():
    character = "\U0001f600".encode()
    teacher = [bytes([byte]) for byte in character] + [None]
    found = match_bytes(teacher, [character, None])
    assert found.student_depth_I.tolist() == [0, 1, 2, 3, 0]
    assert found.teacher_I.tolist() == [0, 1, 2, 3, 4]


def test_turns_of_a_pair_go_by_their_vocabularies():
    pieces = {
        10: None,
        13: b" 1",
        14: b"2",
        15: b"12",
        1: None,
        20: None,
        22: b"1",
        23: b"2",
        2: None,
    }
    pair = Pair(
        chat([10, 13, 14, 1, 10, 15, 1], [(1, 4), (5, 7)]),
        chat([20, 22, 23, 2, 20, 22, 23, 2], [(1, 4), (5, 8)]),
    )
    first, second = ByteMatcher(pieces, pieces).next_bytes(pair)
    assert first.teacher_depth_I.tolist() == [1, 0, 0]  # behind the blank of its first token
    assert second.teacher_depth_I.tolist() == [0, 1, 0]
