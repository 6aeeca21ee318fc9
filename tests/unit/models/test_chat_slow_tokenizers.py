"""Tokenizers without offsets: the characters of their tokens, exact or refused."""

import json
import shutil

import pytest
from hypothesis import given, settings
from transformers import AddedToken, BertGenerationTokenizer, ByT5Tokenizer, PreTrainedTokenizer

from genrecal_ds.data.pair import Unusable
from genrecal_ds.errors import UserError
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.offsets import SlowOffsets
from tests.unit.models.test_chat_answer_masks import check_mask, systems, turns
from tests.unit.models.test_tokenizer_files import ids_of, sentencepiece_file, sentences
from tests.unit.models.test_vlm_every_family import chat

pytestmark = pytest.mark.unit
SAYS = ["<s>", "<|end|>", "<|user|>", "<|bot|>"]
TEXT = "<s><|user|> 3  plus\n8<|end|><|bot|>\u4e2d\U0001f600 \ufb01 caf\u00e9 e\u0301<|end|>"


def slow_folder(source, folder, kind="unigram", named="BertGenerationTokenizer", legacy=True):
    """A row's folder with a slow tokenizer in place of its own; same special tokens."""
    shutil.copytree(source, folder)
    (folder / "tokenizer.json").unlink()
    sentencepiece_file(folder / "tokenizer.model", kind)
    shutil.copy(folder / "tokenizer.model", folder / "spiece.model")  # one name per class
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said |= {"tokenizer_class": named, "legacy": legacy, "backend": "sentencepiece"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)["vocab_size"] = 600
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def walk(adds_blank):
    """A tokeniser for check_mask: pieces laid along the text in bytes, from left to right."""

    def tokenise(tokenizer, text):
        ids = ids_of(tokenizer, text)
        character = [number for number, char in enumerate(text) for _ in char.encode()]
        rest, spans, is_first = text.encode(), [], True
        for piece in tokenizer.convert_ids_to_tokens(ids):
            at = len(character) - len(rest)
            is_special = piece in tokenizer.added_tokens_encoder
            if is_special:
                word = piece.encode()
            elif piece.startswith("<0x"):
                word = bytes.fromhex(piece[3:5])
            else:
                word = piece.replace("\u2581", " ").encode()
                word = word[1:] if is_first and adds_blank else word
            assert rest.startswith(word)
            rest = rest[len(word) :]
            spans.append((character[at], character[at + max(len(word), 1) - 1] + 1))
            is_first = is_special
        assert not rest
        return ids, spans

    return tokenise


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    "row, kind", [("qwen2_vl", "bpe"), ("internvl", "unigram"), ("llama", "unigram")]
)
def test_answer_tokens_of_a_slow_tokenizer_cover_the_answer(zoo, tmp_path, row, kind, legacy):
    folder = slow_folder(zoo(row), tmp_path / "model", kind, legacy=legacy)
    encoder = ChatEncoder(folder, 100_000)
    assert not encoder.tokenizer.is_fast

    @settings(max_examples=25, derandomize=True, deadline=None, database=None)
    @given(turns=turns, system=systems)
    def check(turns, system):
        if not encoder.reads_images:
            turns = [(0, *texts) for _, *texts in turns]
        # Without a blank added, this class tokenises one that is there behind <unk>.
        check_mask(encoder, chat(*turns, system=system), tokenise=walk(adds_blank=legacy))

    check()
    messages = chat((0, "x ?", "7"))
    prompt = encoder.prompt(messages[:1], [])["input_ids"][0]
    start, _ = encoder.encode(messages, []).answers[0]
    assert prompt.tolist() == encoder.encode(messages, []).input_ids_T[:start].tolist()


def pieces(tokenizer, text):
    """(id, its characters) of every token."""
    ids = ids_of(tokenizer, text)
    spans = SlowOffsets(tokenizer).spans(text, ids)
    assert len(spans) == len(ids)
    return [(token, text[start:end]) for token, (start, end) in zip(ids, spans, strict=True)]


def sentencepiece_tokenizer(folder, **spec):
    sentencepiece_file(folder / "spiece.model", "bpe", **spec)
    tokens = {"bos_token": "<s>", "eos_token": "<|end|>", "additional_special_tokens": SAYS}
    return BertGenerationTokenizer(vocab_file=str(folder / "spiece.model"), **tokens)


