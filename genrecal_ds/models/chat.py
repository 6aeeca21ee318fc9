"""Turns a chat with images into one model's token ids, vision inputs and answer spans.

The answer a_k of turn k is its content tokens and the end-of-turn token. This holds for every
model, also where a template's generation block leaves the end-of-turn out. Tokens after the last
end-of-turn are dropped. Spans are found by characters, never by decoding or by tokenising a prefix.
A token that straddles the boundary counts as answer (some templates end the prompt with a space).
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils.chat_template_utils import render_jinja_template

from genrecal_ds.data.pair import EncodedChat, Messages, Unusable
from genrecal_ds.errors import UserError
from genrecal_ds.models.families import FAMILIES
from genrecal_ds.models.processors import backend, load_processor
from genrecal_ds.models.tokenizer_files import check_embedding
from genrecal_ds.models.vlm import read_config


class ChatEncoder:
    """Encodes chats for the model in `folder`; refuses a model whose chats it cannot encode."""

    def __init__(self, folder: str | Path, max_length: int):
        self.folder, self.max_length = Path(folder), max_length
        config = read_config(folder)  # first: it refuses what must not be opened any further
        self.processor = load_processor(folder)
        self.tokenizer = self.processor.tokenizer
        family = FAMILIES[config.model_type]
        rules, self.is_prefix_lm = family.vision_inputs, family.prefix_lm
        self.reads_images = bool(rules)
        self.pixels = backend(config.model_type)
        self.per_token = [key for key, rule in rules.items() if rule == "tokens"]
        self.vision_rules = {key: rule for key, rule in rules.items() if rule != "tokens"}
        self.template = self.processor.chat_template or self.tokenizer.chat_template
        if not self.template:
            raise UserError(f"{folder}: no chat template; add chat_template.jinja to the folder")
        self.leading = ""  # what the processor would put in front, and shift every offset by
        if family.writes_bos:
            self.leading = self.tokenizer.bos_token or self.tokenizer.eos_token
        text = config.get_text_config()
        # Molmo2 embeds the tokens of its pictures behind those that its head knows.
        num_rows = text.vocab_size + getattr(text, "additional_vocab_size", 0)
        check_embedding(self.folder, self.tokenizer, num_rows)
        self.marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        visual = getattr(config, "vision_config", None)
        own = getattr(visual, "image_token_id", None)  # Phi-4-multimodal has it there
        self.image_token = getattr(config, "image_token_id", own)
        self.digest = digest_folder(self.folder)
        added = self.tokenizer.added_tokens_decoder
        unknown = self.tokenizer.unk_token_id  # special by name, but it stands for text
        special = [token for token in added if added[token].special and token != unknown]
        self.special_ids = torch.tensor(special, dtype=torch.int64)
        self.end_of_turn: int | None = None
        self.stops: set[int] = set()  # what generate ends at, the end of turn among them
        self.end_of_turn = self._find_end_of_turn()

    def encode(self, messages: Messages, images: list[Image]) -> EncodedChat:
        """Ids, spans and vision inputs. Raises Unusable with a reason for an unusable sample."""
        if images and not self.reads_images:
            raise Unusable("a picture, and a model that reads text only")
        if self._holds_image_token(messages):
            raise Unusable("a text that holds the image token")  # it would count as a picture
        text, starts = self._render(messages)
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

    def num_visual(self, chat: EncodedChat) -> int:
        """How many of a chat's tokens stand for pictures."""
        if self.image_token is None:
            return 0
        return int((chat.input_ids_T == self.image_token).sum())

    def _holds_image_token(self, messages: Messages) -> bool:
        token = getattr(self.processor, "image_token", None)
        texts = (
            part["text"]
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "text"
        )
        return token is not None and any(token in text for text in texts)

    def prompt(self, messages: Messages, images: list[Image]) -> dict[str, Tensor]:
        """Inputs [1, T] for generate: the chat up to where the last answer begins."""
        text = self._template_text(messages, add_generation_prompt=True)
        encoding = self._tokenize(text, images)
        keys = ("input_ids", "attention_mask", *self.per_token, *self.vision_rules)
        return {key: encoding[key] for key in keys if key in encoding}

    def _tokenize(self, text: str, images: list[Image]):
        return self.processor(
            text=[text],
            images=images or None,
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            return_mm_token_type_ids=bool(self.per_token),
            add_special_tokens=False,  # the template writes them
            return_tensors="pt",
        )

    def _render(self, messages: Messages) -> tuple[str, list[int]]:
        """The text of a chat and the character at which each answer starts."""
        if messages[-1]["role"] != "assistant":
            raise Unusable("the last message is not the assistant's")
        if self.marks_answers:
            texts, blocks = render_jinja_template(
                [messages], chat_template=self.template, return_assistant_tokens_mask=True,
                **self._special_tokens,
            )  # fmt: skip
            text = self._led(texts[0])
            starts = [start + len(text) - len(texts[0]) for start, _ in blocks[0]]
        else:
            text, starts = self._template_text(messages), []
            for position, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                prefix = self._template_text(messages[:position], add_generation_prompt=True)
                if not text.startswith(prefix):
                    raise Unusable("the template rewrites earlier turns")
                starts.append(len(prefix))
        contents = [_text_of(message) for message in messages if message["role"] == "assistant"]
        if len(starts) != len(contents):
            raise Unusable("the template drops or merges assistant turns")
        end = self.tokenizer.convert_ids_to_tokens(self.end_of_turn) if self.end_of_turn else None
        for start, content in zip(starts, contents, strict=True):
            if end and end in content:
                raise Unusable("an answer that holds the end-of-turn token")
            # Both models must be taught the same text; a template that alters it breaks that.
            if not text[start:].lstrip().startswith(content.strip()):
                raise Unusable("the template alters an answer")
        return text, starts

    def _template_text(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        texts, _ = render_jinja_template(
            [messages], chat_template=self.template, add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
        )  # fmt: skip
        return self._led(texts[0])

    def _led(self, text: str) -> str:
        return text if text.startswith(self.leading) else self.leading + text

    @property
    def _special_tokens(self) -> dict[str, str]:
        return self.tokenizer.special_tokens_map

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
        ends = (ids[start:] == self.end_of_turn).nonzero()
        if not len(ends):
            raise Unusable("an answer without end-of-turn token")
        if start == 0:
            raise Unusable("no question token before the first answer")
        return start, start + int(ends[0]) + 1

    def _find_end_of_turn(self) -> int:
        """Find the first stop token after an answer: where generate stops, the turn ends."""
        stops = {self.tokenizer.eos_token_id}
        if (self.folder / "generation_config.json").is_file():
            eos = GenerationConfig.from_pretrained(self.folder).eos_token_id
            stops |= set(eos if isinstance(eos, list) else [eos])
        stops.discard(None)
        self.stops = stops
        probe = [_message("user", "x"), _message("assistant", "xyz")]
        try:
            text, starts = self._render(probe)
        except Unusable as error:
            raise UserError(
                f"{self.folder}: cannot find answers in its chat template ({error}); "
                "put {% generation %} .. {% endgeneration %} around the assistant's content"
            ) from None
        ids = self.tokenizer(text[starts[0] :], add_special_tokens=False)["input_ids"]
        if end := next((token for token in ids if token in stops), None):
            return end
        raise UserError(
            f"{self.folder}: its chat template writes no end-of-turn after an answer (stop tokens "
            f"{sorted(stops)}); set eos_token_id in generation_config.json to the token it writes"
        )


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


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    if any(part["type"] != "text" for part in content):
        raise Unusable("an image inside an answer")
    return "".join(part["text"] for part in content)
