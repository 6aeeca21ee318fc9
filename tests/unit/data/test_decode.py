"""Each bad record has its own reason; each odd picture a defined result."""

import io
import json
import resource
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genrecal_ds.data.decode import (
    MAX_RECORD_BYTES,
    SampleError,
    decode_image,
    decode_other,
    decode_record,
)

pytestmark = pytest.mark.unit


def record(**changes: Any) -> dict[str, Any]:
    good = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "\u00e9"}]},
        ],
        "kind": "k",
        "answers": ["a"],
        "source": "s",
        "source_id": "1",
    }
    return {**good, **changes}


def turns(*roles_and_texts: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in roles_and_texts]


def test_good_record() -> None:
    result = decode_record(json.dumps(record()).encode())
    assert (result.num_images, result.text_bytes, result.kind) == (1, len("what?") + 2, "k")
    assert result.messages == record()["messages"]


BAD_RECORDS = {
    "record_keys": record(extra=1),
    "messages": record(messages=[]),
    "turn": record(messages=[{"from": "human", "value": "hi"}]),
    "role": record(messages=turns(("human", "q"), ("assistant", "a"))),
    "content": record(messages=[{"role": "assistant", "content": "plain text"}]),
    "part": record(messages=[{"role": "assistant", "content": [{"type": "video"}]}]),
    "empty_answer": record(messages=turns(("user", "q"), ("assistant", " \n"))),
    "no_assistant": record(messages=turns(("user", "q"))),
    "last_turn": record(messages=turns(("assistant", "a"), ("user", "q"))),
    "string": record(answers=[3]),
    "answers": record(answers="a"),
    "text_encoding": record(kind="\ud800"),
}


@pytest.mark.parametrize("reason", BAD_RECORDS)
def test_bad_record(reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_record(json.dumps(BAD_RECORDS[reason]).encode())
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "record_json"),
        (b"[]", "record_keys"),
        (b'\xef\xbb\xbf{"kind": 1}', "record_json"),
        (b'{"kind": NaN}', "record_json"),
        (b'{"kind": 1, "kind": 2}', "record_json"),
        ('{"kind": "a"}'.encode("utf-16"), "text_encoding"),
        (b"[" * 1_000_000, "record_depth"),
        (b"1" * 5000, "record_json"),
        (b" " * (MAX_RECORD_BYTES + 1), "record_bytes"),
    ],
    ids=["empty", "list", "bom", "nan", "twice", "utf16", "deep", "digits", "large"],
)
def test_bad_json(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_record(data)
    assert caught.value.reason == reason


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    assert decode_image(data, "jpg").size == (20, 40)


def test_alpha_goes_on_white() -> None:
    half = decode_image(encode(Image.new("RGBA", (2, 2), (0, 0, 0, 0))), "png")
    assert half.getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    clear = decode_image(encode(palette, transparency=0), "png")
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encode(palette), "png").getpixel((0, 0)) == (10, 20, 30)


def test_sixteen_bit_grey_is_scaled() -> None:
    grey = Image.fromarray(np.array([[0, 256 * 128, 65535]], np.uint16))
    image = decode_image(encode(grey), "png")
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]  # type: ignore[index]


def test_cmyk_and_animation() -> None:
    cmyk = encode(Image.new("CMYK", (3, 3), (0, 0, 0, 0)), "JPEG")
    assert decode_image(cmyk, "jpeg").getpixel((0, 0)) == (255, 255, 255)
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    movie = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(movie, "webp").getpixel((0, 0)) == (255, 0, 0)


def test_bomb_is_refused_from_the_header() -> None:
    header = encode(Image.new("1", (1, 1)))
    wide, high = (20_000).to_bytes(4, "big"), (12_000).to_bytes(4, "big")
    ihdr = b"IHDR" + wide + high + header[24:29]
    bomb = header[:12] + ihdr + zlib.crc32(ihdr).to_bytes(4, "big") + header[33:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (bomb, encode(Image.new("1", (8000, 5001)))):
        with pytest.raises(SampleError) as caught:
            decode_image(data, "png")
        assert caught.value.reason == "image_pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


@pytest.mark.parametrize(
    ("data", "extension", "reason"),
    [
        (encode(Image.new("RGB", (9, 9))), "jpg", "image_format"),
        (encode(Image.new("RGB", (9, 9)), "GIF"), "gif", "image_format"),
        (b"<html>", "png", "image_format"),
        (encode(Image.effect_noise((99, 99), 9), "JPEG")[:-500], "jpg", "image_decode"),
        (encode(Image.effect_noise((99, 99), 9))[:-500], "png", "image_decode"),
    ],
    ids=["png_as_jpg", "gif", "html", "cut_jpeg", "cut_png"],
)
def test_bad_image(data: bytes, extension: str, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_image(data, extension)
    assert caught.value.reason == reason


def test_untaught_answers_are_context_of_a_taught_one() -> None:
    first, second, third, last = turns(("user", "q"), ("assistant", "no"), ("user", "fix"),
                                       ("assistant", "yes"))  # fmt: skip
    context = {**second, "taught": False}
    good = decode_record(json.dumps(record(messages=[first, context, third, last])).encode())
    assert good.messages[1]["taught"] is False
    bad = {
        "taught": [[{**first, "taught": False}, last], [first, {**last, "taught": True}]],
        "last_turn": [[first, context], [first, last, third, context]],
    }
    for reason, conversations in bad.items():
        for messages in conversations:
            with pytest.raises(SampleError) as caught:
                decode_record(json.dumps(record(messages=messages)).encode())
            assert caught.value.reason == reason


@pytest.mark.parametrize("name", ["gif", "bmp", "tiff", "avif"])
def test_other_formats_give_their_first_frame(name: str) -> None:
    frames = [Image.new("RGB", (40, 20), color) for color in ((200, 30, 10), (0, 0, 250))]
    buffer = io.BytesIO()
    several = {"save_all": True, "append_images": frames[1:]} if name in ("gif", "tiff") else {}
    frames[0].save(buffer, name.upper(), **several)
    image = decode_other(buffer.getvalue(), name)
    assert image.mode == "RGB" and image.size == (40, 20)
    assert np.abs(np.subtract(image.getpixel((5, 5)), (200, 30, 10))).max() <= 6
    with pytest.raises(SampleError):
        decode_other(buffer.getvalue()[:30], name)
