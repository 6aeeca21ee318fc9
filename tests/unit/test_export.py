"""A checkpoint in the middle of a stage as a plain folder, ties included."""

import pytest
import torch
from safetensors.torch import load_file

from genrecal_ds.export import export_checkpoint
from genrecal_ds.models.vlm import load_vlm, plain_model
from genrecal_ds.training import checkpoint, manifest
from tests.zoo import build

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("row", ["internvl", "qwen2"])
def test_a_tied_head_follows_its_trained_embedding(tmp_path, monkeypatch, row):
    """A head left at its first values would be another tensor, and the folder an untied model."""
    source = build(row, tmp_path / "source")
    student = load_vlm(source)
    name = next(n for n, _, part in student.components() if part == "embeddings")
    trained = student.get_parameter(name).detach() + 1
    monkeypatch.setattr(checkpoint, "verify", lambda path: None)
    monkeypatch.setattr(checkpoint, "consolidate", lambda path: {f"student.{name}": trained})
    monkeypatch.setattr(manifest, "read_manifest", lambda path: {"student": str(source)})
    export_checkpoint(tmp_path / "step", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == load_file(source / "model.safetensors").keys()
    model = plain_model(tmp_path / "out")
    assert model.config.tie_word_embeddings and load_vlm(tmp_path / "out").is_tied
    assert torch.equal(model.get_output_embeddings().weight, trained)
