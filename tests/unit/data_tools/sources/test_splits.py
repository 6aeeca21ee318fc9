"""Which files of a folder are meant: splits are chosen, and merged, by name only."""

from pathlib import Path

import pytest

from data_tools.sources.splits import files_of
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.p", "train-00001-of-00002.p", "validation-0.p", "test-0.p"),
        ("data/train-00000-of-00002.p", "data/train-00001-of-00002.p", "data/validation-0.p",
         "data/test-0.p"),
        ("train/0000.p", "train/0001.p", "validation/0000.p", "test/0000.p"),
        ("x_train_1.p", "x_train_2.p", "x_validation.p", "x_test.p"),
    ],
)  # fmt: skip
def test_a_hubs_folder_needs_a_split(tmp_path: Path, names: tuple[str, ...]) -> None:
    touch(tmp_path, *names, "README.md", ".hidden-test.p")
    train, validation, test = (
        [tmp_path / name for name in names[a:b]] for a, b in ((0, 2), (2, 3), (3, 4))
    )
    with pytest.raises(UserError) as caught:
        files_of(tmp_path, ".p", None)
    assert str(caught.value).endswith(
        "holds the splits train, test, validation; choose --split train, or several by name: "
        "--split train+test"
    )
    assert files_of(tmp_path, ".p", "train") == train
    assert files_of(tmp_path, ".p", "test") == test
    assert files_of(tmp_path, ".p", "validation+train") == [*validation, *train]
    with pytest.raises(UserError, match="--split val: .* has test, train, validation"):
        files_of(tmp_path, ".p", "val")


def test_folders_of_one_split_or_of_none(tmp_path: Path) -> None:
    plain = touch(tmp_path / "a", "1.p", "0.p", "c-00000-of-00001.p")
    assert [f.name for f in files_of(plain, ".p", None)] == ["0.p", "1.p", "c-00000-of-00001.p"]
    with pytest.raises(UserError, match="--split train: .* has no file named after a split"):
        files_of(plain, ".p", "train")
    one = touch(tmp_path / "b", "train-0.p", "train-1.p")
    assert len(files_of(one, ".p", None)) == 2 == len(files_of(one, ".p", "train"))
    assert files_of(one / "train-0.p", ".p", None) == [one / "train-0.p"]
    mixed = touch(tmp_path / "c", "train-0.p", "extra.p")
    with pytest.raises(UserError, match="splits train, extra"):
        files_of(mixed, ".p", None)


def test_a_repository_of_several_sets_names_them(tmp_path: Path) -> None:
    touch(tmp_path, "ai2d/train-0.p", "chart/train-0.p")
    with pytest.raises(UserError, match="lacks any .p file; name one of ai2d, chart"):
        files_of(tmp_path, ".p", None)
    with pytest.raises(UserError, match="lacks any .p file; name a folder of them"):
        files_of(tmp_path / "nowhere", ".p", None)
