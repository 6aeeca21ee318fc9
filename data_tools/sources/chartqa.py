"""Reads ChartQA: {split}_human.json and {split}_augmented.json, pictures in {split}/png."""

from pathlib import Path
from typing import Any

from data_tools.sources import SHORT_ANSWER, RawSample, RowSource, assistant, user
from data_tools.sources.answers import id_in, keys_of, require_file, require_split
from data_tools.sources.files import ImageRoot, digest_files, field_of, read_json
from genrecal_ds.data.decode import SampleError
from genrecal_ds.errors import UserError

HALVES = ("human", "augmented")


def open_source(path: str, *, split: str = "train", images: str | None = None) -> "ChartQa":
    """images: default path/{split}/png. The halves have kinds of their own: scores are per half."""
    require_split(split, ("train", "val", "test"), "chartqa")
    return ChartQa(Path(path), split, images)


class ChartQa(RowSource):
    """Rows are the human half's, then the augmented half's."""

    name = "chartqa"

    def __init__(self, path: Path, split: str, images: str | None) -> None:
        folder = path / split
        files = [require_file(folder / f"{split}_{half}.json", "the splits") for half in HALVES]
        self.digest = digest_files(files)
        self._rows: list[tuple[str, int, Any]] = []
        for half, file in zip(HALVES, files, strict=True):
            rows = read_json(file)
            if not isinstance(rows, list):
                raise UserError(f"{file}: is not a list; download the official file")
            self._rows += [(half, number, row) for number, row in enumerate(rows)]
        self.images = ImageRoot(images or folder / "png")

    def __len__(self) -> int:
        return len(self._rows)

    def source_id(self, number: int) -> str:
        return f"{id_in(self._rows[number][2], 'imgname')}#{self._rows[number][1]}"

    def row(self, number: int) -> RawSample:
        half, place, row = self._rows[number]
        name = field_of(row, "imgname", str)
        query = field_of(row, "query", str).strip()
        label = field_of(row, "label", str).strip()
        if not query:
            raise SampleError("question", "the query is empty")
        if not label:
            raise SampleError("answer", "the label is empty")
        return RawSample(
            images=[self.images.read(name)],
            messages=[user(query + SHORT_ANSWER, 1), assistant(label)],
            kind=f"chartqa_{half}",
            answers=[label],
            source_id=self.source_id(number),
            **keys_of("imgname query label", row),
        )
