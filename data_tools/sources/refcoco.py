"""Reads RefCOCO, RefCOCO+ and RefCOCOg: the pickle refs(...).p and COCO's instances.json.

The pickle is read by an unpickler that refuses every class and every function, so reading it can
run nothing.
"""

import io
import pickle
from pathlib import Path
from typing import Any

from data_tools.sources import RawSample, RowSource, assistant, user
from data_tools.sources.answers import id_in, keys_of, require_file
from data_tools.sources.files import ImageRoot, digest_files, field_of, read_json
from genrecal_ds.data.decode import SampleError
from genrecal_ds.errors import UserError

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: "
MAX_PICKLE_BYTES = 2**29


def open_source(path: str, *, split: str = "train", images: str | None = None) -> "RefCoco":
    """path: a folder refcoco, refcoco+ or refcocog, or the .p file in it where there are two.

    images: COCO's train2014; default path/train2014, else the one beside path.
    """
    refs, folder = _find_refs(Path(path))
    return RefCoco(refs, folder, split, images)


class RefCoco(RowSource):
    """Rows are sentences: each asks for one box. Boxes are [x1, y1, x2, y2], 0 to 1."""

    def __init__(self, refs: Path, folder: Path, split: str, images: str | None) -> None:
        self.name = folder.name
        if self.name not in ("refcoco", "refcoco+", "refcocog"):
            raise UserError(f"{folder}: its name says which set it is: refcoco, refcoco+, refcocog")
        instances = require_file(folder / "instances.json", "refs(...).p and instances.json")
        self.digest = digest_files([refs, instances])
        content = read_json(instances)
        try:
            self._sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
            self._boxes = {a["id"]: a["bbox"] for a in content["annotations"]}
        except (KeyError, TypeError) as error:
            raise UserError(f"{instances}: not COCO's layout ({error!r}); download it") from None
        listed = read_plain_pickle(refs)
        if not isinstance(listed, list) or not all(isinstance(ref, dict) for ref in listed):
            raise UserError(f"{refs}: is not a list of refs; download the official file")
        splits = sorted({str(ref.get("split")) for ref in listed})
        if split not in splits:
            raise UserError(f"--split {split}: {refs} has {', '.join(splits)}")
        self._rows = [
            (ref, sentence)
            for ref in listed
            if ref.get("split") == split
            for sentence in ref.get("sentences") or [{}]
        ]
        beside = folder / "train2014"
        self.images = ImageRoot(
            images or (beside if beside.is_dir() else folder.parent / beside.name)
        )

    def __len__(self) -> int:
        return len(self._rows)

    def source_id(self, number: int) -> str:
        return "-".join(
            (id_in(self._rows[number][0], "ref_id"), id_in(self._rows[number][1], "sent_id"))
        )

    def row(self, number: int) -> RawSample:
        ref, sentence = self._rows[number]
        text = field_of(sentence, "sent", str).strip()
        if not text:
            raise SampleError("question", "the sentence is empty")
        image_id = field_of(ref, "image_id", int)
        box = _normalised(self._boxes.get(ref.get("ann_id")), self._sizes.get(image_id))
        return RawSample(
            # file_name of a ref names a crop that no release holds
            images=[self.images.read(f"COCO_train2014_{image_id:012d}.jpg")],
            messages=[user(PROMPT + text, 1), assistant(_shown(box, 2))],
            kind=self.name,
            answers=[_shown(box, 4)],
            source_id=self.source_id(number),
            **keys_of("sentences image_id ann_id split ref_id sent_id sent", ref, sentence),
        )


def _find_refs(path: Path) -> tuple[Path, Path]:
    if path.is_file():
        return path, path.parent
    files = sorted(path.glob("refs(*).p"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "no refs(...).p"
        raise UserError(f"{path}: holds {names}; name one such file as SOURCE")
    return files[0], path


def _normalised(box: Any, size: Any) -> tuple[float, ...]:
    """COCO's [x, y, width, height] in pixels -> corners in 0..1, clipped to the picture."""
    try:
        (x, y, width, height), (image_width, image_height) = box, size
        corners = (x / image_width, y / image_height,
                   (x + width) / image_width, (y + height) / image_height)  # fmt: skip
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise SampleError("box", f"bbox {box!r:.60}, image {size!r:.40}") from error
    left, top, right, bottom = (min(max(corner, 0.0), 1.0) for corner in corners)
    if not (left < right and top < bottom):
        raise SampleError("box", f"bbox {box!r:.60} has no area inside {size}")
    return left, top, right, bottom


def _shown(box: tuple[float, ...], digits: int) -> str:
    return "[" + ", ".join(f"{corner:.{digits}f}" for corner in box) + "]"


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, strings, lists, tuples and dicts only."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for a persistent object")


def read_plain_pickle(path: Path) -> Any:
    """A pickle that holds plain data. Raises UserError for any other, having run nothing."""
    if path.stat().st_size > MAX_PICKLE_BYTES:
        raise UserError(f"{path}: larger than {MAX_PICKLE_BYTES} bytes; is it a refs file?")
    try:
        # refs(umd).p was written by Python 2: its strings are bytes there
        return _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="utf-8").load()
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, MemoryError,
            AttributeError, OverflowError) as error:  # fmt: skip
        raise UserError(f"{path}: not a pickle of plain data: {error}; nothing was run") from None
