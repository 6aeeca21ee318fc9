"""Folders with code of their own: refused without being run, and used once every file is listed."""

import pytest
import torch

from genrecal_ds.errors import UserError
from genrecal_ds.models import remote
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.families import FAMILIES
from genrecal_ds.models.vlm import VLM, load_vlm
from tests.unit.models.test_vlm_every_family import encode, own_answer_logits
from tests.unit.models.test_vlm_every_pair import stage, train
from tests.zoo.remote import FAMILY, build_looker

pytestmark = pytest.mark.unit


@pytest.fixture
def marker(tmp_path, monkeypatch):
    path = tmp_path / "ran"
    monkeypatch.setenv("GENRECAL_TEST_MARKER", str(path))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield path
    FAMILIES.pop("looker", None)
    remote._allowed.clear()


def test_code_of_a_folder_is_refused_and_not_run(tmp_path, marker):
    folder = build_looker(tmp_path / "looker")
    for attempt in (lambda: VLM.from_config(folder, torch.float32), lambda: ChatEncoder(folder, 9)):
        with pytest.raises(UserError, match="looker runs Python code of its own folder"):
            attempt()
    assert not marker.exists()


@pytest.mark.parametrize("change", ["one byte more", "a file more", "a file less"])
def test_a_file_that_is_not_as_listed_is_refused_and_not_run(tmp_path, marker, change):
    folder = build_looker(tmp_path / "looker")
    files = remote.code_of(folder)
    path = folder / "modeling_looker.py"
    if change == "one byte more":
        path.write_text(path.read_text() + "\n")
    elif change == "a file less":
        path.unlink()
    else:
        (folder / "sub").mkdir()
        (folder / "sub/extra.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="allow_remote_code.files: .*py is .*the recipe says"):
        remote.allow(folder, files, FAMILY)
    with pytest.raises(UserError, match="runs Python code"):
        VLM.from_config(folder, torch.float32)
    assert not marker.exists()


def test_listed_code_runs_and_both_roles_learn(tmp_path, marker, zoo):
    folder = build_looker(tmp_path / "looker")
    remote.allow(folder, remote.code_of(folder), FAMILY)
    pairs, batch = encode(folder)
    with torch.no_grad():
        vlm = load_vlm(folder).eval()
        logits = vlm.head(vlm.body(*batch.inputs).flatten(0, 1)[batch.rows_M])
        torch.testing.assert_close(logits, own_answer_logits(folder, pairs), rtol=1e-4, atol=2e-5)
    assert marker.exists()
    for teacher, student in (
        (folder, zoo("internvl", "spm_bpe")),
        (zoo("qwen2_vl", "tiktoken"), folder),
    ):
        losses = train(stage(teacher, student, trains_student=True))
        assert losses[0] >= losses[1] >= losses[2]


def test_a_family_that_transformers_has_needs_no_permission(tmp_path, marker, zoo):
    with pytest.raises(UserError, match="transformers has internvl of its own"):
        remote.allow(zoo("internvl"), {}, FAMILY)
