"""CSV and TSV: paths, base64, line breaks in fields, lettered options, and damaged records."""

import base64
import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.sources import RawSample, Source
from data_tools.sources.answers import CHOOSE_LETTER
from data_tools.sources.table import open_source
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit

Reasons = Callable[[Source], list[str]]


def write(path: Path, *rows: list[str], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return path


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_golden(
    pictures: Path, png: Callable[..., bytes], reasons: Reasons, name: str, encoding: str
) -> None:
    data = base64.b64encode(png(40)).decode()
    path = write(
        pictures / name,
        ["id", "image", "question", "answer", "answers"],
        ["a", "a.png", "What,\t\nindeed?", "caf\u00e9", ""],
        ["b", data, "Inline?", "yes", '["yes", "yeah"]'],
        [],
        ["c", f"data:image/png;base64,{data}", 'A "quoted" one?', "no", ""],
        ["d", "", "Text only?", "yes", ""],
        encoding=encoding,
    )
    source = open_source(str(path))
    assert reasons(source) == ["a", "b", "c", "d"]
    a, b, c, d = (row for row in source.rows(0, 4) if isinstance(row, RawSample))
    assert a.messages[0]["content"][1]["text"] == "What,\t\nindeed?" and a.answers == ["caf\u00e9"]
    assert a.images == [("png", png(10))]
    assert b.images == c.images == [("png", png(40))] and b.answers == ["yes", "yeah"]
    assert c.messages[0]["content"][1]["text"] == 'A "quoted" one?'
    assert d.images == [] and len(d.messages[0]["content"]) == 1


def test_vlmevalkit_layout(pictures: Path) -> None:
    path = write(
        pictures / "x.tsv",
        ["index", "image", "question", "hint", "A", "B", "C", "answer", "category"],
        ["17", "a.png", "Which?", "Look up.", "one", "two", "", "B", "logic"],
    )
    (row,) = open_source(str(path)).rows(0, 1)
    assert isinstance(row, RawSample)
    expected = "Look up.\nWhich?\nA. one\nB. two\n" + CHOOSE_LETTER
    assert row.messages[0]["content"][1]["text"] == expected
    assert (row.answers, row.kind, row.source_id) == (["B"], "logic", "17")


def test_options_keep_their_letters(pictures: Path, reasons: Reasons) -> None:
    """Closing a gap would move the right answer to another letter. An option's text means it."""
    path = write(
        pictures / "x.csv",
        ["index", "question", "A", "B", "C", "answer"],
        ["1", "q", "one", "", "three", "C"],
        ["2", "q", "", "two", "", "B"],
        ["3", "q", "one", "two", "", "C"],
        ["4", "q", "one", "two", "", "two"],
        ["5", "q", "", "", "", "free"],
        ["6", "q", "one", "two", "", "B"],
    )
    assert reasons(open_source(str(path))) == ["options", "options", "answer", "4", "5", "6"]


def test_marks_place_the_picture(pictures: Path, reasons: Reasons) -> None:
    path = write(
        pictures / "x.csv",
        ["id", "image", "question", "answer"],
        ["a", "a.png", "Is <image> it?", "yes"],
        ["b", "", "Is <image> it?", "yes"],
    )
    source = open_source(str(path))
    assert reasons(source) == ["a", "image_count"]
    (row,) = source.rows(0, 1)
    assert isinstance(row, RawSample)
    parts = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " it?"}]
    assert row.messages[0]["content"] == parts


def test_each_trap_has_its_reason(pictures: Path, reasons: Reasons) -> None:
    header = ["image", "question", "answer", "answers"]
    bad = {
        "image_path": ["../secret.png", "/etc/passwd", "out.png", "https://x.org/a.png"],
        "image_base64": ["data:image/png,abc", "data:text/html;base64,aaaa", "!" * 100],
        "image_format": [base64.b64encode(b"GIF89a" * 20).decode()],
        "image_missing": ["gone.png"],
    }
    rows = [[value, "q?", "a", ""] for group in bad.values() for value in group]
    expected = [reason for reason, group in bad.items() for _ in group]
    rows += [["", " ", "a", ""], ["", "q?", " ", ""], ["", "q?", "a", "{}"], ["", "q?", "a", "["]]
    rows += [["", "q?", "a"], ["", "q?", "a", "", "more"]]
    expected += ["question", "answer", "answer", "answer", "columns", "columns"]
    path = write(pictures / "x.csv", header, *rows)
    before = csv.field_size_limit()
    assert reasons(open_source(str(path))) == expected
    assert csv.field_size_limit() == before


