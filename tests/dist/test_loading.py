"""Weights arrive sharded: bit-equal, and each rank reads only what it owns."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from genrecal_ds.errors import UserError
from genrecal_ds.models.loading import load_full
from genrecal_ds.models.vlm import VLM
from tests.fixtures import ROOT, run_ranks

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("world_size", [2, 3])
def test_sharded_load_is_bit_equal(pair, world_size):
    folders = [pair / "teacher_init", pair / "student_init", pair / "student_untied"]
    run_ranks(ROOT / "tests/dist/ranks_loading.py", folders, world_size)


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
