"""What a folder or a recipe can get wrong about a model, each refused in one line that says so.

Tokenizers: test_tokenizers.py. Code of a folder: test_remote_code.py.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from genrecal_ds.errors import UserError
from genrecal_ds.models.families import FAMILIES
from genrecal_ds.models.head import load_final_norm, load_frozen_head
from genrecal_ds.models.language_head import LogitTransform
from genrecal_ds.models.vlm import VLM, load_vlm
from tests.unit.models.test_vlm_every_pair import CPU

pytestmark = pytest.mark.unit


def copy_of(folder, out, drop=()):
    shutil.copytree(folder, out)
    state = load_file(out / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith(tuple(drop) or "-")}
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    return out


def test_missing_vision_weights(zoo, tmp_path):
    names = load_file(zoo("internvl") / "model.safetensors").keys()
    prefix = next(name for name in names if "vision" in name).split(".")[0]
    folder = copy_of(zoo("internvl"), tmp_path / "blind", [prefix])
    with pytest.raises(UserError, match="no weights for model.vision_tower.* and .* more"):
        load_vlm(folder)


def test_pickled_weights(zoo, tmp_path):
    folder = copy_of(zoo("llama"), tmp_path / "pickle")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle, which can run code; save"):
        load_vlm(folder)


def test_an_attention_that_would_ignore_a_softcap(zoo):
    with pytest.raises(UserError, match="attention: sdpa ignores its softcap of 10.0"):
        VLM.from_config(zoo("gemma2"), torch.float32, attention="sdpa")


def test_packing_where_samples_would_see_each_other(zoo, monkeypatch):
    monkeypatch.setitem(FAMILIES, "internvl", replace(FAMILIES["internvl"], packs=False))
    with pytest.raises(UserError, match="pack: internvl samples do not stay apart"):
        VLM.from_config(zoo("internvl"), torch.float32, pack=True)
    assert VLM.from_config(zoo("internvl"), torch.float32, pack=None).pack is False


def test_no_config(tmp_path):
    with pytest.raises(UserError, match="no config.json; name a Hugging Face model folder"):
        load_vlm(tmp_path)


@pytest.mark.parametrize("row", ["internvl", "qwen2_vl", "gemma2"])
@pytest.mark.parametrize("pack", [True, False])
def test_the_check_of_logits_passes_on_a_sound_model(zoo, row, pack):
    load_vlm(zoo(row), pack=pack).eval().check(torch.arange(8)[None])


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(softcap=4.0)])
def test_logits_that_change_behind_the_head(zoo, transform):
    """gemma2's real softcap is 5: no softcap, and another one, are both noticed."""
    vlm = load_vlm(zoo("gemma2")).eval()
    ids = torch.arange(8)[None]
    vlm.check(ids)
    vlm.head.transform = transform
    with pytest.raises(UserError, match="head.body.x.. differs from its logits by"):
        vlm.check(ids)


def test_a_head_of_another_kind(zoo):
    model = load_vlm(zoo("llama")).model
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match="head Sequential has no adapter"):
        VLM(model)


def test_the_frozen_head_is_the_models_own(zoo):
    """Tied, untied, softcapped, of names that transformers changes on load."""
    for row in ("qwen2_vl", "internvl", "gemma2", "qwen2"):
        vlm, head = load_vlm(zoo(row)), load_frozen_head(zoo(row), torch.float32, CPU)
        assert torch.equal(head.weight_VH, vlm.head.weight.detach())
        assert (head.scale, head.softcap) == vlm.head.transform
        norm = next(p for name, p, component in vlm.components() if component == "norm")
        expected = norm.detach() + 1 if row == "gemma2" else norm.detach()
        assert torch.equal(load_final_norm(zoo(row)), expected)


def test_a_model_type_without_facts_names_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip-2"}))
    with pytest.raises(UserError, match="blip-2 has no adapter; known: .*internvl"):
        VLM.from_config(tmp_path, torch.float32)
