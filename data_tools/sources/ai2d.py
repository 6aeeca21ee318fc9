"""Reads AI2D: questions/{image}.json, four options each; ai2d_test_ids.csv is the test set."""

import csv
from pathlib import Path
from typing import Any

from data_tools.sources import RawSample, RowSource, assistant, user
from data_tools.sources.answers import (
    LETTERS,
    id_in,
    keys_of,
    require_file,
    require_split,
    with_options,
)
from data_tools.sources.files import ImageRoot, digest_files, field_of, read_json
from genrecal_ds.data.decode import SampleError
from genrecal_ds.errors import UserError


def open_source(path: str, *, split: str = "train", images: str | None = None) -> "Ai2d":
    """images: default path/images. Questions about letters drawn on the picture (abcLabel) take it
    from abc_images beside it, where that folder exists."""
    require_split(split, ("train", "test"), "ai2d")
    return Ai2d(Path(path), split, images)


class Ai2d(RowSource):
    """Rows are questions, by picture name and then in the file's order."""

    name = "ai2d"

    def __init__(self, path: Path, split: str, images: str | None) -> None:
        listing = require_file(path / "ai2d_test_ids.csv", "ai2d_test_ids.csv and questions/")
        with listing.open(newline="", encoding="utf-8") as lines:
            test_ids = {row[0].strip() for row in csv.reader(lines) if row and row[0].strip()}
        files = sorted((path / "questions").glob("*.json"))
        if not files:
            raise UserError(f"{path / 'questions'}: holds no .json; name the folder above it")
        self.digest = digest_files([listing, *files])
        self._rows: list[tuple[str, str, Any]] = []
        for file in files:
            name = file.name.removesuffix(".json")  # 123.png.json is about 123.png
            if (name.split(".")[0] in test_ids) == (split == "test"):
                content = read_json(file)
                questions = content.get("questions") if isinstance(content, dict) else None
                if not isinstance(questions, dict):
                    raise UserError(f"{file}: has no object `questions`; download it again")
                image = content.get("imageName", name)
                self._rows += [(image, text, facts) for text, facts in questions.items()]
        folder = Path(images) if images else path / "images"
        self.images = ImageRoot(folder)
        lettered = folder.parent / "abc_images"
        self.lettered = ImageRoot(lettered) if lettered.is_dir() else None

    def __len__(self) -> int:
        return len(self._rows)

    def source_id(self, number: int) -> str:
        return id_in(self._rows[number][2], "questionId")

    def row(self, number: int) -> RawSample:
        name, text, facts = self._rows[number]
        options = field_of(facts, "answerTexts", list)
        correct = field_of(facts, "correctAnswer", int)
        if not 0 <= correct < len(options) <= len(LETTERS):
            raise SampleError("answer", f"correctAnswer {correct} of {len(options)} answerTexts")
        if not text.strip():
            raise SampleError("question", "the question is empty")
        root = self.images
        if facts.get("abcLabel"):
            if self.lettered is None:
                raise SampleError("abc_label", "about drawn letters, and there is no abc_images")
            root = self.lettered
        question = with_options(text.strip(), [str(option) for option in options])
        return RawSample(
            images=[root.read(name)],
            messages=[user(question, 1), assistant(LETTERS[correct])],
            kind=self.name,
            answers=[LETTERS[correct]],
            source_id=self.source_id(number),
            **keys_of("answerTexts correctAnswer abcLabel questionId", facts),
        )
