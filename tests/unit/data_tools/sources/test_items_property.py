"""Random items of the field's shapes: all of it is in the sample at its place, or it is rejected.

A chat is drawn first: roles, texts and pictures in their order. Then it is written down in one of
the ways in which people do, with other keys around it, and sometimes with one thing spoiled. The
reader must give back the drawn chat to the letter; of a spoiled item it must say why not.
"""

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from data_tools.job import check
from data_tools.sources import RawSample, Rejected
from data_tools.sources.answers import CHOOSE_LETTER
from data_tools.sources.files import ImageRoot
from data_tools.sources.items import CAPTION_QUESTION, Items
from data_tools.sources.llava import open_source
from data_tools.sources.pictures import PictureReader
from genrecal_ds.data.decode import SampleError
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit
NUM_EXAMPLES = 2000
NUM_PICTURES = 6

Parts = list[str | int]  # texts, and pictures by their number
Turn = tuple[str, Parts, bool]  # role, parts, taught


class Drawn(NamedTuple):
    """What was meant, and how it was written down. spoiled: why it must be rejected, if at all."""

    chat: list[Turn]
    item: dict[str, Any]
    spoiled: str | None
    unread: set[str]


class Writer:
    """Draws one item."""

    def __init__(self, seed: int, pictures: list[bytes]) -> None:
        self.random, self.pictures, self.count = random.Random(seed), pictures, 0
        self.chance = self.random.random

    def text(self, is_answer: bool = False) -> str:
        self.count += 1
        words = [
            "what",
            "caf\u00e9",
            "\u4e2d",
            "nan",
            "{x}",
            "[y]",
            "a.png",
            "1",
            "B",
            "\U0001f600",
        ]
        words += ["<image>", "<image 1>", "<img>"] if is_answer else []
        chosen = self.random.choices(words, k=self.random.randint(1, 4))
        return " ".join([*chosen, f"t{self.count}."])

    def stored(self, number: int) -> Any:
        """One of the forms of a picture; every form has the picture's name or bytes."""
        inline = base64.b64encode(self.pictures[number]).decode()
        name = f"{number}.png"
        forms = [name, f"./{name}", {"path": name}, {"bytes": None, "path": name}, inline,
                 f"data:image/png;base64,{inline}", {"url": f"data:image/png;base64,{inline}"},
                 {"bytes": inline, "path": name}]  # fmt: skip
        return self.random.choice(forms)

    def question(self, is_first: bool, most: int) -> Parts:
        parts: Parts = [self.text()]
        for _ in range(self.random.choice([0, 0, 1, 1, 2, 3][: most + 3] if most else [0])):
            parts.insert(self.random.randint(0, len(parts)), self.random.randrange(NUM_PICTURES))
            if self.chance() < 0.3:
                parts.insert(0 if isinstance(parts[0], int) else len(parts), self.text())
        return _joined(parts)

    def chat(self) -> list[Turn]:
        turns: list[Turn] = []
        if self.chance() < 0.2:
            turns.append(("system", [self.text()], True))
        number = self.random.randint(1, 3)
        for turn in range(number):
            turns.append(("user", self.question(turn == 0, 3), True))
            taught = turn == number - 1 or self.chance() < 0.8
            turns.append(("assistant", [self.text(is_answer=True)], taught))
        return turns

    def item(self) -> Drawn:
        shape = self.random.choice(
            [self.marked, self.parted, self.asked, self.paired, self.captioned]
        )
        chat, item = shape()
        unread = self.add_noise(item)
        spoiled = self.spoil(chat, item) if self.chance() < 0.25 else None
        keys = list(item)
        self.random.shuffle(keys)
        return Drawn(chat, {key: item[key] for key in keys}, spoiled, unread)

    def marked(self) -> tuple[list[Turn], dict[str, Any]]:
        """LLaVA and ShareGPT: texts with marks, pictures in their order."""
        chat = self.chat()
        role, value = self.random.choice([("from", "value"), ("role", "content")])
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        names = names if role == "from" else {name: name for name in names}
        turns = [
            {
                role: names[who],
                value: "".join("<image>" if isinstance(p, int) else p for p in parts),
            }
            | self.flag(who, taught)
            for who, parts, taught in chat
        ]
        item: dict[str, Any] = self.with_system(chat, turns)
        if self.chance() < 0.2:
            item = {**item, "conversations": json.dumps(item["conversations"])}
        return chat, {**item, **self.listed([p for _, parts, _ in chat for p in parts])}

    def parted(self) -> tuple[list[Turn], dict[str, Any]]:
        """Chats of parts: a part names its picture by index, by path, or holds it."""
        chat = self.chat()
        used = [p for _, parts, _ in chat for p in parts if isinstance(p, int)]
        order = sorted(set(used), key=lambda _: self.chance())
        say = self.random.choice(["index", "path", "inline", "position"])
        turns = []
        for who, parts, taught in chat:
            content = []
            for part in parts:
                if isinstance(part, str):
                    content.append({"type": "text", "text": part})
                    continue
                said: dict[str, Any] = {"type": "image"}
                if say == "index":
                    said |= {"index": order.index(part), "text": None}
                elif say == "path":
                    said["image"] = f"{part}.png"
                elif say == "inline":
                    said = {"type": "image_url", "image_url": {"url": self.stored(part)}}
                    if not isinstance(said["image_url"]["url"], str):
                        said = {"type": "image", "image": said["image_url"]["url"]}
                content.append(said)
            turns.append({"role": who, "content": content} | self.flag(who, taught))
        item: dict[str, Any] = {"messages": turns}
        if say == "position":
            item |= self.listed(list(used))
        elif say == "index" or (say == "path" and self.chance() < 0.5):
            item["images"] = [f"{number}.png" for number in order]
        return chat, item

    def asked(self) -> tuple[list[Turn], dict[str, Any]]:
        """A question with pictures, options, a hint, a system prompt."""
        question, item = self.text(), dict[str, Any]()
        shown = question
        if self.chance() < 0.3:
            item["hint"] = self.text()
            shown = f"{item['hint']}\n{shown}"
        answer = self.text(is_answer=True)
        item["answer"] = answer
        if self.chance() < 0.5:
            options = [self.text() for _ in range(self.random.randint(2, 13))]
            right = self.random.randrange(len(options))
            letters = "ABCDEFGHIJKLMN"
            lines = [
                f"{letter}. {option}" for letter, option in zip(letters, options, strict=False)
            ]
            shown = "\n".join([shown, *lines, CHOOSE_LETTER])
            item["answer"], answer = (
                self.random.choice([right, letters[right], options[right]]), letters[right],
            )  # fmt: skip
            ways: list[dict[str, Any]] = [
                {"choices": options}, {"options": options}, {"options": repr(options)},
                dict(zip(letters, options, strict=False)), {"options": [*options, None]},
            ]  # fmt: skip
            item |= self.random.choice(ways)
        pictures = [self.random.randrange(NUM_PICTURES) for _ in range(self.random.randint(0, 3))]
        parts: Parts = [*pictures, shown]
        way = self.random.choice(["front", "numbered", "marked"]) if pictures else "front"
        item["question"] = question
        if way == "numbered":
            numbers = sorted(range(1, len(pictures) + 1), key=lambda _: self.chance())
            item |= {f"image_{n}": self.stored(pictures[n - 1]) for n in numbers}
            item["image_7"] = None
            item["question"] = question + "".join(f" {n}: <image {n}>" for n in numbers)
            tail = [part for n in numbers for part in (f" {n}: ", pictures[n - 1])]
            before, _, behind = shown.partition(question)
            parts = _joined([before + question, *tail, behind.lstrip("\n")])
        else:
            item |= self.listed(list(pictures))
            if way == "marked":
                item["question"] = "<image>" * len(pictures) + question
                before, _, behind = shown.rpartition(question)
                parts = _joined([before.rstrip("\n"), *pictures, question + behind])
        chat: list[Turn] = [("user", parts, True), ("assistant", [answer], True)]
        if self.chance() < 0.2:
            item["system"] = self.text()
            chat.insert(0, ("system", [item["system"]], True))
        return chat, item | {"question": item["question"]}

    def paired(self) -> tuple[list[Turn], dict[str, Any]]:
        """FineVision: pairs of texts; all pictures stand in front."""
        pairs = [(self.text(), self.text(is_answer=True)) for _ in range(self.random.randint(1, 3))]
        pictures: Parts = [
            self.random.randrange(NUM_PICTURES) for _ in range(self.random.randint(0, 3))
        ]
        chat: list[Turn] = []
        for number, (question, answer) in enumerate(pairs):
            front = pictures if number == 0 else []
            chat += [("user", [*front, question], True), ("assistant", [answer], True)]
        texts = [{"user": question, "assistant": answer} for question, answer in pairs]
        return chat, {"texts": texts, **self.listed(pictures)}

    def captioned(self) -> tuple[list[Turn], dict[str, Any]]:
        number, caption = self.random.randrange(NUM_PICTURES), self.text(is_answer=True)
        chat: list[Turn] = [
            ("user", [number, CAPTION_QUESTION], True), ("assistant", [caption], True),
        ]  # fmt: skip
        return chat, {"caption": f"\ufeff{caption}\n", **self.listed([number])}

    def listed(self, parts: Parts) -> dict[str, Any]:
        """The pictures among the parts, in their order, under some key."""
        values = [self.stored(part) for part in parts if isinstance(part, int)]
        if not values:
            return self.random.choice(
                [{}, {"image": None}, {"images": []}, {"image": ""}, {"images": [None]}]
            )
        if len(values) == 1 and self.chance() < 0.5:
            key = self.random.choice(["image", "img", "picture", "jpg", "image_path"])
            return {key: values[0]}
        if self.chance() < 0.2:
            return {f"image_{n}": value for n, value in enumerate(values, 1)}
        return {self.random.choice(["image", "images", "pictures", "image_paths"]): values}

    def with_system(self, chat: list[Turn], turns: list[dict[str, Any]]) -> dict[str, Any]:
        """The turns; a system prompt may stand beside them."""
        if chat[0][0] == "system" and self.chance() < 0.5:
            key = self.random.choice(["system", "system_prompt"])
            return {"conversations": turns[1:], key: chat[0][1][0]}
        return {"conversations": turns}

    def flag(self, who: str, taught: bool) -> dict[str, Any]:
        if who == "assistant" and not taught:
            return self.random.choice([{"loss": False}, {"weight": 0}, {"loss": 0}])
        return (
            self.random.choice([{}, {}, {"weight": 1}, {"loss": True}])
            if who == "assistant"
            else {}
        )

    def add_noise(self, item: dict[str, Any]) -> set[str]:
        """Metadata around it; returns the keys that must be counted."""
        noise: dict[str, Any] = {
            "id": "x", "width": 3, "score": 0.5, "image_id": 7, "nested": {"a": [1]},
            "nan": float("nan"), "empty": "", "tool": "gpt", "source": "s", "license": "cc",
        }  # fmt: skip
        chosen = [key for key in noise if self.chance() < 0.3]
        item |= {key: noise[key] for key in chosen}
        return set(chosen) & {"score", "image_id", "nested", "tool"}

    def spoil(self, chat: list[Turn], item: dict[str, Any]) -> str | None:
        """Add what cannot be placed or read; return what must be said."""
        spoils: dict[str, dict[str, Any]] = {
            "two keys": {"picture": "gone/0.png", "imgs": ["0.png", "1.png", "2.png", "3.png"]},
            "unread": {self.random.choice(["thumbnail", "distractors", "rationale"]): "zzz"},
            "film": {"video": "a.mp4"},
            "other turns": {"conversation": [{"from": "human", "value": "zzz"}]},
        }
        if any(key in item for key in ("caption", "question")):
            spoils.pop("other turns")
        name = self.random.choice(sorted(spoils))
        item |= spoils[name]
        return name


