"""Names of older releases, tensors without a place, buffers, and the check after loading."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from genrecal_ds.errors import UserError
from genrecal_ds.models import loading
from genrecal_ds.models.loading import load_full
from genrecal_ds.models.saving import write_student
from genrecal_ds.models.vlm import VLM, load_vlm, plain_model

pytestmark = pytest.mark.unit


def renamed(folder, out, rename):
    """The folder with every tensor under another name."""
    shutil.copytree(folder, out)
    state = load_file(out / "model.safetensors")
    save_file({rename(n): t for n, t in state.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def with_tensor(folder, out, name, value):
    shutil.copytree(folder, out)
    state = load_file(out / "model.safetensors")
    save_file(state | {name: value}, out / "model.safetensors", {"format": "pt"})
    return out


def without_model(name):
    return name.removeprefix("model.")


def with_vision_model(name):
    """As LLaVA was released: language_model.model. beside vision_tower.vision_model."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("row, rename", [
    ("llama", without_model), ("qwen2", without_model), ("gemma2", without_model),
    ("internvl", without_model), ("smolvlm", without_model),
    ("llava", with_vision_model), ("llava_next", with_vision_model),
])  # fmt: skip
def test_older_names_load_as_transformers_loads_them(zoo, tmp_path, row, rename):
    folder = renamed(zoo(row), tmp_path / "old", rename)
    ours, theirs = load_vlm(folder).model, plain_model(folder)
    expected = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == expected.keys()
    for name, value in ours.named_parameters():
        assert torch.equal(value, expected[name]), name
    before = dict(load_vlm(zoo(row)).model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in ours.named_parameters())


def test_two_names_of_one_parameter(zoo, tmp_path):
    """Equal under both names: loaded. Different: refused, whichever transformers would take."""
    norm = load_file(zoo("llama") / "model.safetensors")["model.norm.weight"]
    load_vlm(with_tensor(zoo("llama"), tmp_path / "same", "norm.weight", norm.clone()))
    folder = with_tensor(zoo("llama"), tmp_path / "other", "norm.weight", norm + 1)
    with pytest.raises(UserError, match="model.norm.weight and norm.weight are both model.norm.we"):
        load_vlm(folder)


def test_what_transformers_leaves_out(zoo, tmp_path):
    """Rotary frequencies of old Llamas follow from the config; a foreign tensor is refused."""
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_vlm(with_tensor(zoo("llama"), tmp_path / "old", frequencies, torch.ones(4)))
    load_vlm(with_tensor(zoo("minicpmv4_6"), tmp_path / "mtp", "mtp.fc.weight", torch.ones(4)))
    folder = with_tensor(zoo("llama"), tmp_path / "foreign", "model.extra.weight", torch.ones(4))
    with pytest.raises(UserError, match="model.extra.weight fits no parameter of LlamaFor"):
        load_vlm(folder)


@pytest.mark.parametrize("row", ["llava", "internvl", "gemma3", "qwen2_vl"])
def test_names_of_today_and_of_the_releases(zoo, tmp_path, row):
    """transformers writes a family's old names unless told otherwise; both are read."""
    saved = load_file(zoo(row) / "model.safetensors")
    plain_model(zoo(row)).save_pretrained(tmp_path, save_original_format=False)
    today = load_file(tmp_path / "model.safetensors")
    old = "model.embed_tokens" if row == "qwen2_vl" else "language_model.model.embed_tokens"
    assert f"{old}.weight" in saved and "model.language_model.embed_tokens.weight" in today
    ours = dict(load_vlm(tmp_path).model.named_parameters())
    for name, value in load_vlm(zoo(row)).model.named_parameters():
        assert torch.equal(value, ours[name]), name


class Counting(nn.Module):
    """Stands for a family with a persistent buffer, such as a batch norm's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))


def test_stored_buffers_are_loaded(zoo, tmp_path):
    folder = with_tensor(
        zoo("llama"), tmp_path / "buffer", "model.counting.seen", torch.tensor(7.0)
    )
    model = VLM.from_config(folder, torch.float32).model
    model.model.counting = Counting()
    load_full(model, folder)
    assert model.model.counting.seen == 7
    load_full(model, zoo("llama"))  # without one: the class's own value stays
    assert model.model.counting.seen == 7
    write_student(model, dict(model.named_parameters()), folder, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.counting.seen"] == 7


def test_a_model_that_does_not_hold_what_was_stored(zoo, monkeypatch):
    """Something after the copy writes over a tensor: the check by value says which."""

    def spoil(model, sources):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[-1, -1] += 1

    monkeypatch.setattr(loading, "load_buffers", spoil)
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight is not what .* holds"):
        load_vlm(zoo("llama"))
