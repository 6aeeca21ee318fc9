"""docs/map.md equals the tree, and every module says in one line what it does."""

import pytest

from tests import file_map

pytestmark = pytest.mark.unit


def test_the_file_map_equals_the_tree():
    assert file_map.MAP.read_text() == file_map.map_text(), "docs/map.md is old: run `make map`"


@pytest.mark.parametrize("package", file_map.PACKAGES)
def test_every_module_says_in_one_line_what_it_does(package: str):
    paths = (file_map.ROOT / package).rglob("*.py")
    lines = {path: file_map.first_line(path) for path in paths}
    assert [path for path, line in lines.items() if len(line) > 100] == []
