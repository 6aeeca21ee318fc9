"""Turns a chat with images into one model's token ids, vision inputs and answer spans.

The answer a_k of turn k is its content tokens and the end-of-turn token. Tokens after the last
end-of-turn are dropped. Spans are found by characters, never by decoding or by tokenising a prefix.
A token that straddles the boundary counts as answer (some templates end the prompt with a space).
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, ProcessorMixin

from genrecal_ds.data.pair import EncodedChat, Messages, Unusable
from genrecal_ds.errors import UserError
from genrecal_ds.models.chat_template import ChatTemplate
from genrecal_ds.models.config_file import read_config
from genrecal_ds.models.families import family_of
from genrecal_ds.models.marked_chat import PROBE
from genrecal_ds.models.processors import backend, load_processor
from genrecal_ds.models.template_files import read_template
from genrecal_ds.models.tokenizer_files import check_embedding

# Tokens of pictures, films and sounds, as processors and configs name them.
MODALITY = re.compile(r"image|img|video|audio|vision|visual|frame|boi|eoi|boa|eoa|speech")


class ChatEncoder:
    """Encodes chats for the model in `folder`; refuses a model whose chats it cannot encode."""

    def __init__(self, folder: str | Path, max_length: int):
        self.folder, self.max_length = Path(folder), max_length
        config = read_config(folder)  # first: it refuses what must not be opened any further
        self.processor = load_processor(folder)
        self.tokenizer = self.processor.tokenizer
        self.family = family_of(config.model_type)
        rules, self.is_prefix_lm = self.family.vision_inputs, self.family.prefix_lm
        self.reads_images = bool(rules)
        self.pixels = backend(config.model_type)
        self.per_token = [key for key, rule in rules.items() if rule == "tokens"]
        self.vision_rules = {key: rule for key, rule in rules.items() if rule != "tokens"}
        text = config.get_text_config()
        # Molmo2 embeds the tokens of its pictures behind those that its head knows.
        num_rows = text.vocab_size + getattr(text, "additional_vocab_size", 0)
        check_embedding(self.folder, self.tokenizer, num_rows)
        visual = getattr(config, "vision_config", None)
        own = getattr(visual, "image_token_id", None)  # Phi-4-multimodal has it there
        self.image_token = getattr(config, "image_token_id", own)
        self.digest = digest_folder(self.folder)
        added = self.tokenizer.added_tokens_decoder
        unknown = self.tokenizer.unk_token_id  # special by name, but it stands for text
        special = [token for token in added if added[token].special and token != unknown]
        self.special_ids = torch.tensor(special, dtype=torch.int64)
        self.stops = self._read_stops()  # what generate ends at, the end of turn among them
        # A stale generation_config.json may name a piece of text: no turn ends there.
        ends = sorted(self.stops & added.keys()) or sorted(self.stops)
        self._stop_tokens = [self._token(stop) for stop in ends]
        self._stop_ids = torch.tensor(ends, dtype=torch.int64)
        self._placeholders: set[str] = set()  # in no text of a sample
        if self.reads_images:
            self._placeholders = set(_placeholders(self.processor, config, self._token))
            self._placeholders -= {*self._stop_tokens, self.tokenizer.bos_token}
        self._leading, self._adds_bos = self._read_bos()
        self.template = self._read_template()
        self.end_of_turn = self._find_end_of_turn()

    def encode(
        self, messages: Messages, images: list[Image], last_turn: bool = False
    ) -> EncodedChat:
        """Ids, spans and vision inputs; last_turn: the last answer alone is one.

        Raises Unusable with a reason for an unusable sample, whatever its text holds.
        """
        if images and not self.reads_images:
            raise Unusable("a picture, and a model that reads text only")
        self._check_texts(messages)
        rendered, starts = self.template.render(messages, last_turn)
        text = self._led(rendered)
        starts = [start + len(text) - len(rendered) for start in starts]
        encoding = self._tokenize(text, images)
        ids = encoding["input_ids"][0]
        offsets = encoding["offset_mapping"][0]
        replaced = encoding.get("text_replacement_offsets")
        answers = [self._span(ids, offsets, _expanded(start, replaced)) for start in starts]
        if any(a[1] > b[0] for a, b in zip(answers, answers[1:], strict=False)):
            raise Unusable("an answer has no end-of-turn of its own")
        per_token = {key: encoding[key][0] for key in self.per_token}
        if self.is_prefix_lm:
            if len(answers) > 1:
                raise Unusable("a second turn, and a model that reads one question")
            per_token["token_type_ids"][answers[0][0] :] = 1
        vision = {key: encoding[key] for key in self.vision_rules if key in encoding}
        return EncodedChat(ids, tuple(answers), per_token, vision).cut(len(answers))

    def rewrites(self, messages: Messages) -> bool:
        """Whether each turn needs a sequence of its own: ChatTemplate.rewrites."""
        return self.template.rewrites(messages)

    def num_visual(self, chat: EncodedChat) -> int:
        """How many of a chat's tokens stand for pictures."""
        if self.image_token is None:
            return 0
        return int((chat.input_ids_T == self.image_token).sum())

    def prompt(self, messages: Messages, images: list[Image]) -> dict[str, Tensor]:
        """Inputs [1, T] for generate: the chat up to where the next answer begins."""
        encoding = self._tokenize(self._led(self.template.prompt(messages)), images)
        keys = ("input_ids", "attention_mask", *self.per_token, *self.vision_rules)
        return {key: encoding[key] for key in keys if key in encoding}

    def _check_texts(self, messages: Messages) -> None:
        """Raise Unusable for a text with a token that would not be read as text."""
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for text in (part["text"] for part in parts if part["type"] == "text"):
                for token in self._placeholders:  # it would count as a picture, or as a sound
                    if token in text:
                        raise Unusable(f"a text that holds the token {token}")
                if message["role"] == "assistant" and any(s in text for s in self._stop_tokens):
                    raise Unusable("an answer that holds the end-of-turn token")

    def _tokenize(self, text: str, images: list[Image]) -> Any:
        bos = self.tokenizer.bos_token
        try:
            return self.processor(
                text=[text],
                images=images or None,
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                return_mm_token_type_ids=bool(self.per_token),
                add_special_tokens=self._adds_bos and not text.startswith(bos),
                padding=False,  # whatever tokenizer.json says
                truncation=False,
                return_tensors="pt",
            )
        except (ValueError, TypeError, LookupError) as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise Unusable(f"the processor refuses the chat: {reason}") from None

    def _led(self, text: str) -> str:
        return text if text.startswith(self._leading) else self._leading + text

    def _span(self, ids: Tensor, offsets: Tensor, start_char: int) -> tuple[int, int]:
        """Tokens from the first that reaches past start_char to the next end-of-turn."""
        inside = offsets[:, 1] > start_char
        # One that swallows the blanks behind it (rstrip) reaches into an answer that starts with
        # blanks. It is the template's all the same.
        inside &= ~(torch.isin(ids, self.special_ids) & (offsets[:, 0] < start_char))
        inside = inside.nonzero()
        if not len(inside):
            raise Unusable("no token lies in the answer")
        start = int(inside[0])
        ends = torch.isin(ids[start:], self._stop_ids).nonzero()
        if not len(ends):
            raise Unusable("an answer without end-of-turn token")
        if start == 0:
            raise Unusable("no question token before the first answer")
        return start, start + int(ends[0]) + 1

    def _read_template(self) -> ChatTemplate:
        source = read_template(self.folder) or self.family.template
        if not source:
            raise UserError(
                f"{self.folder}: no chat template; add chat_template.jinja to the folder"
            )
        special = [self._token(int(token)) for token in self.special_ids]
        image_token = getattr(self.processor, "image_token", None) if self.reads_images else None
        return ChatTemplate(
            self.folder, source, self.tokenizer.special_tokens_map, image_token, special,
            self._stop_tokens, self.tokenizer.eos_token,
        )  # fmt: skip

    def _read_bos(self) -> tuple[str, bool]:
        """(text that the processor itself puts in front, whether it lets the tokenizer put bos).

        A processor has bos written where the template writes none. A tokenizer's template writes
        all there is.
        """
        if self.family.writes_bos:  # this one shifts every offset by it
            return self.tokenizer.bos_token or self.tokenizer.eos_token, False
        if not isinstance(self.processor, ProcessorMixin) or self.tokenizer.bos_token is None:
            return "", False
        plain, written = (
            self.tokenizer("x", add_special_tokens=adds)["input_ids"] for adds in (False, True)
        )
        return "", written == [self.tokenizer.bos_token_id, *plain]

    def _read_stops(self) -> set[int]:
        stops = {self.tokenizer.eos_token_id}
        if (self.folder / "generation_config.json").is_file():
            eos = GenerationConfig.from_pretrained(self.folder).eos_token_id
            stops |= set(eos if isinstance(eos, list) else [eos])
        return stops - {None}

    def _find_end_of_turn(self) -> int:
        """Return the first stop token after an answer: where generate stops, the turn ends."""
        chat = self.encode(PROBE, [])
        return int(chat.input_ids_T[-1])

    def _token(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))


