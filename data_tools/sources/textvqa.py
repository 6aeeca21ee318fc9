"""Reads TextVQA 0.5.1: TextVQA_0.5.1_{split}.json, pictures in train_images."""

from pathlib import Path

from data_tools.sources import SHORT_ANSWER, RawSample, RowSource, assistant, user
from data_tools.sources.answers import (
    id_in,
    keys_of,
    most_frequent,
    question_of,
    require_file,
    require_split,
    strings_of,
)
from data_tools.sources.files import ImageRoot, digest_files, field_of, read_json
from genrecal_ds.data.decode import SampleError
from genrecal_ds.errors import UserError


def open_source(path: str, *, split: str = "train", images: str | None = None) -> "TextVqa":
    """images: default path/train_images. The flickr URLs of a row are never used."""
    if split == "test":
        raise UserError("--split test: textvqa's test answers are not public; use val")
    require_split(split, ("train", "val"), "textvqa")
    return TextVqa(Path(path), split, images)


class TextVqa(RowSource):
    """Rows are the questions, in the file's order."""

    name = "textvqa"

    def __init__(self, path: Path, split: str, images: str | None) -> None:
        file = require_file(path / f"TextVQA_0.5.1_{split}.json", "the official files")
        self.digest = digest_files([file])
        content = read_json(file)
        self._rows = content.get("data") if isinstance(content, dict) else None
        if not isinstance(self._rows, list):
            raise UserError(f"{file}: has no list `data`; download the official file")
        self.images = ImageRoot(images or path / "train_images")

    def __len__(self) -> int:
        return len(self._rows or [])

    def source_id(self, number: int) -> str:
        return id_in((self._rows or [])[number], "question_id")

    def row(self, number: int) -> RawSample:
        row = (self._rows or [])[number]
        image_id = field_of(row, "image_id", str)
        if "/" in image_id:
            raise SampleError("image_path", f"image_id {image_id!r:.80}")
        answers = strings_of(row, "answers")
        return RawSample(
            images=[self.images.read(f"{image_id}.jpg")],
            messages=[user(question_of(row) + SHORT_ANSWER, 1), assistant(most_frequent(answers))],
            kind=self.name,
            answers=answers,
            source_id=self.source_id(number),
            **keys_of("image_id question answers question_id", row),
        )