def _joined(parts: Parts) -> Parts:
    """Neighbouring texts as one, none empty: a mark alone parts them when they are written."""
    joined: Parts = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined


def given_back(sample: RawSample, pictures: list[bytes]) -> list[Turn]:
    """A sample as it was drawn."""
    images = iter(sample.images)
    chat: list[Turn] = []
    for message in sample.messages:
        parts: Parts = [
            part["text"] if part["type"] == "text" else pictures.index(next(images)[1])
            for part in message["content"]
        ]
        chat.append((message["role"], parts, message.get("taught", True)))
    assert next(images, None) is None
    return chat


def test_all_of_an_item_is_at_its_place_or_it_is_rejected(
    tmp_path: Path, png: Callable[..., bytes]
) -> None:
    pictures = [png(40 * number) for number in range(NUM_PICTURES)]
    for number, data in enumerate(pictures):
        (tmp_path / f"{number}.png").write_bytes(data)
    drawn = [Writer(seed, pictures).item() for seed in range(NUM_EXAMPLES)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(one.item) + "\n" for one in drawn))
    source = open_source(str(path))
    assert len(source) == NUM_EXAMPLES
    num_spoiled = 0
    for seed, one in enumerate(drawn):
        about = f"seed {seed}: {one.spoiled}: {json.dumps(one.item)[:1500]}"
        try:
            sample = source.row(seed)
        except (SampleError, UserError) as error:
            assert one.spoiled, f"{about}: {error}"
            assert isinstance(error, Rejected) == (one.spoiled != "unread"), about
            num_spoiled += 1
            continue
        assert not one.spoiled, about
        assert given_back(sample, pictures) == one.chat, about
        assert one.unread <= set(sample.unread), about
    assert NUM_EXAMPLES / 6 < num_spoiled < NUM_EXAMPLES / 3