def _placeholders(
    processor: Any, config: PreTrainedConfig, spelt: Callable[[int], str]
) -> Iterator[str]:
    """All tokens that stand for pictures, films or sounds, by whatever names one."""
    named = {name: value for name, value in vars(processor).items() if name.endswith("_token")}
    yield from (value for value in named.values() if isinstance(value, str))
    yield from (
        str(token)
        for token in processor.tokenizer.added_tokens_decoder.values()
        if MODALITY.search(str(token).lower())
    )
    for part in (config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))):
        for name, value in vars(part).items():
            if MODALITY.search(name) and re.search(r"_token_(id|index)s?$", name):
                ids = value if isinstance(value, list) else [value]
                yield from (spelt(token) for token in ids if isinstance(token, int))


def digest_folder(folder: Path) -> str:
    """sha256 hex over the files of a model folder that decide tokens: all but its weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        is_small = path.suffix in (".json", ".jinja", ".model", ".txt", ".tiktoken")
        if path.is_file() and is_small and not path.name.endswith(".index.json"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _expanded(char: int, replacements: Any) -> int:
    """Move a character's place by what a processor put in place of pictures before it."""
    gained = 0
    # A text-only chat has none: None, or an empty list or tensor, depending on the family.
    for replaced in replacements[0] if replacements is not None and len(replacements) else []:
        if replaced["span"][1] <= char:
            gained = replaced["new_span"][1] - replaced["span"][1]
    return char + gained
