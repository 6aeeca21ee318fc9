"""LLaVA and ShareGPT files: every style, every trap, and rows found without holding the file."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.sources import RawSample, Source
from data_tools.sources.llava import open_source
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit

Reasons = Callable[[Source], list[str]]
IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def item(identity: Any, question: str = "<image>\nWhat?", **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "That."}]
    return {"id": identity, "image": "a.png", "conversations": turns, **changes}


def write(folder: Path, items: list[Any], lines: bool) -> Path:
    path = folder / ("x.jsonl" if lines else "x.json")
    encoded = [json.dumps(value, ensure_ascii=False) for value in items]
    path.write_text("\n".join(encoded) if lines else " [\n" + " ,\n".join(encoded) + "\n]\n")
    return path


GOOD = [
    item("one"),
    item(2, "Before <image>\nbetween<image> after", image=["a.png", "sub/b.jpg"]),
    item("text", "caf\u00e9 \U0001f600?", image=None, data_source="sharegpt"),
    {
        "id": "chat",
        "images": ["sub/b.jpg"],
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [IMAGE, text("Who?")]},
            {"role": "assistant", "content": "Me."},
            {"role": "user", "content": "Again?"},
            {"role": "assistant", "content": "Me."},
        ],
    },
    item("link", image="in.png"),
    item("one"),
]


@pytest.mark.parametrize("lines", [False, True])
def test_golden(pictures: Path, png: Callable[..., bytes], reasons: Reasons, lines: bool) -> None:
    source = open_source(str(write(pictures, GOOD, lines)))
    assert reasons(source) == ["one", "2", "text", "chat", "link", "one"], "ids may repeat"
    rows = [row for row in source.rows(0, 6) if isinstance(row, RawSample)]
    one, two, plain, chat, link, _ = rows
    assert one.messages == [
        {"role": "user", "content": [IMAGE, text("What?")]},
        {"role": "assistant", "content": [text("That.")]},
    ]
    assert one.images == [("png", png(10))] == link.images and one.kind == "llava"
    parts = [text("Before "), IMAGE, text("between"), IMAGE, text(" after")]
    assert two.messages[0]["content"] == parts
    assert two.images == [("png", png(10)), ("jpg", png(20, "JPEG"))]
    assert plain.images == [] and plain.kind == "sharegpt"
    assert plain.messages[0]["content"] == [text("caf\u00e9 \U0001f600?")]
    assert [message["role"] for message in chat.messages] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip


def test_each_trap_has_its_reason(pictures: Path, reasons: Reasons) -> None:
    bad = {
        "image_count": [
            item(0, "no mark"),
            item(0, "<image> <image>"),
            item(0, image=None),
            item(0, image=["a.png", "a.png"]),
            item(0, "no mark", image=None, images=["a.png"]),
            item(0, images=["sub/b.jpg"]),
            item(0, image=""),
            {"image": "a.png", "messages": [{"role": "user", "content": [IMAGE, text("<image>")]}]},
        ],
        "image_path": [
            item(0, image="../secret.png"),
            item(0, image=str(pictures.parent / "secret.png")),
            item(0, image="out.png"),
            item(0, image="folder-out/secret.png"),
            item(0, image="sub"),
            item(0, image=7),
        ],
        "image_missing": [item(0, image="gone.png")],
        "image_format": [item(0, image="x.jsonl")],
        "video": [item(0, video="a.mp4")],
        "role": [item(0, conversations=[{"from": "narrator", "value": "x"}])],
        "turn": [item(0, conversations=["x"]), item(0, conversations=[{"from": "gpt"}])],
        "field": [item(0, conversations="x")],
        "conversations": [{"id": 0}],
        "answer": [
            {"question": "q", "answers": ["a", {"answer": "b"}]},
            {"question": "q", "answer": True},
            {"question": "q"},
        ],
        "row": [[1], None],
    }
    rows = [row for group in bad.values() for row in group]
    expected = [reason for reason, group in bad.items() for _ in group]
    assert reasons(open_source(str(write(pictures, rows, lines=True)))) == expected


def test_answers_and_kinds_that_are_not_there(pictures: Path) -> None:
    rows = [
        item(0, "q", image=None, answer=None, data_source="", kind=""),
        {"question": "q", "answer": 0, "source": "sums", "image": [], "images": None},
    ]
    first, second = open_source(str(write(pictures, rows, lines=False))).rows(0, 2)
    assert isinstance(first, RawSample) and isinstance(second, RawSample)
    assert (first.answers, first.kind) == ([], "llava"), "a conversation needs no answer"
    assert (second.answers, second.kind, second.images) == (["0"], "sums", [])


def test_a_mark_inside_a_part_is_a_picture(pictures: Path) -> None:
    turns = [
        {"role": "user", "content": [text("<image>\nWho?")]},
        {"role": "assistant", "content": "Me."},
    ]
    path = write(pictures, [{"image": "a.png", "messages": turns}], lines=True)
    (row,) = open_source(str(path)).rows(0, 1)
    assert isinstance(row, RawSample)
    assert row.messages[0]["content"] == [IMAGE, text("Who?")]


def test_places_in_an_array_are_bytes(pictures: Path, reasons: Reasons) -> None:
    """Multi-byte text, JSON's four blanks, and items without any."""
    rows = [json.dumps(item(f"\u00e9{n}", "\U0001f600"), ensure_ascii=False) for n in range(4)]
    path = pictures / "x.json"
    path.write_bytes(f"\r\n\t [{rows[0]},{rows[1]}\r\n , \t{rows[2]}\n\n,\n{rows[3]} ]\n".encode())
    source = open_source(str(path))
    assert reasons(source) == ["image_count"] * 4, "each parses, and has a picture without a mark"
    path.write_bytes(b" [ ] ")
    assert len(open_source(str(path))) == 0


