"""Another sample's question in front of this sample's answer, by indices alone."""

import pytest
import torch

from genrecal_ds.data.batch import collate
from genrecal_ds.data.pair import EncodedChat, Pair
from genrecal_ds.objectives.probes import exchanged_questions

pytestmark = pytest.mark.unit


def chat(*lengths: int) -> EncodedChat:
    """Lengths of q1, a1, q2, a2 ..."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    spans = list(zip(ends, ends[1:], strict=False))
    return EncodedChat(torch.arange(ends[-1]) + 3, tuple(spans[1::2]), {}, {})


@pytest.mark.parametrize("with_regular", [False, True])
def test_questions_come_from_the_next_sample_counted_from_their_ends(with_regular):
    # Students' sequences: q of 3, a of 2 | q of 5, a of 1, q of 2, a of 1 | q of 2, a of 4; S = 9
    pairs = [
        Pair(chat(2, 2), chat(3, 2)),
        Pair(chat(4, 1, 1, 2), chat(5, 1, 2, 1)),
        Pair(chat(1, 3), chat(2, 4)),
    ]
    batch = collate(pairs, pairs[0], ({}, {}), with_regular)
    moved = exchanged_questions(batch.teacher, student_length=9)
    source = batch.teacher.layout.source_P
    assert torch.equal(moved[source < 0], source[source < 0])  # the teacher's rows stay
    own = source[source >= 0].tolist()
    assert own == [0, 1, 2, 9, 10, 11, 12, 13, 15, 16, 18, 19]
    other = moved[source >= 0].tolist()
    # the second's first question ends at 13, the third's (for both turns) at 19, the first's at 2
    assert other == [11, 12, 13, 18, 18, 18, 18, 19, 18, 19, 1, 2]
