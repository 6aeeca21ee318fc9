"""A head that is stored beside its embedding: kept where it differs, as transformers keeps it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMultimodalLM

from genrecal_ds.errors import UserError
from genrecal_ds.models.config_file import auto_class, read_config
from genrecal_ds.models.head import load_frozen_head
from genrecal_ds.models.loading import find_sources, untie
from genrecal_ds.models.replica import load_replica
from genrecal_ds.models.saving import write_student
from genrecal_ds.models.tensor_files import Checkpoint
from genrecal_ds.models.vlm import load_vlm, plain_model, skeleton
from tests.unit.models.test_vlm_every_pair import CPU

pytestmark = pytest.mark.unit
IDS = torch.arange(3, 11)[None]
TIED = ["internvl", "ovis2", "gemma3", "qwen2", "gemma2"]
LEVELS = ["absent", "absent, text untied", "top", "both"]  # where config.json says tied


def with_head(folder, out, change, says="both"):
    """The folder with a head stored too: its embedding [V, D], changed; config.json as `says`."""
    config = read_config(folder)
    untie(config)
    model = auto_class(config).from_pretrained(folder, config=config)
    with torch.no_grad():
        model.lm_head.weight.copy_(change(model.get_input_embeddings().weight.clone()))
    shutil.copytree(folder, out)
    model.save_pretrained(out)
    stored = json.loads((out / "config.json").read_text())
    text = stored.get("text_config", {})
    stored.pop("tie_word_embeddings", None), text.pop("tie_word_embeddings", None)
    if says in ("top", "both"):
        stored["tie_word_embeddings"] = True
    if says != "absent":
        text["tie_word_embeddings"] = says == "both"
    (out / "config.json").write_text(json.dumps(stored))
    return out


def another(weight):
    return weight.flip(0)


def another_last_row(weight):
    weight[-1] += 0.5
    return weight


def logits_of(model):
    with torch.no_grad():
        extra = {"token_type_ids": torch.zeros_like(IDS)}
        takes_types = model.config.model_type == "gemma3"
        return model.eval()(input_ids=IDS, **extra if takes_types else {}).logits


@pytest.mark.parametrize("change", [another, another_last_row])
@pytest.mark.parametrize("row", TIED)
def test_a_stored_head_that_differs_is_the_head(zoo, tmp_path, row, change):
    """Whatever the config says: logits are those of transformers' own loading."""
    folder = with_head(zoo(row), tmp_path / "own", change)
    theirs = plain_model(folder)
    vlm = load_vlm(folder)
    assert not vlm.is_tied and not skeleton(folder).is_tied
    torch.testing.assert_close(logits_of(vlm.model), logits_of(theirs), rtol=0, atol=1e-5)
    assert (logits_of(vlm.model) - logits_of(load_vlm(zoo(row)).model)).abs().max() > 1e-3
    weight = theirs.lm_head.weight.detach()
    assert torch.equal(load_frozen_head(folder, torch.float32, CPU).weight_VH, weight)
    assert torch.equal(load_replica(folder, torch.float32, CPU).head.weight, weight)


@pytest.mark.parametrize("says", LEVELS)
@pytest.mark.parametrize("row", ["internvl", "ovis2", "qwen2"])
def test_wherever_the_config_says_tied_or_nothing(zoo, tmp_path, row, says):
    folder = with_head(zoo(row), tmp_path / "own", another, says)
    assert not load_vlm(folder).is_tied
    ours, theirs = load_vlm(folder).model, plain_model(folder)
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=0, atol=1e-5)


def test_mistral3_is_tied_by_its_class_alone(tmp_path):
    text = dict(model_type="mistral", hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2, vocab_size=40)  # fmt: skip
    vision = dict(model_type="pixtral", hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                  num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
    config = AutoConfig.for_model("mistral3", text_config=text, vision_config=vision)
    untie(config)
    AutoModelForMultimodalLM.from_config(config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read_config(tmp_path).tie_word_embeddings and not skeleton(tmp_path).is_tied
    assert torch.equal(load_vlm(tmp_path).head.weight, plain_model(tmp_path).lm_head.weight)


@pytest.mark.parametrize("row", TIED)
def test_a_stored_head_that_equals_the_embedding_stays_tied(zoo, tmp_path, row):
    folder = with_head(zoo(row), tmp_path / "copy", lambda weight: weight)
    assert load_vlm(folder).is_tied and skeleton(folder).is_tied
    assert plain_model(folder).config.tie_word_embeddings


@pytest.mark.parametrize("row", ["internvl", "qwen2"])
def test_a_head_stored_alone_is_the_embedding_too(zoo, tmp_path, row):
    folder = with_head(zoo(row), tmp_path / "head", another)
    state = load_file(folder / "model.safetensors")
    state.pop(next(name for name in state if name.endswith("embed_tokens.weight")))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    vlm = load_vlm(folder)
    assert vlm.is_tied
    torch.testing.assert_close(
        logits_of(vlm.model), logits_of(plain_model(folder)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("row, levels, is_tied", [
    ("qwen2_vl", {"text": True}, True),  # as saved before transformers 5
    ("llava", {"text": True}, True),
    ("internvl", {"text": False}, True),  # its class says tied, and its files have one tensor
    ("internvl", {}, True),
    ("internvl", {"top": True, "text": False}, True),
    ("internvl", {"top": False, "text": True}, None),  # transformers: a random head
    ("qwen2", {}, None),
])  # fmt: skip
def test_one_tensor_and_either_level_of_the_config(zoo, tmp_path, row, levels, is_tied):
    """Tied where transformers ties; refused where it would leave the head random."""
    shutil.copytree(zoo(row), tmp_path / "one")
    folder = tmp_path / "one"
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.endswith("lm_head.weight")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    for place, key in ((stored, "top"), (stored.get("text_config", {}), "text")):
        place.pop("tie_word_embeddings", None)
        place |= {"tie_word_embeddings": levels[key]} if key in levels else {}
    (folder / "config.json").write_text(json.dumps(stored))
    if is_tied is None:
        with pytest.raises(UserError, match="no weights for lm_head.weight; where the head is the "
                           "embedding, write tie_word_embeddings: true at the top"):  # fmt: skip
            load_vlm(folder)
        return
    vlm, theirs = load_vlm(folder), plain_model(folder)
    assert vlm.is_tied and theirs.lm_head.weight is theirs.get_input_embeddings().weight
    torch.testing.assert_close(logits_of(vlm.model), logits_of(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("load", [lambda folder: load_vlm(folder).model, plain_model])
@pytest.mark.parametrize("row", ["internvl", "qwen2"])
def test_the_saved_student_keeps_both_and_says_so(zoo, tmp_path, row, load):
    folder = with_head(zoo(row), tmp_path / "own", another)
    model = load(folder)
    write_student(model, model.state_dict(), folder, tmp_path / "out")
    assert not read_config(tmp_path / "out").tie_word_embeddings
    again = load_vlm(tmp_path / "out").model
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=0, atol=1e-5)


def test_a_tied_model_given_two_tensors_is_refused(zoo, tmp_path):
    """find_sources alone: no caller may build a tied model for such files."""
    folder = with_head(zoo("qwen2"), tmp_path / "own", another)
    with torch.device("meta"):
        tied = auto_class(read_config(folder)).from_config(read_config(folder))
    with pytest.raises(UserError, match="embed_tokens.weight and lm_head.weight differ, but Qwen2"):
        find_sources(tied, Checkpoint(folder))
