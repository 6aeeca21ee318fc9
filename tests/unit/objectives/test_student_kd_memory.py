"""What a distance holds of one chunk, in matrices of its logits' size: within what it is given."""

import random

import pytest
import torch
from torch import nn

from genrecal_ds.models.head import FrozenHead
from genrecal_ds.models.token_bytes import byte_vocabulary
from genrecal_ds.objectives.base import Ingredients
from genrecal_ds.objectives.byte_kd import ByteKD
from genrecal_ds.objectives.logit_kd import divergence
from genrecal_ds.objectives.mot import MultiLevelOT
from genrecal_ds.objectives.report import Clock
from genrecal_ds.objectives.uld import sorted_distance
from genrecal_ds.ops import linear_distance, next_byte
from genrecal_ds.ops.head_loss import Head
from genrecal_ds.recipe.kinds import KINDS
from genrecal_ds.recipe.stage_config import LossConfig, StageConfig
from tests.live_bytes import LiveBytes

pytestmark = pytest.mark.unit
ROWS, WIDTH, VOCABULARY = 64, 2, 30_000
DIVERGENCES = ("forward_kl", "reverse_kl", "skew_kl", "jsd")
TOKEN_DISTANCES = {
    "uld": sorted_distance,
    **{name: divergence(LossConfig(divergence=name), VOCABULARY) for name in DIVERGENCES},
}


def matrices_of(distance) -> float:
    """Held at once by a chunk of all rows: its gradient too, and what a head's softcap keeps."""
    rows = torch.randn(ROWS, WIDTH, requires_grad=True)
    head = Head(torch.randn(VOCABULARY, WIDTH), softcap=30.0)
    with LiveBytes() as live:
        linear_distance.linear_distance(rows, head, distance, sizes=[ROWS])
    return live.peak[""] / (4 * ROWS * VOCABULARY)


def parts(kind, head):
    return Ingredients(StageConfig(kind=kind, steps=1), nn.Module(), None, Clock(), head)


@pytest.mark.parametrize("name", TOKEN_DISTANCES)
def test_token_by_token(name):
    targets, theirs = torch.randn(ROWS, WIDTH), FrozenHead(Head(torch.randn(VOCABULARY, WIDTH)))

    def of_chunk(logits, part):
        return TOKEN_DISTANCES[name](logits, theirs.logits(targets[part]))

    held = matrices_of(of_chunk)
    assert 4 < held < KINDS["uld"].head_matrices == KINDS["logit_kd"].head_matrices, held


def test_by_conversations():
    theirs, targets = FrozenHead(Head(torch.randn(VOCABULARY, WIDTH))), torch.randn(ROWS, WIDTH)
    objective = MultiLevelOT(parts("mot", theirs))
    paired = torch.arange(ROWS), torch.ones(ROWS, dtype=torch.bool)

    def of_conversation(logits, part):
        return objective._of_conversation(logits, targets[part], *paired)

    held = matrices_of(of_conversation)
    assert 4 < held < KINDS["mot"].head_matrices, held


@pytest.mark.parametrize("teacher_rows", [1, 2, 4])  # for one of the student's, at most
def test_byte_by_byte(teacher_rows):
    draw = random.Random(0)
    words = {bytes([byte]) for byte in range(256)}
    while len(words) < VOCABULARY - 1:
        word = bytes(draw.choices(b"etaoinshrdlucmfwypvbgkjqxz", k=draw.randint(1, 8)))
        words.add(b" " + word if draw.random() < 0.6 else word)
    pieces = [*sorted(words), None]
    table = byte_vocabulary(pieces, VOCABULARY - 1, VOCABULARY, torch.device("cpu"))
    # All boundaries of tokens that begin with a blank: more wide ones than a text has.
    tokens = [token for token, piece in enumerate(pieces) if piece and piece[:1] == b" "]
    asked = [
        (row, token, depth)
        for row, token in enumerate(draw.sample(tokens, ROWS))
        for depth in range(len(pieces[token]))
    ]
    at = next_byte.Boundaries(*torch.tensor(asked).T)
    there = at._replace(row=teacher_rows * at.row + at.depth % teacher_rows)
    theirs = FrozenHead(Head(torch.randn(VOCABULARY, WIDTH)))
    targets = torch.randn(teacher_rows * ROWS, WIDTH)
    objective = ByteKD(parts("byte_kd", theirs), (table, table))

    def of_chunk(logits, part):
        teacher = objective.teacher_mass(targets, there, len(logits))
        kl = next_byte.next_byte_kl(teacher, next_byte.next_byte_log_mass(logits, at, table))
        return kl.new_zeros(len(logits)).index_add(0, at.row, kl)

    held = matrices_of(of_chunk)
    assert 4 < held < KINDS["byte_kd"].head_matrices, held
    whole = objective.teacher_mass(targets, there, len(targets))
    torch.testing.assert_close(objective.teacher_mass(targets, there, 7), whole)