def test_memory_of_opening_lines_is_bounded(pictures: Path) -> None:
    path = pictures / "x.jsonl"
    line = json.dumps(item(0, "x" * 1000)).encode() + b"\n"
    path.write_bytes(line * 20_000)
    tracemalloc.start()
    try:
        source = open_source(str(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == 20_000 and peak < path.stat().st_size / 5


def test_broken_lines_are_rejected_and_the_rest_read(pictures: Path, reasons: Reasons) -> None:
    good = json.dumps(item("good"))
    lines = [
        good, "", '{"question": NaN}', '{"id": 1, "id": 2}', "{" * 9, "[" * 100_000,
        "\ufeff" + good, good.replace("What", "\\ud800"), good[:-20],
    ]  # fmt: skip
    path = pictures / "x.jsonl"
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe{}\n" + good.encode())
    found = reasons(open_source(str(path)))
    assert found[0] == found[-1] == "good"
    # a lone surrogate is found when the record is encoded: data_tools.builder.check
    assert found[1:-1] == [
        "field", "record_json", "record_json", "record_depth", "record_json", "good",
        "record_json", "text_encoding",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty|starts with ''"),
        (b"\xef\xbb\xbf[]", "byte order mark"),
        (b'{"id": 1}', "not with \\["),
        (b'[{"id": 1}\n,\n{"id": }]', "line 3 is not JSON"),
        (b'[{"id": 1}', "line 1 is not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[\xff]", "not UTF-8"),
        (b"[1\n2]", "line 2 is not JSON .no comma"),
        (b"[,1]", "line 1 is not JSON"),
        (b"[1,\n]", "line 2 is not JSON"),
        (b"[1,,2]", "line 1 is not JSON"),
        (b"[1]\n[2]", "line 2 is not JSON .something follows"),
        ("[\u00a01]".encode(), "line 1 is not JSON"),
    ],
)
def test_array_that_is_not_json(pictures: Path, content: bytes, message: str) -> None:
    path = pictures / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(str(path))


def test_lines_with_a_byte_order_mark(pictures: Path) -> None:
    path = pictures / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{}\n")
    with pytest.raises(UserError, match=r"x\.jsonl: starts with a byte order mark"):
        open_source(str(path))


def test_images_root_and_digest(pictures: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "annotations"
    elsewhere.mkdir()
    path = write(elsewhere, GOOD, lines=False)
    source = open_source(str(path), images=str(pictures))
    assert isinstance(next(iter(source.rows(0, 1))), RawSample)
    assert open_source(str(path)).digest == source.digest
    write(elsewhere, GOOD[1:], lines=False)
    assert open_source(str(path)).digest != source.digest
    with pytest.raises(UserError, match="no such folder of images"):
        open_source(str(path), images=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no such file"):
        open_source(str(tmp_path / "nowhere.json"))