def test_normalised_text_keeps_its_characters(tmp_path):
    """nmt_nfkc writes one character as two, a line break as a blank, and drops blanks."""
    spec = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    tokenizer = sentencepiece_tokenizer(tmp_path, **spec)
    found = pieces(tokenizer, TEXT)
    said = list(zip(tokenizer.convert_ids_to_tokens([t for t, _ in found]), found, strict=True))
    assert [text for piece, (_, text) in said if piece in ("f", "i")] == ["\ufb01", "\ufb01"]
    assert ("\u25818", "\n8") in [(piece, text) for piece, (_, text) in said]
    assert "".join(dict.fromkeys(text for _, text in found if text.startswith("<"))) == (
        "<s><|user|><|end|><|bot|>"
    )


def test_unknown_characters_keep_their_places(tmp_path):
    tokenizer = sentencepiece_tokenizer(tmp_path, byte_fallback=False)
    found = pieces(tokenizer, "3 \U0001f600\U0001f44d 7<|end|>")
    assert (tokenizer.unk_token_id, "\U0001f600\U0001f44d") in found
    assert found[-1] == (tokenizer.eos_token_id, "<|end|>")


def test_blanks_that_an_added_token_swallows_belong_to_no_token(tmp_path):
    tokenizer = sentencepiece_tokenizer(tmp_path)
    tokenizer.add_tokens([AddedToken("<|x|>", rstrip=True, lstrip=True, special=True)])
    text = "3  <|x|> \n 8"
    ids = ids_of(tokenizer, text)
    spans = SlowOffsets(tokenizer).spans(text, ids)
    assert spans[0] == (0, 1) and (3, 8) in spans and spans[-1] == (11, 12)
    assert not any(start < 3 and end > 1 for start, end in spans)


def test_a_tokenizer_of_bytes_gives_every_byte_its_character():
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SAYS])
    assert pieces(tokenizer, "\u00e9 7<|end|>") == [
        (0xC3 + 3, "\u00e9"), (0xA9 + 3, "\u00e9"), (32 + 3, " "), (0x37 + 3, "7"),
        (tokenizer.convert_tokens_to_ids("<|end|>"), "<|end|>"),
    ]  # fmt: skip


class OwnWay(PreTrainedTokenizer):
    """As Qwen's first release: tiktoken's bytes as pieces, special tokens found by itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    vocab_size = 70_000

    def get_vocab(self):
        return {}

    def tokenize(self, text, **kwargs):
        pieces = []
        for number, part in enumerate(text.split("<|end|>")):
            raw = part.encode()
            pieces += ["<|end|>"] if number else []
            pieces += [raw[start : start + 2] for start in range(0, len(raw), 2)]
        return pieces

    def convert_tokens_to_ids(self, tokens):
        if isinstance(tokens, list):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        return 69_999 if tokens == "<|end|>" else int.from_bytes(tokens, "big")


def test_a_tokenizer_with_a_way_of_its_own_is_followed_where_its_bytes_spell_the_text():
    tokenizer = OwnWay()
    text = "a\u4e2d7<|end|>"  # 61 e4 | b8 ad | 37
    assert [said for _, said in pieces(tokenizer, text)] == ["a\u4e2d", "\u4e2d", "7", "<|end|>"]
    for text in sentences(50):
        assert pieces(tokenizer, text)


class LowerCase(OwnWay):
    def tokenize(self, text, **kwargs):
        return super().tokenize(text.lower())


def test_pieces_that_do_not_spell_the_text_are_unusable():
    tokenizer = LowerCase()
    assert pieces(tokenizer, "abc")
    with pytest.raises(Unusable, match="do not spell"):
        pieces(tokenizer, "aBc")


def test_ids_of_another_split_are_unusable(tmp_path):
    tokenizer = sentencepiece_tokenizer(tmp_path)
    tokenizer.add_tokens([AddedToken("plus", single_word=True)])
    with pytest.raises(Unusable, match="a way of its own"):
        pieces(tokenizer, "3surplus 8")
    ids = ids_of(tokenizer, "3 plus 8")
    with pytest.raises(Unusable, match="a way of its own"):
        SlowOffsets(tokenizer).spans("3 plus 8", ids[::-1])


def test_a_tokenizer_that_never_spells_is_refused(zoo, tmp_path):
    """SigLIP's text tower drops punctuation, special tokens' among it."""
    folder = slow_folder(zoo("llama"), tmp_path / "model", named="SiglipTokenizer")
    with pytest.raises(UserError, match="no exact character offsets") as error:
        ChatEncoder(folder, 100)
    message = str(error.value)
    assert str(folder) in message and "tokenizer.json" in message and "\n" not in message
