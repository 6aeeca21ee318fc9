"""A folder's files against their index: what is missing, torn or double is named in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from genrecal_ds.errors import UserError
from genrecal_ds.models.tensor_files import Checkpoint, FlatRun, Source, are_equal, has_safetensors
from genrecal_ds.models.vlm import plain_model, skeleton

pytestmark = pytest.mark.unit
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
INDEX = "model.safetensors.index.json"


def write(folder, contents, weight_map):
    for name, state in contents.items():
        save_file(state, folder / name, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path):
    contents = {FILES[0]: {"a": STATE["a"]}, FILES[1]: {"b": STATE["b"]}}
    write(tmp_path, contents, {"a": FILES[0], "b": FILES[1]})
    return tmp_path


def test_tensors_of_several_files(sharded):
    checkpoint = Checkpoint(sharded)
    assert has_safetensors(sharded) and sorted(checkpoint.names) == ["a", "b"]
    assert all(torch.equal(checkpoint.tensor(name), STATE[name]) for name in STATE)


def test_a_file_that_the_index_names_is_missing(sharded):
    (sharded / FILES[1]).unlink()
    with pytest.raises(UserError, match=f"{INDEX}: names {FILES[1]}, not in the folder; download"):
        Checkpoint(sharded)
    (sharded / FILES[0]).unlink()
    with pytest.raises(UserError, match=f"names {FILES[0]} and 1 more files, not in the folder"):
        Checkpoint(sharded)


def test_config_and_index_alone_can_be_planned_with(zoo, tmp_path):
    shutil.copy(zoo("qwen2") / "config.json", tmp_path)
    assert not has_safetensors(tmp_path) and skeleton(tmp_path).is_tied
    write(tmp_path, {}, {"model.embed_tokens.weight": FILES[0]})
    assert not has_safetensors(tmp_path) and skeleton(tmp_path).is_tied


def test_a_torn_file_and_a_pointer_in_its_place(sharded):
    path = sharded / FILES[1]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=f"{FILES[1]}: not a whole safetensors file: .*; take all"):
        Checkpoint(sharded)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n")
    with pytest.raises(UserError, match=f"{FILES[1]}: not a whole safetensors file: .*; take all"):
        Checkpoint(sharded)


def test_an_index_of_another_release(sharded):
    write(sharded, {}, {"a": FILES[0], "b": FILES[1], "c": FILES[1]})
    with pytest.raises(UserError, match=f"{INDEX}: {FILES[1]} has no c; take all its files"):
        Checkpoint(sharded)
    write(sharded, {FILES[1]: STATE}, {"a": FILES[0], "b": FILES[1]})
    with pytest.raises(UserError, match=f"a is in {FILES[0]} and in {FILES[1]}; take all"):
        Checkpoint(sharded)
    (sharded / INDEX).write_text("{")
    with pytest.raises(UserError, match=f"{INDEX}: not an index with a weight_map; download"):
        Checkpoint(sharded)


def test_a_tensor_that_the_index_forgot_is_there(sharded):
    """transformers reads whole files, so such a tensor is not one to lose."""
    write(
        sharded, {FILES[1]: {"b": STATE["b"], "c": torch.ones(1)}}, {"a": FILES[0], "b": FILES[1]}
    )
    assert sorted(Checkpoint(sharded).names) == ["a", "b", "c"]


def test_one_file_beside_an_index(zoo, tmp_path):
    """transformers takes model.safetensors; so does Checkpoint."""
    plain_model(zoo("llama")).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    write(
        tmp_path, {FILES[0]: {n: t + 1 for n, t in state.items()}}, dict.fromkeys(state, FILES[0])
    )
    theirs = plain_model(tmp_path).state_dict()
    checkpoint = Checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.tensor(name), theirs[name]) for name in state)


def test_equality_is_of_every_number(tmp_path, monkeypatch):
    monkeypatch.setattr("genrecal_ds.models.tensor_files._CHUNK", 4)  # several chunks
    state = {"a": torch.randn(5, 3), "last": None, "half": None, "copy": None}
    state["last"], state["copy"] = state["a"].clone(), state["a"].clone()
    state["last"][-1, -1] += 1e-6
    state["half"] = state["a"].bfloat16()
    save_file(state | {"flat": state["a"].flatten().clone()}, tmp_path / "model.safetensors")

    def source(name):
        checkpoint = Checkpoint(tmp_path)
        shape = checkpoint.shape(name)
        return Source(checkpoint, shape, [FlatRun(name, 0, 15)])

    assert are_equal(source("a"), source("copy"))
    assert not any(are_equal(source("a"), source(name)) for name in ("last", "half", "flat"))
    state["last"] = state["a"].clone()
    save_file(state, tmp_path / "model.safetensors")  # nothing remembered of files that changed
    assert are_equal(source("a"), source("last"))