def test_picture_of_a_megabyte(pictures: Path) -> None:
    data = (pictures / "a.png").read_bytes() + bytes(2**20)
    row = [base64.b64encode(data).decode(), "q?", "a"]
    path = write(pictures / "x.csv", ["image", "question", "answer"], row)
    (sample,) = open_source(str(path)).rows(0, 1)
    assert isinstance(sample, RawSample) and sample.images == [("png", data)]


def test_unreadable_tables(pictures: Path) -> None:
    with pytest.raises(UserError, match="needs columns question and answer, has"):
        open_source(str(write(pictures / "x.csv", ["prompt", "answer"])))
    (pictures / "y.csv").write_bytes(b"question,answer\n\xff,x\n")
    with pytest.raises(UserError, match="save as UTF-8"):
        open_source(str(pictures / "y.csv"))
    for content in (b'q1,a1\nq2,"a2\nq3,a3\n', b'"q" 1,a1\n'):
        # read leniently, the first has the rest of the file as an answer
        (pictures / "y.csv").write_bytes(b"question,answer\n" + content)
        with pytest.raises(UserError, match=r"y\.csv: the record that ends at line .*quotes"):
            open_source(str(pictures / "y.csv"))
    with pytest.raises(UserError, match="'answer'. come twice"):
        open_source(str(write(pictures / "x.csv", ["question", "answer", "answer"])))
    with pytest.raises(UserError, match=r"no such \.csv or \.tsv"):
        open_source(str(pictures / "a.png"))
    path = write(pictures / "z.csv", ["question", "answer"], ["q", "a"])
    before = open_source(str(path)).digest
    write(path, ["question", "answer"], ["q", "b"])
    assert open_source(str(path)).digest != before


def test_more_of_vlmevalkit(pictures: Path, png: Callable[..., bytes], reasons: Reasons) -> None:
    """The index of another row for its picture, lists of pictures, options as a list, nan."""
    one, two = (base64.b64encode(png(red) + bytes(80)).decode() for red in (40, 50))
    header = ["index", "image", "question", "hint", "A", "B", "C", "options", "answer", "category"]
    path = write(
        pictures / "x.tsv",
        header,
        ["0", one, "q", "nan", "x", "y", "nan", "", "B", "logic"],
        ["1", "0", "q", "", "x", "y", "", "", "A", "logic"],
        ["2", f"['{one}', '{two}']", "q", "", "", "", "", "['x', 'y']", "x", ""],
        ["3", "9", "q", "", "x", "y", "", "", "A", ""],
        ["4", "", "q", "", "", "", "", "", "nan", ""],
    )
    source = open_source(str(path))
    assert reasons(source) == ["0", "1", "2", "image_missing", "answer"]
    zero, first, second, third, _ = source.rows(0, 5)
    for row, count in ((zero, 1), (first, 1), (second, 2)):
        assert isinstance(row, RawSample) and len(row.images) == count
        assert row.messages[0]["content"][-1]["text"] == f"q\nA. x\nB. y\n{CHOOSE_LETTER}"
    assert isinstance(zero, RawSample) and isinstance(second, RawSample)
    assert (zero.blank, zero.kind, second.answers) == (["hint", "A to Z"], "logic", ["A"])
    assert second.images[1][1].startswith(png(50))
    assert getattr(third, "source_id", "") == "3", "a reject carries its id"


def test_conversations_in_a_table(pictures: Path) -> None:
    turns = '[{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "x"}]'
    path = write(pictures / "x.csv", ["conversations", "image_path"], [turns, "a.png"])
    (row,) = open_source(str(path)).rows(0, 1)
    assert isinstance(row, RawSample) and len(row.images) == 1 and len(row.messages) == 2
    with pytest.raises(UserError, match="key 'system_text' looks like content"):
        path = write(pictures / "x.csv", ["question", "answer", "system_text"], ["q", "x", "s"])
        list(open_source(str(path)).rows(0, 1))
