"""Reads DocVQA: {split}_v1.0.json or {split}_v1.0_withQT.json; pictures are in documents/."""

from pathlib import Path

from data_tools.sources import SHORT_ANSWER, RawSample, RowSource, assistant, user
from data_tools.sources.answers import id_in, keys_of, question_of, require_split, strings_of
from data_tools.sources.files import ImageRoot, digest_files, field_of, read_json
from genrecal_ds.errors import UserError


def open_source(path: str, *, split: str = "train", images: str | None = None) -> "DocVqa":
    """images: the folder that holds documents/; default path."""
    if split == "test":
        raise UserError("--split test: docvqa's test answers are not public; use val")
    require_split(split, ("train", "val"), "docvqa")
    return DocVqa(Path(path), split, images)


class DocVqa(RowSource):
    """Rows are the questions, in the file's order. The first answer is taught."""

    name = "docvqa"

    def __init__(self, path: Path, split: str, images: str | None) -> None:
        names = [f"{split}_v1.0.json", f"{split}_v1.0_withQT.json"]
        files = [path / name for name in names if (path / name).is_file()]
        if not files:
            raise UserError(f"{path}: holds neither {' nor '.join(names)}; name their folder")
        self.digest = digest_files(files[:1])
        content = read_json(files[0])
        self._rows = content.get("data") if isinstance(content, dict) else None
        if not isinstance(self._rows, list):
            raise UserError(f"{files[0]}: has no list `data`; download the official file")
        self.images = ImageRoot(images or path)

    def __len__(self) -> int:
        return len(self._rows or [])

    def source_id(self, number: int) -> str:
        return id_in((self._rows or [])[number], "questionId")

    def row(self, number: int) -> RawSample:
        row = (self._rows or [])[number]
        name = field_of(row, "image", str)
        answers = strings_of(row, "answers")
        return RawSample(
            images=[self.images.read(name)],
            messages=[user(question_of(row) + SHORT_ANSWER, 1), assistant(answers[0])],
            kind=self.name,
            answers=answers,
            source_id=self.source_id(number),
            **keys_of("image question answers questionId", row),
        )
