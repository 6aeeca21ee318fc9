"""Which rows stand beside each other, the distances by hand, and what is refused."""

import pytest
import torch

from genrecal_ds import IGNORE
from genrecal_ds.data.batch import PairBatch
from genrecal_ds.errors import UserError
from genrecal_ds.objectives.logit_kd import divergence
from genrecal_ds.objectives.student_kd import paired_rows
from genrecal_ds.objectives.uld import sorted_distance
from genrecal_ds.recipe.recipe_file import load_recipe
from genrecal_ds.recipe.stage_config import LossConfig
from genrecal_ds.training.inputs import open_inputs
from tests.fixtures import recipe_tree, write_recipe

pytestmark = pytest.mark.unit


class Side:
    def __init__(self, suffix: str, lengths: list[int], ignored: list[int]):
        boundary = torch.tensor([place == 0 for n in lengths for place in range(n)])
        labels = torch.arange(sum(lengths))
        labels[ignored] = IGNORE
        setattr(self, f"boundary_{suffix}", boundary)
        setattr(self, f"labels_{suffix}", labels)


def test_the_same_place_of_the_same_turn():
    student, teacher = Side("M", [3, 1, 2, 2], [6, 7]), Side("N", [2, 4, 2, 1], [8])
    index, is_paired = paired_rows(PairBatch(student, teacher, 3, 6, 8))
    # turns of the teacher begin at rows 0, 2, 6, 8; the last one is a placeholder's
    assert is_paired.tolist() == [True, True, False, True, True, True, False, False]
    assert index[is_paired].tolist() == [0, 1, 2, 6, 7]


def test_sorted_distance_by_hand():
    student = torch.tensor([[0.5, 0.25, 0.25]]).log()
    teacher = torch.tensor([[0.1, 0.7, 0.1, 0.1]]).log()
    # .7 .1 .1 .1 beside .5 .25 .25 0
    assert sorted_distance(student, teacher).item() == pytest.approx(0.2 + 0.15 + 0.15 + 0.1)
    same = sorted_distance(student[:, [2, 0, 1]], student)
    assert same.item() == pytest.approx(0, abs=1e-6)  # which token it is does not matter


@pytest.mark.parametrize(
    ("name", "expected"), [("forward_kl", 0.0853), ("reverse_kl", 0.0823), ("skew_kl", 0.0687)]
)
def test_divergences_of_the_tokens_there_are(name, expected):
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.3, 0.7]])
    m = 0.1 * p + 0.9 * q
    by_hand = {
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "skew_kl": p * (p / m).log(),
    }  # fmt: skip
    padded = torch.cat([q.log(), torch.full((1, 3), 9.0)], -1)  # of a head that is larger
    distance = divergence(LossConfig(divergence=name), vocabulary=2)
    found = distance(padded, p.log()).item()
    assert found == pytest.approx(by_hand[name].sum().item(), rel=1e-5)
    assert found == pytest.approx(expected, rel=0.05)


def test_two_tokenizers_are_refused(tmp_path, pair, shards):
    tree = recipe_tree(tmp_path, pair, shards, stages=[{"kind": "logit_kd", "steps": 2}])
    with pytest.raises(UserError, match="logit_kd needs one tokenizer.*take distill or uld"):
        open_inputs(load_recipe(write_recipe(tmp_path / "r.yaml", **tree)))
