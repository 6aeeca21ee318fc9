"""Sure pairs against every way to fill the gaps, tried one by one."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecal_ds.data import sure_pairs as module
from genrecal_ds.data.sure_pairs import Seen, sure_pairs

pytestmark = pytest.mark.unit
LONGEST = 5  # gap that is tried


@st.composite
def pairs_of_sides(draw):
    """Two sides of one text; a tenth of them of two texts."""
    text = draw(st.text("ab ", max_size=5))
    other = text if draw(st.integers(0, 9)) else draw(st.text("ab ", max_size=5))
    return draw(sides(text)), draw(sides(other))


@st.composite
def sides(draw, text):
    text = " " * draw(st.integers(0, 1)) + text + " " * draw(st.integers(0, 1))
    characters, gaps = "", {}
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), min_size=4, max_size=4)))
    gap = draw(st.integers(0, 2))  # the hidden stretches are between cuts
    spans = list(zip(cuts[::2], cuts[1::2], strict=True))[:gap]
    end = 0
    for start, stop in spans:
        characters += text[end:start]
        least = draw(st.integers(0, min(2, stop - start)))
        gaps[len(characters)] = gaps.get(len(characters), 0) + least
        end = stop
    return Seen(characters + text[end:], gaps)


def fillings(side):
    """Every text with the gaps filled, as places in the side's characters, None in a gap."""
    spots = sorted(side.gaps)
    for sizes in itertools.product(*(range(side.gaps[s], LONGEST + 1) for s in spots)):
        cells, before = [], 0
        for spot, size in zip(spots, sizes, strict=True):
            cells += [*range(before, spot), *([None] * size)]
            before = spot
        yield [*cells, *range(before, len(side.characters))]


def cores(side, has_end):
    """Every filling without what may be blank in front, and at the end unless `has_end`."""
    found = set()
    for cells in fillings(side):
        may_be_blank = [cell is None or side.characters[cell] == " " for cell in cells]
        lead = next((n for n, blank in enumerate(may_be_blank) if not blank), len(cells))
        trail = next((n for n, blank in enumerate(may_be_blank[::-1]) if not blank), len(cells))
        for start in range(lead + 1):
            for cut in [0] if has_end else range(trail + 1):
                if start + cut <= len(cells):
                    found.add(tuple(cells[start : len(cells) - cut]))
    return found


def blanks_at_the_end(side):
    """None with a gap among them."""
    end = len(side.characters.rstrip())
    return None if any(gap >= end for gap in side.gaps) else side.characters[end:]


def tried(a, b):
    """{place in a: every place in b it is paired with, None where it is paired with none}."""
    ends = [blanks_at_the_end(side) for side in (a, b)]
    has_end = ends[0] == ends[1] is not None
    by_length = {}
    for core in cores(b, has_end):
        by_length.setdefault(len(core), []).append(core)
    partners = {}
    for core in cores(a, has_end):
        for other in by_length.get(len(core), []):
            both = list(zip(core, other, strict=True))
            if all(x is None or y is None or a.characters[x] == b.characters[y] for x, y in both):
                found = {x: y for x, y in both if x is not None}
                for place in range(len(a.characters)):
                    partners.setdefault(place, set()).add(found.get(place))
    return partners


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(pairs_of_sides())
def test_just_the_pairs_of_every_way_are_sure(both):
    a, b = both
    sure = [
        (place, *partners)
        for place, partners in sorted(tried(a, b).items())
        if len(partners) == 1 and None not in partners
    ]
    assert sure_pairs(a, b) == sure


def test_long_texts_with_many_gaps_are_searched_in_time():
    text = "the quick brown fox jumps over the lazy dog " * 90
    spots = range(20, 3500, 70)
    seen = "".join(c for n, c in enumerate(text) if n not in spots)
    gaps = {spot - n: 1 for n, spot in enumerate(spots)}
    start = time.perf_counter()
    found = sure_pairs(Seen(text.strip(), {}), Seen(seen.strip(), gaps))
    assert time.perf_counter() - start < 5
    assert (0, 0) in found and (len(text) - 2, len(seen) - 2) in found


def test_beyond_the_limit_what_is_between_gaps_is_left_out(monkeypatch):
    sides = Seen("abcd efgh", {}), Seen("abd eh", {2: 1, 5: 1})
    around = [(0, 0), (1, 1), (8, 5)]
    assert sure_pairs(*sides) == sorted([*around, (3, 2), (4, 3), (5, 4)])
    monkeypatch.setattr(module, "MOST_CELLS", 10)
    assert sure_pairs(*sides) == around
