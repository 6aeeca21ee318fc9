"""Other people's items: every key is read, known or counted, and each picture is the right one."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_tools.sources import RawSample, Rejected
from data_tools.sources.answers import CHOOSE_LETTER
from data_tools.sources.files import ImageRoot, with_extension
from data_tools.sources.items import Items
from data_tools.sources.pictures import PictureReader
from genrecal_ds.data.decode import SampleError, decode_image
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit

Read = Callable[..., RawSample]
IMAGE = {"type": "image"}
RED, GREEN, BLUE = 10, 120, 250


@pytest.fixture
def read(tmp_path: Path, png: Callable[..., bytes]) -> Read:
    """Read one item beside a.png (red), b.png (green) and sub/c.png (blue)."""
    (tmp_path / "sub").mkdir()
    for name, red in (("a.png", RED), ("b.png", GREEN), ("sub/c.png", BLUE)):
        (tmp_path / name).write_bytes(png(red))
    reader = PictureReader(ImageRoot(tmp_path))

    def sample(item: dict[str, Any], *ignored: str, **more: Any) -> RawSample:
        return Items("unit", "x.json", reader, ignored).sample(item, **more)

    return sample


def reds(sample: RawSample) -> list[int]:
    """The pictures of a sample, by their red channel."""
    found = (decode_image(data, extension).getpixel((0, 0)) for extension, data in sample.images)
    return [pixel[0] for pixel in found if isinstance(pixel, tuple)]


def texts(sample: RawSample) -> list[str]:
    """The texts of the turns, with # for a picture."""
    return ["".join(p.get("text", "#") for p in m["content"]) for m in sample.messages]


def asked(**more: Any) -> dict[str, Any]:
    return {"question": "q", "answer": "x", **more}


