"""Pairs the characters of two texts with unseen parts, where every way to fill those parts agrees.

Both texts are one text, of which each side shows some characters and hides others. Blanks around it
may be there or not, on either side. A pair is sure if the two characters stand for each other in
every way to fill the gaps that makes the texts equal. If there is no such way, nothing is sure.
"""

from typing import NamedTuple

# Bits of the table of a search between the first gap and the last: 8 MB, a tenth of a second, for
# 8,192 characters on either side. What would need a larger one is left unpaired.
MOST_CELLS = 1 << 26
# Elements beside single characters: exactly one unseen character, and any number of them.
ONE, ANY = "one", "any"


class Seen(NamedTuple):
    """What one side shows of the text.

    gaps: for places in `characters`, its end included: the least number of characters that are
    hidden in front of that place.
    """

    characters: str
    gaps: dict[int, int]


def sure_pairs(a: Seen, b: Seen) -> list[tuple[int, int]]:
    """(place in a, place in b) of each sure pair, in order.

    Before the first gap and behind the last there is one way only, whatever the texts' lengths.
    """
    sides = a, b
    # Before the text begins, and behind its end, there are but blanks.
    begins = [len(side.characters) - len(side.characters.lstrip()) for side in sides]
    stops = [len(side.characters.rstrip()) for side in sides]
    # A gap among those may be a blank, or not.
    is_open_start = any(min(s.gaps, default=n + 1) <= n for s, n in zip(sides, begins, strict=True))
    is_open_end = any(max(s.gaps, default=-1) >= n for s, n in zip(sides, stops, strict=True))
    starts = [0, 0] if is_open_start else begins
    ends = [max(start, stop) for start, stop in zip(starts, stops, strict=True)]
    if is_open_end or a.characters[ends[0] :] == b.characters[ends[1] :]:
        ends = [len(side.characters) for side in sides]
    head = tail = 0  # characters before the first gap of either side, and behind the last
    if not is_open_start:
        limits = stops if is_open_end else ends
        firsts = [min([*s.gaps, limit]) for s, limit in zip(sides, limits, strict=True)]
        head = max(0, min(first - start for first, start in zip(firsts, starts, strict=True)))
    if not is_open_end and (a.gaps or b.gaps):
        limits = begins if is_open_start else starts
        lasts = [max([*s.gaps, limit]) for s, limit in zip(sides, limits, strict=True)]
        tail = max(0, min(end - last for end, last in zip(ends, lasts, strict=True)))
    i, j = (start + head for start in starts)
    i_end, j_end = (end - tail for end in ends)
    is_equal = (
        a.characters[starts[0] : i] == b.characters[starts[1] : j]
        and a.characters[i_end : ends[0]] == b.characters[j_end : ends[1]]
    )
    if i > i_end or j > j_end or not is_equal:
        return []
    between = _between((a, i, i_end), (b, j, j_end), is_open_start, is_open_end)
    if between is None:
        return []
    before = zip(range(starts[0], i), range(starts[1], j), strict=True)
    behind = zip(range(i_end, ends[0]), range(j_end, ends[1]), strict=True)
    return [*before, *between, *behind]


def _between(
    a: tuple[Seen, int, int], b: tuple[Seen, int, int], is_open_start: bool, is_open_end: bool
) -> list[tuple[int, int]] | None:
    """Pair what is sure of two stretches, (side, start, end); None if they cannot be equal."""
    elements, own_elements = _elements(*a), _elements(*b)
    if len(elements) * len(own_elements) > MOST_CELLS:
        return []
    found = _search(elements, own_elements, is_open_start, is_open_end)
    if found is None:
        return None
    places, own_places = _places(elements, a[1]), _places(own_elements, b[1])
    return [(places[x], own_places[y]) for x, y in found]


def _elements(side: Seen, start: int, end: int) -> list[str]:
    """Write a stretch, gaps in front of its end included, as characters, ONE and ANY."""
    elements: list[str] = []
    for place in range(start, end + 1):
        if place in side.gaps:
            elements += [ONE] * side.gaps[place] + [ANY]
        if place < end:
            elements.append(side.characters[place])
    return elements


def _places(elements: list[str], start: int) -> list[int]:
    """Find the place of each element that is a character."""
    places, place = [], start
    for element in elements:
        places.append(place)
        place += element not in (ONE, ANY)
    return places


def _num_open(elements: list[str]) -> int:
    """Count the elements at the front that may be blanks."""
    closed = (n for n, e in enumerate(elements) if not (e in (ONE, ANY) or e.isspace()))
    return next(closed, len(elements))


class _Columns:
    """The elements of one side as sets of places, each a number with one bit per place."""

    def __init__(self, elements: list[str]):
        self.size = len(elements)
        self.of: dict[str, int] = {}
        for place, element in enumerate(elements):
            self.of[element] = self.of.get(element, 0) | 1 << place
        self.any, self.one = self.of.pop(ANY, 0), self.of.pop(ONE, 0)
        self.single = ((1 << self.size) - 1) & ~self.any

    def fits(self, element: str) -> int:
        """Find the places whose one character the element can be."""
        return self.single if element == ONE else self.of.get(element, 0) | self.one

    def forward(self, reached: int, element: str | None) -> int:
        """Add what is reached without leaving the other side's element."""
        reached |= (reached & self.any) << 1
        if element == ANY and reached:
            reached = (1 << self.size + 1) - (reached & -reached)
        return reached

    def backward(self, reached: int, element: str | None) -> int:
        reached |= (reached >> 1) & self.any
        return (1 << reached.bit_length()) - 1 if element == ANY else reached


def _search(
    a: list[str], b: list[str], is_open_start: bool, is_open_end: bool
) -> list[tuple[int, int]] | None:
    """Find the sure pairs of elements; None if the texts cannot be equal.

    A way is a path of places (in a, in b). One pass back finds the places from which an end can be
    reached, one pass forth those that a start reaches. What lies on no whole way is left out.
    """
    columns, rows = _Columns(b), [*a, None]
    lead, own_lead = (_num_open(side) if is_open_start else 0 for side in (a, b))
    trail, own_trail = (_num_open(side[::-1]) if is_open_end else 0 for side in (a, b))
    start = (1 << own_lead + 1) - 1
    end = (1 << len(b) + 1) - (1 << len(b) - own_trail)
    leads_on = [0] * (len(a) + 2)
    starts_behind = [False] * (len(a) + 2)  # whether a whole way starts at this place or later
    for i in range(len(a), -1, -1):
        back, element = leads_on[i + 1], rows[i]
        if element not in (ANY, None):
            back = ((back >> 1) & columns.fits(element)) | (back & columns.any)
        back = columns.backward(back | (end if i >= len(a) - trail else 0), element)
        leads_on[i] = back
        starts_behind[i] = starts_behind[i + 1] or (i <= lead and back & start != 0)
    if not starts_behind[0]:
        return None
    found, reached, has_ended = [], 0, False
    for i, element in enumerate(a):
        reached = columns.forward(reached | (start if i <= lead else 0), element)
        has_ended = has_ended or (i >= len(a) - trail and reached & end != 0)
        if element == ANY:
            continue
        ways, hidden = reached & leads_on[i + 1] >> 1, reached & leads_on[i + 1] & columns.any
        seen = ways & columns.of.get(element, 0)
        is_skipped = has_ended or starts_behind[i + 1]
        if element != ONE and not (hidden or ways & columns.one or is_skipped):
            if seen & (seen - 1) == 0:
                found.append((i, seen.bit_length() - 1))
        reached = ((reached & columns.fits(element)) << 1) | (reached & columns.any)
    return found
