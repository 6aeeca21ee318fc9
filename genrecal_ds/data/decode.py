"""Turns the bytes of one tar member into a checked record or picture.

The builder and the reader share these functions, so whatever was accepted at build is readable,
and a third party's shard is judged by the same rules. Nothing here executes data: no pickle, no
webdataset `.decode()`, Pillow opens only the named raster formats.
"""

import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 40_000_000
MAX_ASPECT = 200  # longer side over shorter; Qwen's processors refuse more
MAX_IMAGE_BYTES = 64 * 2**20
MAX_RECORD_BYTES = 4 * 2**20
IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
# Not in shards: a build converts them.
OTHER_FORMATS = {"gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "avif": "AVIF", "heic": "HEIF"}
ROLES = ("system", "user", "assistant")
RECORD_KEYS = frozenset({"messages", "kind", "answers", "source", "source_id"})

# What Pillow's plug-ins are known to raise on damaged bytes; a bug of ours (AttributeError,
# NameError) must stay visible, so this is a list and not `except Exception`.
_PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)


class SampleError(Exception):
    """A sample breaks a rule. `reason` is a short code to count by, `detail` one line."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Record:
    """The checked json member. `messages` is HF chat format with image and text parts."""

    messages: list[dict[str, Any]]
    kind: str
    answers: list[str]
    source: str
    source_id: str
    num_images: int
    text_bytes: int  # UTF-8 bytes of all text parts


def decode_record(data: bytes) -> Record:
    """Check a json member; raises SampleError with a distinct reason per defect."""
    if len(data) > MAX_RECORD_BYTES:
        raise SampleError("record_bytes", f"{len(data)} bytes of json, limit {MAX_RECORD_BYTES}")
    value = parse_json(data)
    if not isinstance(value, dict) or value.keys() != RECORD_KEYS:
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise SampleError("record_keys", f"need {sorted(RECORD_KEYS)}, found {keys}")
    if not isinstance(value["answers"], list):
        raise SampleError("answers", "answers is not a list")
    num_images, text_bytes = _check_messages(value["messages"])
    return Record(
        messages=value["messages"],
        kind=_string(value["kind"], "kind", allow_empty=False),
        answers=[_string(answer, "answers") for answer in value["answers"]],
        source=_string(value["source"], "source"),
        source_id=_string(value["source_id"], "source_id"),
        num_images=num_images,
        text_bytes=text_bytes,
    )


def parse_json(data: bytes, *, allow_nan: bool = False) -> Any:
    """Strict JSON: UTF-8 without BOM, no NaN, no key twice in an object, no endless nesting.

    allow_nan: as numbers, for other people's files, whose metadata may hold it. Raises
    SampleError (text_encoding, record_json, record_depth).
    """
    try:
        text = data.decode("utf-8")
        constant = float if allow_nan else _no_constant
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise SampleError("text_encoding", f"json is not UTF-8: {error}") from error
    except RecursionError as error:
        raise SampleError("record_depth", "json is nested too deeply") from error
    except ValueError as error:
        raise SampleError("record_json", str(error)) from error


def decode_image(data: bytes, extension: str) -> Image.Image:
    """Decode one picture whole: RGB, EXIF orientation applied, alpha on white, frame 0.

    16-bit grey is scaled to 8 bits. The pixel cap is tested on the header, before any pixel
    is decoded. Raises SampleError (image_format, image_bytes, image_pixels, image_aspect,
    image_decode).
    """
    if extension not in IMAGE_FORMATS:
        raise SampleError("image_format", f"{extension!r} is not one of {sorted(IMAGE_FORMATS)}")
    return _decode(data, IMAGE_FORMATS[extension])


def decode_other(data: bytes, name: str) -> Image.Image:
    """Decode a picture of OTHER_FORMATS as decode_image does: of several frames the first."""
    return _decode(data, OTHER_FORMATS[name])


def _decode(data: bytes, pillow_format: str) -> Image.Image:
    if len(data) > MAX_IMAGE_BYTES:
        raise SampleError("image_bytes", f"{len(data)} bytes, limit {MAX_IMAGE_BYTES}")
    try:
        image = Image.open(io.BytesIO(data), formats=(pillow_format,))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise SampleError("image_pixels", f"{width}x{height} pixels, limit {MAX_PIXELS}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise SampleError("image_aspect", f"{width}x{height}, limit 1:{MAX_ASPECT}")
        # Not verify(): only load() notices a truncated picture.
        image.load()
        # exif_transpose always copies, so the result is detached from the file's plug-in
        return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise SampleError("image_format", f"bytes are not {pillow_format}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError("image_pixels", str(error)) from error
    except _PILLOW_ERRORS as error:
        raise SampleError("image_decode", f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise SampleError("image_mode", "floating point pixels have no defined colour")
    if image.mode.startswith("I"):
        # convert("RGB") would clip 16-bit values to white
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB") if image.mode != "RGB" else image


def _check_messages(messages: Any) -> tuple[int, int]:
    """(image parts, UTF-8 bytes of text parts); raises SampleError."""
    if not isinstance(messages, list) or not messages:
        raise SampleError("messages", "messages is not a list of turns, or is empty")
    num_images = text_bytes = 0
    for turn, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() - {"taught"} != {"role", "content"}:
            raise SampleError("turn", f"turn {turn}: need exactly role and content")
        if message["role"] not in ROLES:
            raise SampleError("role", f"turn {turn}: role {message['role']!r} not in {ROLES}")
        if not isinstance(message["content"], list) or not message["content"]:
            raise SampleError("content", f"turn {turn}: content is not a list of parts")
        is_context = message.get("role") == "assistant" and message.get("taught") is False
        if "taught" in message and not is_context:
            raise SampleError("taught", f"turn {turn}: only an answer has taught, and only false")
        images, turn_bytes = _check_parts(message["content"], turn)
        if message["role"] == "assistant" and turn_bytes == 0:
            raise SampleError("empty_answer", f"turn {turn}: assistant turn without text")
        num_images, text_bytes = num_images + images, text_bytes + turn_bytes
    if not any(message["role"] == "assistant" for message in messages):
        raise SampleError("no_assistant", "no assistant turn")
    if messages[-1]["role"] != "assistant":
        raise SampleError("last_turn", f"last turn is {messages[-1]['role']}, not assistant")
    if "taught" in messages[-1]:
        raise SampleError("last_turn", "the last turn is an answer that is not taught")
    return num_images, text_bytes


def _check_parts(parts: list[Any], turn: int) -> tuple[int, int]:
    """(image parts, bytes of text that is not only white space) of one turn."""
    num_images = text_bytes = 0
    has_text = False
    for part in parts:
        if isinstance(part, dict) and part == {"type": "image"}:
            num_images += 1
        elif isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
            text = _string(part["text"], f"turn {turn}")
            has_text = has_text or bool(text.strip())
            text_bytes += len(text.encode("utf-8"))
        else:
            raise SampleError("part", f"turn {turn}: part {part!r:.80} is neither image nor text")
    return num_images, text_bytes if has_text else 0


def _string(value: Any, name: str, *, allow_empty: bool = True) -> str:
    if not isinstance(value, str) or not (value or allow_empty):
        raise SampleError("string", f"{name}: {value!r:.80} is not a (non-empty) string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleError("text_encoding", f"{name}: lone surrogate") from error
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError(f"duplicate key in json object with keys {sorted(value)}"[:200])
    return value


def _no_constant(name: str) -> Callable[..., Any]:
    raise ValueError(f"json holds {name}")
