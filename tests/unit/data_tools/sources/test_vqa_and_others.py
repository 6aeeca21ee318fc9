"""Official annotation files, in their exact layout, become golden samples; odd rows their reason.

The fixtures are written by hand, with every official field. Pictures are made here.
"""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_tools.build import FORMATS, main
from data_tools.sources import SHORT_ANSWER
from data_tools.sources.answers import CHOOSE_LETTER
from data_tools.sources.refcoco import PROMPT
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit

FIXTURES = Path(__file__).parent / "fixtures"
PICTURES = {
    "vqav2": ["val2014/COCO_val2014_000000000042.jpg", "val2014/COCO_val2014_000000000073.jpg"],
    "okvqa": ["train2014/COCO_train2014_000000000051.jpg"],
    "textvqa": ["train_images/003a8ae2ef43b901.jpg"],
    "refcoco+": ["train2014/COCO_train2014_000000000007.jpg"],
    "chartqa": ["val/png/41699051005347.png", "val/png/two_col_1.png", "secret.png"],
    "ai2d": ["images/0.png", "images/12.png"],
    "docvqa": ["documents/pybv0228_81.png", "documents/nkbl0226_1.png"],
}
S = SHORT_ANSWER
# (format, folder, split): [(source_id, kind, question, taught, answers)], reasons of rejects
GOLDEN: dict[tuple[str, str, str], tuple[list[tuple], list[str]]] = {
    ("vqav2", "vqav2", "val"): (
        [
            ("42001", "vqav2", "Is the door <script>alert(1)</script> open?" + S, "yes",
             ["yes"] * 7 + ["no"] * 3),
            ("42002", "vqav2", "How many caf\u00e9s?" + S, "2", ["2"] * 10),
            ("73000", "vqav2", "\x1b]0;owned\x07What color?" + S, "red & white",
             ["red & white"] * 6 + ["red"] * 4),
        ],
        ["annotation", "annotation", "image_missing", "annotation"],
    ),
    ("okvqa", "okvqa", "train"): (
        [
            ("510005", "okvqa", "What is this sport?" + S, "race",
             "pony race race race race race pony race pony race".split()),
            ("510006", "okvqa", "Which of them is equally liked?" + S, "b",
             "b a a b c c b a d d".split()),
        ],
        [],
    ),
    ("textvqa", "textvqa", "val"): (
        [
            ("34602", "textvqa", "what is the brand of this camera?" + S, "dakota",
             ["dakota"] * 4 + ["clos culombu", "dakota digital", "dakota digital",
                               "nous les gosses", "dakota", "unanswerable"]),
        ],
        ["question", "answer", "image_path"],
    ),
    ("refcoco", "refcoco+", "train"): (
        [
            ("0-0", "refcoco+", PROMPT + "the lady with the blue shirt",
             "[0.10, 0.26, 0.40, 0.76]", ["[0.1000, 0.2550, 0.4012, 0.7550]"]),
            ("0-1", "refcoco+", PROMPT + "lady with back to us",
             "[0.10, 0.26, 0.40, 0.76]", ["[0.1000, 0.2550, 0.4012, 0.7550]"]),
        ],
        [],
    ),
    ("refcoco", "refcoco+", "testA"): (
        [
            ("1-2", "refcoco+", PROMPT + "man at the edge", "[0.75, 0.00, 1.00, 0.30]",
             ["[0.7500, 0.0000, 1.0000, 0.3000]"]),
        ],
        ["box", "box", "question"],
    ),
    ("chartqa", "chartqa", "val"): (
        [
            ("41699051005347.png#0", "chartqa_human",
             "How many food item is shown in the bar graph?" + S, "14", ["14"]),
            ("two_col_1.png#0", "chartqa_augmented", "What was the share in 2017?" + S, "58.9",
             ["58.9"]),
        ],
        ["image_path", "answer", "image_missing"],
    ),
    ("ai2d", "ai2d", "train"): (
        [
            ("0.png-0", "ai2d", "What is at the top of the food chain?\nA. hawk\nB. mouse\n"
             "C. grass\nD. snake\n" + CHOOSE_LETTER, "A", ["A"]),
        ],
        ["abc_label", "answer"],
    ),
    ("ai2d", "ai2d", "test"): (
        [
            ("12.png-0", "ai2d", "Name the part labelled \u2192\nA. root\nB. leaf\nC. stem\n"
             "D. \u00e9tamine\n" + CHOOSE_LETTER, "D", ["D"]),
        ],
        [],
    ),
    ("docvqa", "docvqa", "val"): (
        [
            ("49153", "docvqa",
             "What is the \u2018actual\u2019 value per 1000, during the year 1975?" + S, "0.28",
             ["0.28"]),
            ("24580", "docvqa", "What is name of university?" + S, "university of california",
             ["university of california", "University of California",
              "university of california, san diego"]),
        ],
        ["image_missing", "answer"],
    ),
}  # fmt: skip


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A copy of the fixtures with pictures, and the pickle that a text file stands for."""
    root = tmp_path / "official"
    shutil.copytree(FIXTURES, root)
    for folder, names in PICTURES.items():
        for number, name in enumerate(names):
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 16), (number * 40, 1, 2)).save(path)
    refs = json.loads((root / "refcoco+/refs(unc).json").read_text())
    (root / "refcoco+/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    return root


def build(official: Path, out: Path, name: str, folder: str, split: str) -> ShardReader:
    options = ["--split", split, "--max-reject-rate", "0.9", "--workers", "1", "--out", str(out)]
    assert main([str(official / folder), "--format", name, *options]) == 0
    return ShardReader(ShardIndex.load(out))


@pytest.mark.parametrize("case", GOLDEN, ids="-".join)
def test_golden_samples(official: Path, tmp_path: Path, case: tuple[str, str, str]) -> None:
    golden, reasons = GOLDEN[case]
    reader = build(official, tmp_path / "out", *case)
    found = []
    for number in range(len(reader)):
        sample = reader.read(number)
        question, answer = sample.messages
        assert question["content"][0] == {"type": "image"} and len(sample.images) == 1
        found.append(
            (
                sample.source_id,
                sample.kind,
                question["content"][1]["text"],
                answer["content"][0]["text"],
                sample.answers,
            )
        )
    assert found == golden
    rejects = (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in rejects] == reasons


def test_the_pictures_are_the_right_ones(official: Path, tmp_path: Path) -> None:
    reader = build(official, tmp_path / "out", "vqav2", "vqav2", "val")
    reds = [reader.read(i).images[0].getpixel((3, 3))[0] for i in range(3)]  # type: ignore[index]
    assert [round(red / 40) for red in reds] == [0, 0, 1], "questions are joined by id, not order"


@pytest.mark.parametrize("case", GOLDEN, ids="-".join)
def test_any_range_of_rows_alone(official: Path, case: tuple[str, str, str]) -> None:
    name, folder, split = case
    source = FORMATS[name](str(official / folder), split=split)
    size = len(source)
    whole = [str(row) for row in source.rows(0, size)]
    assert len(whole) == size == sum(map(len, GOLDEN[case]))
    for start in range(size):
        for stop in range(start, size + 1):
            assert [str(row) for row in source.rows(start, stop)] == whole[start:stop]


@pytest.mark.parametrize("case", list(GOLDEN), ids="-".join)
def test_digest_follows_the_annotations(official: Path, case: tuple[str, str, str]) -> None:
    name, folder, split = case

    def digest() -> str:
        return FORMATS[name](str(official / folder), split=split).digest

    before = digest()
    assert before == digest()
    for path in [*(official / folder).rglob("*.json"), *(official / folder).rglob("*.p")]:
        if path.suffix == ".p":
            refs = pickle.loads(path.read_bytes())
            path.write_bytes(pickle.dumps([*refs, refs[0]], protocol=2))
        elif path.name != "refs(unc).json":
            path.write_text(path.read_text() + "\n")
    assert digest() != before


@pytest.mark.parametrize(
    ("name", "folder", "split", "message"),
    [
        ("vqav2", "vqav2", "test2015", "not public"),
        ("vqav2", "vqav2", "dev", "vqav2 has train, val"),
        ("vqav2", "vqav2", "train", "v2_OpenEnded_mscoco_train2014_questions.json: missing"),
        ("okvqa", "okvqa", "val", "missing"),
        ("textvqa", "textvqa", "test", "not public"),
        ("textvqa", "chartqa", "val", "TextVQA_0.5.1_val.json: missing"),
        ("refcoco", "refcoco+", "val", r"--split val: .* has testA, train"),
        ("refcoco", "vqav2", "train", "holds no refs"),
        ("chartqa", "chartqa", "train", "train_human.json: missing"),
        ("ai2d", "ai2d", "val", "ai2d has train, test"),
        ("ai2d", "vqav2", "train", "ai2d_test_ids.csv: missing"),
        ("docvqa", "docvqa", "test", "not public"),
        ("docvqa", "docvqa", "train", "train_v1.0.json nor train_v1.0_withQT.json"),
    ],
)
def test_wrong_folder_or_split(
    official: Path, name: str, folder: str, split: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        FORMATS[name](str(official / folder), split=split)


def test_vqa_v1_is_not_taken_for_okvqa(official: Path) -> None:
    path = official / "okvqa/mscoco_train2014_annotations.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        for answer in annotation["answers"]:
            del answer["raw_answer"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="this is VQA v1"):
        FORMATS["okvqa"](str(official / "okvqa"))


class Payload:
    """Unpickling it would create the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_runs(official: Path, tmp_path: Path, protocol: int) -> None:
    marker, path = tmp_path / "marker", official / "refcoco+/refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(refs, protocol=protocol))
    assert len(FORMATS["refcoco"](str(path))) == 2, "plain data is read in every protocol"
    path.write_bytes(pickle.dumps([*refs, Payload(marker)], protocol=protocol))
    with pytest.raises(UserError, match="nothing was run"):
        FORMATS["refcoco"](str(path))
    for damaged in (b"", b"\x80\x04", b"not a pickle", pickle.dumps(refs)[:-9]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a pickle of plain data"):
            FORMATS["refcoco"](str(path))
    assert not marker.exists()


def test_two_refs_files_want_a_choice(official: Path) -> None:
    shutil.copy(official / "refcoco+/refs(unc).p", official / "refcoco+/refs(google).p")
    with pytest.raises(UserError, match=r"refs\(google\).p, refs\(unc\).p; name one"):
        FORMATS["refcoco"](str(official / "refcoco+"))


def test_drawn_letters_come_from_abc_images(official: Path) -> None:
    (official / "ai2d/abc_images").mkdir()
    Image.new("RGB", (24, 16), (200, 1, 2)).save(official / "ai2d/abc_images/0.png")
    rows = list(FORMATS["ai2d"](str(official / "ai2d")).rows(0, 3))
    assert rows[1].answers == ["C"] and rows[1].images != rows[0].images


def test_option_of_another_format(official: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(official / "vqav2"), "--format", "vqav2", "--num-samples", "3", "--out", "x"]
    assert main(command) == 2
    assert "--num-samples: --format vqav2 does not take it" in capsys.readouterr().err


UNREAD = {
    ("vqav2", "vqav2", "val"): "question_type",
    ("textvqa", "textvqa", "val"): "image_classes",
    ("refcoco", "refcoco+", "testA"): "file_name",
    ("chartqa", "chartqa", "val"): "",
    ("docvqa", "docvqa", "val"): "data_split",
}


@pytest.mark.parametrize("case", UNREAD, ids="-".join)
def test_rejects_carry_ids_and_keys_are_accounted_for(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: tuple[str, str, str]
) -> None:
    build(official, tmp_path / "out", *case)
    lines = (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["source_id"] for line in lines)
    table = capsys.readouterr().out
    assert "\n  read " in table and "\n  rejected " in table
    assert f"\n  unread    {UNREAD[case]} " in table or not UNREAD[case]