def talked(question: Any = "q", answer: Any = "x", **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def test_pictures_under_every_key_and_in_every_form(read: Read, png: Callable[..., bytes]) -> None:
    inline = base64.b64encode(png(RED)).decode()
    uri = f"data:image/png;base64,{inline}"
    forms = ["a.png", "./a.png", uri, inline, png(RED), {"path": "a.png"}, {"bytes": png(RED)},
             {"bytes": None, "path": "a.png"}, {"url": uri}, {"bytes": inline}]  # fmt: skip
    for form in forms:
        for stored in (form, [form], [form, None]):
            for key in ("image", "images", "img", "picture", "jpg", "image_1"):
                sample = read(asked(**{key: stored}))
                assert reds(sample) == [RED] and texts(sample) == ["#q", "x"] and key in sample.read
    keys = "image_path image_paths img_path image_file image_name file_name filename image_url"
    for key in keys.split():
        assert reds(read(asked(**{key: "a.png"}))) == [RED], key
        both = read(asked(**{key: ["a.png"], "image": {"bytes": png(RED), "path": None}}))
        assert reds(both) == [RED] and key in both.read, "a name of the same picture"
    assert reds(read(asked(images='["a.png", "b.png"]'))) == [RED, GREEN]
    assert reds(read(asked(images="['a.png', 'b.png']"))) == [RED, GREEN]
    assert reds(read(asked(image_2="b.png", image_10="sub/c.png", image_1="a.png"))) == [
        RED, GREEN, BLUE,
    ]  # fmt: skip


def test_no_picture_is_written_in_many_ways(read: Read) -> None:
    for none in (None, "", [], [None], [""], "nan", float("nan"), {"bytes": None, "path": None}):
        for key in ("image", "images", "image_1", "image_path"):
            assert read(asked(**{key: none})).images == []
    assert read(asked(file_name="report.pdf")).unread == ["file_name"], "no picture's name"


def test_two_keys_with_different_pictures_are_refused(read: Read, png: Any) -> None:
    assert reds(read(asked(image="a.png", images=["a.png"]))) == [RED]
    for more in (
        {"image": "a.png", "images": ["b.png"]},
        {"image": "a.png", "image_path": "b.png"},
        {"image": png(1), "image_paths": ["a.png", "b.png"]},
        {"image_1": "a.png", "jpg": "a.png", "image_2": "b.png"},
    ):
        with pytest.raises(Rejected, match="image_count"):
            read(asked(**more))


def test_index_path_and_number_say_which_picture(read: Read, png: Callable[..., bytes]) -> None:
    both = ["a.png", "b.png"]
    by_path = [
        {**IMAGE, "image": "b.png"},
        {"type": "text", "text": "or"},
        {**IMAGE, "path": "a.png"},
    ]
    by_index = [{**IMAGE, "index": 1, "text": None}, {"type": "text", "text": "or", "index": None},
                {**IMAGE, "index": 0}]  # fmt: skip
    for parts in (by_path, by_index, "<image>or<image>"):
        sample = read(talked(parts, images=both))
        order = [RED, GREEN] if isinstance(parts, str) else [GREEN, RED]
        assert (reds(sample), texts(sample)[0]) == (order, "#or#")
    again = read(talked([{**IMAGE, "index": 0}, {**IMAGE, "index": 0}], images=both[:1]))
    assert reds(again) == [RED, RED]
    gap = read(talked([{**IMAGE, "index": 2}], images=[None, None, "b.png"]))
    assert reds(gap) == [GREEN]
    own = read(talked([{"type": "image_url", "image_url": {"url": "sub/c.png"}}]))
    assert reds(own) == [BLUE]
    stored = [{"bytes": png(GREEN), "path": "x/b.png"}, {"bytes": png(RED), "path": "x/a.png"}]
    assert reds(read(talked(by_path, images=stored))) == [GREEN, RED], "by their names"
    numbered = read(asked(question="<image 2> or <image 1>?", image_1="a.png", image_2="b.png"))
    assert (reds(numbered), texts(numbered)[0]) == ([GREEN, RED], "# or #?")
    for parts, images in (
        ([{**IMAGE, "index": 2}], both),
        ([{**IMAGE, "index": -1}], both),
        ([{**IMAGE, "index": 0, "image": "b.png"}, {**IMAGE, "index": 1}], both),
        ([{**IMAGE, "image": "gone.png"}, {**IMAGE, "image": "a.png"}], both),
        ([{**IMAGE, "index": 0}, IMAGE], both),
        ([{**IMAGE, "index": 0}], both),
        ([{**IMAGE, "image": "c.png"}], ["sub/c.png", "c.png"][:1] * 0 + both),
    ):
        with pytest.raises(Rejected, match="part_index|part_picture|image_count"):
            read(talked(parts, images=images))


def test_a_mark_in_an_answer_is_text(read: Read) -> None:
    sample = read(talked("<image>Which tag?", "Use <image> for it.", image="a.png"))
    assert (texts(sample), reds(sample)) == (["#Which tag?", "Use <image> for it."], [RED])
    assert texts(read(talked("Which?", "Use <image>")))[1] == "Use <image>"
    with pytest.raises(Rejected, match="0 <image> marks but 1 images"):
        read(talked("Which tag?", "Use <image>", image="a.png"))
    with pytest.raises(Rejected, match="image_in_answer"):
        read(talked("Which?", [IMAGE, {"type": "text", "text": "x"}], image="a.png"))
    with pytest.raises(Rejected, match=r"1 <image> marks but 0 images; looked under image.s."):
        read(talked("`<image>` is what?"))


def test_options_are_lettered_however_they_are_stored(read: Read) -> None:
    shown = "q\nA. cube\nB. ball\n" + CHOOSE_LETTER
    values = ["cube", "ball"]
    forms: list[dict[str, Any]] = [
        {"choices": values}, {"options": values}, {"options": "['cube', 'ball']"},
        {"options": '["cube", "ball"]'}, {"A": "cube", "B": "ball"}, {"options": [*values, None]},
        {"A": "cube", "B": "ball", "C": "nan"}, {"options": {"A": "cube", "B": "ball"}},
        {"choices": {"text": values, "label": ["A", "B"]}},
    ]  # fmt: skip
    for form in forms:
        for answer in (1, "B", "(B)", "B.", "ball", " ball "):
            sample = read(asked(**form) | {"answer": answer})
            assert (texts(sample), sample.answers) == ([shown, "B"], ["B"])
    many = read(asked(options=[f"o{n}" for n in range(14)], hint="nan") | {"answer": 12})
    assert "\nN. o13\n" in texts(many)[0] and texts(many)[1] == "M" and many.blank == ["hint"]
    for more in ({"answer": 2}, {"answer": "C"}, {"answer": "1"}, {"answer": "egg"},
                 {"options": ["cube", "", "ball"]}, {"choices": ["ball", "cube"]},
                 {"options": [str(n) for n in range(27)]}):  # fmt: skip
        with pytest.raises(Rejected, match="answer|options"):
            read({**asked(options=values), "answer": "B", **more})
    with pytest.raises(Rejected, match="the place of an option, and another's text"):
        read(asked(options=["1", "0"]) | {"answer": 1})


def test_hint_and_context_stand_before_the_question(read: Read) -> None:
    sample = read(asked(context="long", hint="\ufeffIt rolls.\u200b"))
    assert texts(sample) == ["long\nIt rolls.\nq", "x"] and sample.blank == ["hint"]


def test_system_prompts(read: Read) -> None:
    for item in (asked(system="Be short."), talked(system_prompt="Be short.")):
        assert [m["role"] for m in read(item).messages] == ["system", "user", "assistant"]
        assert texts(read(item))[0] == "Be short."
    own = {"role": "system", "content": "Be short."}
    item = talked(system="Be short.")
    same = {**item, "messages": [own, *item["messages"]]}
    assert texts(read(same)) == ["Be short.", "q", "x"]
    with pytest.raises(Rejected, match="system"):
        read({**same, "system": "Be long."})


def test_untaught_answers_are_context(read: Read) -> None:
    def turns(*flags: dict[str, Any]) -> dict[str, Any]:
        messages = []
        for number, flag in enumerate(flags):
            messages.append({"from": "human", "value": f"q{number}", "weight": 1})
            messages.append({"from": "gpt", "value": f"a{number}", **flag})
        return {"conversations": messages}

    for off, on in (
        ({"loss": False}, {"loss": True}),
        ({"weight": 0}, {"weight": 1}),
        ({"train": False}, {}),
    ):
        sample = read(turns(off, on, off, on, off))
        assert texts(sample)[-1] == "a3", "nothing is taught behind it"
        taught = [m.get("taught", True) for m in sample.messages if m["role"] == "assistant"]
        assert taught == [False, True, False, True]
        with pytest.raises(Rejected, match="no_taught"):
            read(turns(off))
    plain = read(turns({"loss": True}, {"weight": 1}))
    assert all("taught" not in message for message in plain.messages)
    for wrong in ({"weight": 0.5}, {"loss": "no"}, {"loss": True, "weight": 0}):
        with pytest.raises(Rejected, match="loss_flag"):
            read(turns(wrong))


def test_other_shapes_of_turns(read: Read, png: Callable[..., bytes]) -> None:
    stored = '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]'
    unified = [{"from": None, "role": role, "value": None, "content": text}
               for role, text in (("user", "q"), ("assistant", "x"))]  # fmt: skip
    for item in ({"conversations": stored}, {"messages": unified}, {"conversations": unified},
                 {"texts": [{"user": "q", "assistant": "x"}]}):  # fmt: skip
        assert texts(read(item)) == ["q", "x"]
    vision = read(
        {"texts": [{"user": "q", "assistant": "x"}] * 2, "images": [png(RED), png(GREEN)]}
    )
    assert (texts(vision), reds(vision)) == (["##q", "x", "q", "x"], [RED, GREEN])
    assert texts(read({"caption": "a cat", "image": "a.png"})) == ["#Describe the image.", "a cat"]
    thought = {"role": "assistant", "content": "y", "reasoning_content": "so"}
    assert texts(read({"messages": [{"role": "user", "content": "q"}, thought]}))[1] == (
        "<think>\nso\n</think>\n\ny"
    )
    same = talked()
    assert texts(read({**same, "conversations": same["messages"]})) == ["q", "x"]
    with pytest.raises(Rejected, match="hold different turns"):
        read({**same, "conversations": stored.replace("q", "r")})
    for item in ({"messages": [{"from": "human", "role": "user", "content": "q"}]},
                 {"conversations": '{"a": 1}'}, {"conversations": "hello"}):  # fmt: skip
        with pytest.raises(Rejected, match="turn|field"):
            read(item)


def test_unread_content_ends_the_build_and_metadata_is_counted(read: Read) -> None:
    facts = {"id": "i", "score": 3, "image_id": 7, "num_turns": 1, "tool": "x", "sha256": "0"}
    assert read(asked(**facts)).unread == ["score", "image_id", "num_turns", "tool", "sha256"]
    content: dict[str, Any] = {
        "thumbnail": "a.png", "image_crop": "a.png", "distractors": ["y"], "rationale": "why",
        "dialog": ["hi"], "system_message": "Be short.", "loss_mask": [0, 1], "weight": 0.5,
        "lecture": "long", "prompt": "p", "tools": [{"name": "f"}],
    }  # fmt: skip
    for key, value in content.items():
        with pytest.raises(UserError, match=f"item 'i': key '{key}' looks like .*--ignore {key}$"):
            read(asked(id="i", **{key: value}))
        assert read(asked(**{key: value}), key).unread == [key]
        assert read(asked(**{key: [None, "", "nan"]})).unread == [], "holds nothing"
    assert read(talked("Which?\nA. cube", choices=["cube"])).unread == ["choices"], "shown anyway"
    turn = talked()
    turn["messages"][1]["image_crop"] = "a.png"
    with pytest.raises(UserError, match=r"--ignore turn\.image_crop"):
        read(turn)
    assert read(turn, "turn.image_crop").unread == ["turn.image_crop"]
    assert texts(read(asked(hint="h"), "hint")) == ["q", "x"]
    with pytest.raises(Rejected, match="tool calls are not supported"):
        turn["messages"][1]["tool_calls"] = [{"f": 1}]
        read(turn)
    with pytest.raises(Rejected, match="audio items"):
        read(asked(audio="a.wav"))


def test_a_reject_carries_the_items_id_and_its_files(read: Read, tmp_path: Path) -> None:
    for key in ("id", "index", "uid", "question_id"):
        with pytest.raises(Rejected) as caught:
            read(asked(**{key: 17}, image=["a.png", "gone.png"]))
        assert caught.value.source_id == "17"
        paths = {entry.path: entry.size for entry in caught.value.inputs}
        assert paths == {
            str(tmp_path / "a.png"): (tmp_path / "a.png").stat().st_size,
            str(tmp_path / "gone.png"): -1,
        }


def test_links_are_followed_into_the_named_folder_alone(tmp_path: Path, png: Any) -> None:
    """A hub's cache: snapshots/COMMIT/a.png leads to blobs/HASH."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/0abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "f00d").write_bytes(png(RED))
    (snapshot / "a.png").symlink_to("../../blobs/f00d")
    with pytest.raises(SampleError, match="into .*blobs; .* name it with --allow-links"):
        ImageRoot(snapshot).read("a.png")
    assert ImageRoot(snapshot, str(blobs)).read("a.png")[1] == png(RED)
    (tmp_path / "secret.png").write_bytes(png(BLUE))
    (snapshot / "s.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(SampleError, match="leads out"):
        ImageRoot(snapshot, str(blobs)).read("s.png")
    with pytest.raises(UserError, match="--allow-links .*no such folder"):
        ImageRoot(snapshot, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["gif", "bmp", "tiff", "avif"])
def test_formats_that_shards_do_not_hold_become_png(name: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), (RED, 1, 2)).save(buffer, name.upper())
    picture = with_extension(buffer.getvalue())
    assert (picture[0], picture.converted) == ("png", name)
    assert decode_image(picture[1], "png").size == (40, 20)
    with pytest.raises(SampleError, match="image_"):
        with_extension(buffer.getvalue()[:20])


def test_heic_says_what_is_missing() -> None:
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        with pytest.raises(SampleError, match="pip install pillow-heif"):
            with_extension(b"\0\0\0\x18ftypheic" + bytes(20))