class Hostile:
    """Draws items in which anything may stand anywhere."""

    keys = """image images img image_1 image_paths file_name image_url conversations messages texts
    question answer answers choices options A B C hint system caption id index kind video""".split()
    inner = """from role value content loss weight reasoning_content tool_calls user assistant type
    text index image image_url path bytes url""".split()
    texts = [
        "0.png", "q", "<image>", "<image 1>", "human", "gpt", "user", "assistant", "text", "image",
        "", "nan", "\ufeff", "[", "{", "[1,2]", "['a']", '{"a":1}', "data:image/png;base64,AAAA",
        "http://x/a.png", "file:///a.png", "\0", "A" * 200, "../x", "B", "\ud800", "a" * 5000,
    ]  # fmt: skip
    others = [
        None, 0, 1, -1, 2.5, float("nan"), float("inf"), True, False, 10**30, b"",
        b"BM" + b"x" * 40, b"GIF89a" + bytes(30), b"II*\0" + bytes(30),
    ]  # fmt: skip

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self, depth: int = 0) -> Any:
        kind = self.random.random()
        if kind < 0.6 or depth > 3:
            return self.random.choice(self.texts if kind < 0.35 else self.others)
        if kind < 0.8:
            return [self.value(depth + 1) for _ in range(self.random.randint(0, 3))]
        return {self.random.choice(self.inner): self.value(depth + 1) for _ in range(4)}

    def item(self) -> dict[str, Any]:
        chosen = self.random.sample(self.keys, self.random.randint(1, 6))
        item = {key: self.value() for key in chosen}
        roles = ["user", "assistant", "user", "assistant", "system", None]
        if self.random.random() < 0.5:
            item["messages"] = [
                {"role": self.random.choice(roles), "content": self.value(1)}
                for _ in range(self.random.randint(1, 4))
            ]
        elif self.random.random() < 0.5:
            item |= {"question": "<image>q", "answer": self.value(2)}
        return item


def test_whatever_stands_in_an_item_it_is_built_or_rejected(
    tmp_path: Path, png: Callable[..., bytes]
) -> None:
    """Nothing but a reason comes out, which the builder counts: no traceback for any input."""
    (tmp_path / "0.png").write_bytes(png(1))
    items = Items("unit", "x.json", PictureReader(ImageRoot(tmp_path)))
    outcomes = set()
    for seed in range(3000):
        try:
            check(items.sample(Hostile(seed).item()), "unit", seed)
            outcomes.add("built")
        except SampleError as error:
            outcomes.add(error.reason)
        except UserError:
            outcomes.add("unread")
    assert len(outcomes) > 10 and {"built", "unread"} <= outcomes
