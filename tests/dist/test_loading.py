"""Weights arrive sharded: bit-equal, and each rank reads only what it owns."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from genrecal_ds.errors import UserError
from genrecal_ds.models.loading import load_full
from genrecal_ds.models.vlm import VLM, skeleton
from tests.fixtures import ROOT, run_ranks
from tests.unit.models.test_loading_ties import another, with_head
from tests.zoo import build

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folders(pair, tmp_path_factory):
    """Names as in the model and of older releases, tied and untied, seeing and text only."""
    root = tmp_path_factory.mktemp("rows")
    rows = ["qwen2_5_vl", "llava", "gemma2", "qwen2"]
    return [
        pair / "teacher_init",
        pair / "student_init",
        pair / "student_untied",
        *(build(row, root / row) for row in rows),
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sharded_load_is_bit_equal(folders, world_size):
    run_ranks(ROOT / "tests/dist/ranks_loading.py", folders, world_size)


@pytest.mark.parametrize("row", ["internvl", "qwen2"])
def test_a_stored_head_that_differs_is_kept_by_every_rank(row, tmp_path):
    """The config says tied; logits and ties are those of transformers' own loading.

    The second head differs by less than bf16 can hold: the choice is made in the files' numbers.
    """
    zoo = build(row, tmp_path / "zoo")
    heads = {"other": another, "near": lambda weight: weight * (1 + 2**-20)}
    folders = [with_head(zoo, tmp_path / name, change) for name, change in heads.items()]
    run_ranks(ROOT / "tests/dist/ranks_untied.py", folders, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_no_rank_holds_more_than_its_share_and_one_tensor(folders, large, world_size):
    sizes = [parameter.numel() * 4 for parameter in skeleton(large).parameters()]
    script, arguments = "tests/dist/ranks_memory.py", [large, sum(sizes), max(sizes), folders[-1]]
    output = run_ranks(ROOT / script, arguments, world_size, is_fresh=True)
    assert output.count("allowed") == 1  # rank 0's; the others check themselves


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A text model of 300 MiB, its largest tensor a tenth: shares can be told from the rest."""
    folder = tmp_path_factory.mktemp("large")
    config = AutoConfig.for_model(
        "llama", hidden_size=1024, intermediate_size=2816, num_hidden_layers=5,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=8000, tie_word_embeddings=False,
    )  # fmt: skip
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def broken(folder, out, change):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    state = model.state_dict()
    change(model, state)
    model.save_pretrained(out, state_dict=state)
    return out


def test_a_missing_tensor_is_refused_not_random(pair, tmp_path):
    def drop(model, state):
        del state["model.visual.merger.ln_q.weight"]

    folder = broken(pair / "teacher_init", tmp_path / "missing", drop)
    with pytest.raises(UserError, match="no weights for model.visual.merger.ln_q.weight"):
        load_full(VLM.from_config(folder, torch.float32).model, folder)


def test_another_shape_and_a_foreign_tensor_are_refused(pair, tmp_path):
    def reshape(model, state):
        state["lm_head.weight"] = torch.zeros(7, 128)

    folder = broken(pair / "teacher_init", tmp_path / "shape", reshape)
    with pytest.raises(UserError, match="has shape"):
        load_full(VLM.from_config(folder, torch.float32).model, folder)

    def add(model, state):
        state["model.language_model.extra.weight"] = torch.zeros(2)

    folder = broken(pair / "teacher_init", tmp_path / "foreign", add)
    with pytest.raises(UserError, match="fits no parameter"):
        load_full(VLM.from_config(folder, torch.float32).model, folder)
