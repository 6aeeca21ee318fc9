"""Reads VQAv2 and OK-VQA: joins the files of questions and annotations by question_id."""

from pathlib import Path
from typing import Any

from data_tools.sources import SHORT_ANSWER, RawSample, RowSource, assistant, user
from data_tools.sources.answers import (
    id_in,
    keys_of,
    most_frequent,
    question_of,
    require_file,
    require_split,
)
from data_tools.sources.files import ImageRoot, digest_files, field_of, read_json
from genrecal_ds.data.decode import SampleError
from genrecal_ds.errors import UserError

SPLITS = ("train", "val")
READ = "question question_id image_id answers multiple_choice_answer"


def open_vqav2(path: str, *, split: str = "train", images: str | None = None) -> "Vqa":
    """path holds v2_OpenEnded_mscoco_{split}2014_questions.json and v2_mscoco_..._annotations.json.

    images: default path/{split}2014. multiple_choice_answer is taught.
    """
    return Vqa("vqav2", "v2_", Path(path), split, images)


def open_okvqa(path: str, *, split: str = "train", images: str | None = None) -> "Vqa":
    """path holds VQAv2's names without `v2_`. The most frequent of the ten answers is taught."""
    return Vqa("okvqa", "", Path(path), split, images)


class Vqa(RowSource):
    """Rows are the questions, in their file's order, then annotations without a question."""

    def __init__(self, name: str, prefix: str, path: Path, split: str, images: str | None) -> None:
        if split.startswith("test"):
            raise UserError(f"--split {split}: {name}'s test answers are not public; use val")
        require_split(split, SPLITS, name)
        self.name, self.split = name, split
        stem = f"mscoco_{split}2014"
        files = [
            require_file(path / f"{prefix}OpenEnded_{stem}_questions.json", "the questions"),
            require_file(path / f"{prefix}{stem}_annotations.json", "the annotations"),
        ]
        self.digest = digest_files(files)
        questions, annotations = map(read_json, files)
        if name == "okvqa":
            _refuse_vqa_v1(files[1], annotations)
        self._questions = _list(questions, "questions", files[0])
        listed = _list(annotations, "annotations", files[1])
        self._annotations = {row.get("question_id"): row for row in listed}
        known = {row.get("question_id") for row in self._questions}
        self._questions += [{"question_id": key} for key in self._annotations if key not in known]
        self.images = ImageRoot(images or path / f"{split}2014")

    def __len__(self) -> int:
        return len(self._questions)

    def source_id(self, number: int) -> str:
        return id_in(self._questions[number], "question_id")

    def row(self, number: int) -> RawSample:
        row = self._questions[number]
        key = row.get("question_id")
        annotation = self._annotations.get(key)
        if annotation is None or "question" not in row:
            missing = "annotation" if annotation is None else "question"
            raise SampleError("annotation", f"question_id {key}: no {missing} of that id")
        image_id = field_of(row, "image_id", int)
        if annotation.get("image_id") != image_id:
            raise SampleError("annotation", f"question_id {key}: another image_id there")
        answers = [field_of(a, "answer", str) for a in field_of(annotation, "answers", list)]
        if self.name == "vqav2":
            taught = field_of(annotation, "multiple_choice_answer", str)
        else:
            taught = most_frequent(answers) if answers else ""
        if not taught.strip():
            raise SampleError("answer", f"question_id {key}: the answer is empty")
        return RawSample(
            images=[self.images.read(f"COCO_{self.split}2014_{image_id:012d}.jpg")],
            messages=[user(question_of(row) + SHORT_ANSWER, 1), assistant(taught)],
            kind=self.name,
            answers=answers,
            source_id=self.source_id(number),
            **keys_of(READ, row, annotation),
        )


def _list(content: Any, key: str, path: Path) -> list[dict[str, Any]]:
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: has no list of objects {key}; download the official file")
    return rows


def _refuse_vqa_v1(path: Path, annotations: Any) -> None:
    """Refuse VQA v1: its files have OK-VQA's names, but its answers have no raw_answer."""
    first = next(iter(_list(annotations, "annotations", path)), {})
    if not all("raw_answer" in answer for answer in first.get("answers") or [{}]):
        raise UserError(f"{path}: answers have no raw_answer, so this is VQA v1, not OK-VQA")
