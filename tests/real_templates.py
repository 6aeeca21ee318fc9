"""Runs conversations through every chat template of a folder, as training would.

    python -m tests.real_templates FOLDER [--markdown]

Prints a line for each .jinja file: which conversations can be taught, and why others cannot. A
template gets a tokenizer of single bytes that knows the special tokens written in the template.
What is taught is compared with transformers' own rendering of the same chat.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from genrecal_ds.data.pair import Messages, Unusable, encode_pairs
from genrecal_ds.errors import UserError
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.chat_template import ChatTemplate
from genrecal_ds.models.marked_chat import one_message
from tests.zoo.saving import save_text

SPECIAL = re.compile(
    r"<[|\uff5c][^<>\s'\"{}]*?[|\uff5c]>|</?s>|<(?:bos|eos|pad|image)>|<\w+_of_\w+>"
    r"|</?(?:start|end)_\w+>|<turn\|>|<\|\w+>|\[/?(?:INST|SYSTEM_PROMPT|IMG)\]"
)

IMAGE = re.compile(r"<\|image(?:_pad)?\|>|<image>|<start_of_image>|<\|vision_start\|>")


def _chat(*texts: str, system: str | None = None) -> Messages:
    roles = ("user", "assistant")
    chat = [one_message(roles[i % 2], text) for i, text in enumerate(texts)]
    return chat if system is None else [one_message("system", system), *chat]


SPLIT = "one a turn"  # each turn is a sequence of its own
SINGLE = _chat("what is it ?", "it is 7")
CONVERSATIONS = {
    "single": SINGLE,
    "turns": _chat("what is it ?", "it is 7", "and now ?", "an 8"),
    "system": _chat("what is it ?", "it is 7", system="be short"),
    "blanks": _chat("  what\n is it ? \n", "  it\n\n is  7 \n"),
    "unicode": _chat("\u7b54\u3048\u306f ? \U0001f600", "\u00e9t\u00e9 \u4e2d\u6587 \U0001f44d 7"),
    "reasoning": _chat("what is it ?", "<think>\nseven dots\n</think>\n\nit is 7"),
}


def write_model(folder: Path, template: str) -> Path:
    """Write a tiny text model with a template and a tokenizer of bytes and its special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted({*SPECIAL.findall(template), "<s>", "</s>"})
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=end_of_turn(template) or "</s>"
    )
    save_text(folder, fast, template, model_type="llama")
    return folder


def end_of_turn(template: str) -> str | None:
    """Return the first special token that a template writes behind an answer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    for content in ("xyz", [{"type": "text", "text": "xyz"}]):
        turns = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            (text,), _ = render_jinja_template(
                [turns], chat_template=template, bos_token="<s>", eos_token="</s>"
            )
        except Exception:  # whatever a template may raise: the other kind may do
            continue
        if "xyz" in text and (found := SPECIAL.search(text.rpartition("xyz")[2])):
            return found[0]
    return None


def check(encoder: ChatEncoder, messages: Messages) -> str:
    """Return how the answers are taught, or the reason why they are not.

    Raises AssertionError where something else than the answers would be taught.
    """
    try:
        pairs = encode_pairs(messages, [], {"student": encoder})
    except Unusable as error:
        return str(error)
    answers = [m["content"][0]["text"] for m in messages if m["role"] == "assistant"]
    taught = []
    for pair in pairs:
        ids = pair.student.input_ids_T
        for start, end in pair.student.answers:
            assert int(ids[end - 1]) in encoder.stops
            taught.append(encoder.tokenizer.decode(ids[start : end - 1], skip_special_tokens=True))
    assert [squeezed(text) for text in taught] == [squeezed(text) for text in answers], taught
    assert len(pairs) == 1 or all(len(pair.student.answers) == 1 for pair in pairs)
    # transformers' own rendering, as a whole.
    content = encoder.template.content["user"]
    plain = [
        {**m, "content": m["content"][0]["text"] if content == "string" else m["content"]}
        for m in messages
    ]
    whole = encoder.tokenizer.apply_chat_template(plain, tokenize=False)
    own = encoder.tokenizer.decode(pairs[-1].student.input_ids_T)
    if encoder.template.appended:
        own, whole = own.replace("</s>", ""), whole.replace("</s>", "")
    undated = re.compile(r"\d{4}-\d\d-\d\d|\d\d \w{3} \d{4}")
    own, whole = undated.sub("", own), undated.sub("", whole)
    assert whole.startswith(own), (own, whole)
    return "yes" if len(pairs) == 1 else SPLIT


def check_picture(encoder: ChatEncoder, image_token: str) -> str:
    """Say whether a picture stands before its question, once, or the reason why not."""
    try:
        template = ChatTemplate(
            encoder.folder, encoder.template.source, encoder.tokenizer.special_tokens_map,
            image_token, encoder.tokenizer.all_special_tokens,
            [encoder.tokenizer.eos_token], encoder.tokenizer.eos_token,
        )  # fmt: skip
        text = template.render([one_message("user", "what ?", num_images=1), *SINGLE[1:]]).text
    except (UserError, Unusable) as error:
        return str(error).partition(": ")[2]
    assert text.count(image_token) == 1 and text.index(image_token) < text.index("what ?")
    return "yes"


def squeezed(text: str) -> str:
    """A template may write the blanks around an answer and its reasoning in its own way."""
    return re.sub(r"\s*(</?think>)\s*", r"\1", text).strip()


def line_of(path: Path) -> dict[str, str]:
    """Return by conversation how it is taught, or the reason why it is not."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            encoder = ChatEncoder(write_model(Path(scratch), path.read_text("utf-8")), 1 << 20)
        except UserError as error:
            return dict.fromkeys((*CONVERSATIONS, "picture"), str(error).partition(": ")[2])
        line = {name: check(encoder, chat) for name, chat in CONVERSATIONS.items()}
        image = IMAGE.search(encoder.template.source)
        return {"picture": check_picture(encoder, image[0]) if image else "-", **line}


def main() -> int:
    """Print a line a template; 0 if each can be used for plain conversations of one turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--markdown", action="store_true", help="print a table for docs/models.md")
    args = parser.parse_args()
    lines = {path.stem: line_of(path) for path in sorted(args.folder.rglob("*.jinja"))}
    if args.markdown:
        print("\n".join(markdown(lines)))
    else:
        for name, line in lines.items():
            print(f"{name}: {json.dumps(line)}")
    usable = sum(line["single"] == "yes" for line in lines.values())
    print(f"{usable} of {len(lines)} templates can be used", file=sys.stderr)
    return 0 if usable == len(lines) else 1


def markdown(lines: dict[str, dict[str, str]]) -> list[str]:
    """A table, reasons numbered below it."""
    reasons: dict[str, int] = {}

    def cell(line: dict[str, str], name: str) -> str:
        said = line[name]
        is_reason = said not in ("yes", SPLIT, "-")
        return f"({reasons.setdefault(said, len(reasons) + 1)})" if is_reason else said

    kinds = [*CONVERSATIONS, "picture"]
    head = ["| template | " + " | ".join(kinds) + " |", "|---" * (1 + len(kinds)) + "|"]
    rows = [f"| {name} | " + " | ".join(cell(line, kind) for kind in kinds) + " |"
            for name, line in lines.items()]  # fmt: skip
    return [*head, *rows, "", *(f"({number}) {reason}" for reason, number in reasons.items())]


if __name__ == "__main__":
    sys.exit(main())
