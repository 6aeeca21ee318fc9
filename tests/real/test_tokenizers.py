"""Released tokenizers: the bytes of their tokens, matches of two, and settings that never act."""

import bisect
import itertools
import json
import random
import shutil
import unicodedata

import pytest
import torch
from tokenizers import Tokenizer

from genrecal_ds.data.byte_matching import match_bytes
from genrecal_ds.models.processors import load_tokenizer
from genrecal_ds.models.token_bytes import MOST_BYTES, byte_vocabulary, token_bytes
from genrecal_ds.ops.next_byte import END, STOP

pytestmark = pytest.mark.real
NAMES = (
    "qwen3", "gemma3", "llama3_1", "llama2", "gptoss", "deepseek_v3", "smollm2_135m",
    "gemma3_270m",
)  # fmt: skip
TEXTS = (
    "def f(x):\n    if x:\n\t\treturn {'a': [1, 2.50]}  # ok\n\n\nprint(f(10_000))\n",
    "| a | b |\r\n|---|---|\r\n| 12 | -3e5 |\r\n",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u5427\u3002",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u05e9\u05dc\u05d5\u05dd "
    "\u0645\u0631\u062d\u0628\u0627",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 "
    "\uc548\ub155\ud558\uc138\uc694 \u3053\u3093\u306b\u3061\u306f",
    "na\u00efve cafe\u0301 \ufb01n \u00bd \u20ac5 \U0001f469\u200d\U0001f680\U0001f600",
    "  blanks   in  front, and   behind  ",
    "x" * 70 + " " * 40 + "=" * 50,
)


@pytest.fixture(scope="module")
def vocabularies(released):
    """name -> (tokenizer, the bytes of its tokens)."""
    found = {}
    for name in NAMES:
        tokenizer = load_tokenizer(released(name))
        found[name] = tokenizer, token_bytes(tokenizer, released(name))
    return found


def pieces_of(vocabulary, text):
    tokenizer, pieces = vocabulary
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [pieces[token] for token in ids]


def normal(text: bytes) -> str:
    """Qwen composes characters; Llama 2 puts a blank in front."""
    return unicodedata.normalize("NFC", text.decode(errors="surrogateescape")).lstrip(" ")


@pytest.mark.parametrize("name", NAMES)
def test_pieces_spell_the_text(vocabularies, name):
    for text in TEXTS:
        said = b"".join(pieces_of(vocabularies[name], text))
        assert normal(said) == normal(text.encode()), text


def gpt2_table() -> dict[str, int]:
    """Printable bytes stand for themselves, the others are numbered from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def spelt_by_file(folder) -> dict[int, bytes]:
    """What each token of a tokenizer.json spells, by the file's own kind of model."""
    said = json.loads((folder / "tokenizer.json").read_text())
    table = gpt2_table()
    is_bytes = "ByteLevel" in json.dumps(said["decoder"])
    spelt = {}
    for piece, token in said["model"]["vocab"].items():
        if is_bytes:
            spelt[token] = bytes(table[character] for character in piece)
        elif len(piece) == 6 and piece[:3] == "<0x":
            spelt[token] = bytes.fromhex(piece[3:5])
        else:
            spelt[token] = piece.replace("\u2581", " ").encode()
    for added in said["added_tokens"]:
        spelt.pop(added["id"], None)  # text or none, by its class
    return spelt


@pytest.mark.parametrize(("name", "size"), [("smollm2_135m", 49_152), ("gemma3_270m", 262_144)])
def test_byte_tables_of_a_whole_vocabulary(vocabularies, released, name, size):
    """Every token's bytes by the file itself, and by decoding; the tables against bisection."""
    _, pieces = vocabularies[name]
    assert len(pieces) == size
    spelt = spelt_by_file(released(name))
    assert len(spelt) > 0.97 * size
    assert all(pieces[token] == said for token, said in spelt.items())
    decoded = Tokenizer.from_file(str(released(name) / "tokenizer.json"))
    anchor = decoded.encode("a", add_special_tokens=False).ids[-1]
    behind = decoded.decode_batch([[anchor, token] for token in spelt])
    wrong = [
        token
        for token, text in zip(spelt, behind, strict=True)
        if "\ufffd" not in text and text != "a" + spelt[token].decode(errors="replace")
    ]
    assert wrong == []

    end = pieces.index(None)
    tables = byte_vocabulary(pieces, end, size, torch.device("cpu"))
    words = sorted((piece, token) for token, piece in enumerate(pieces) if piece)
    assert tables.first_V[end] == END and int((tables.first_V == STOP).sum()) == size - 1 - len(
        words
    )
    drawn = random.Random(0)
    for _ in range(4000):
        word, token = drawn.choice(words)
        depth = drawn.randrange(min(len(word), MOST_BYTES))
        place = int(tables.place_V[token])
        low, high = (int(t[place, depth]) for t in (tables.low_WD, tables.high_WD))
        prefix = word[:depth]
        first = bisect.bisect_left(words, (prefix, -1))
        last = bisect.bisect_left(words, (prefix + b"\xff" * 300, -1))
        assert (low, high) == (first, last), (word, depth)
        assert int(tables.symbol_WD[place, depth]) == word[depth]
        assert int(tables.first_V[token]) == word[0]


def test_all_ordered_pairs_share_right_boundaries_alone(vocabularies):
    found = wanted = 0
    for teacher, student in itertools.permutations(NAMES, 2):
        for text in TEXTS:
            theirs, ours = (
                [*pieces_of(vocabularies[name], text), None] for name in (teacher, student)
            )
            matches = list(zip(*map(list, match_bytes(theirs, ours)), strict=True))
            assert matches.pop() == (len(ours) - 1, 0, len(theirs) - 1, 0)
            spelt = [b"".join(side[:-1]).lstrip(b" ") for side in (theirs, ours)]
            for j, b, i, a in matches:
                before = b"".join(ours[:j]) + ours[j][:b]
                others = b"".join(theirs[:i]) + theirs[i][:a]
                assert normal(before) == normal(others), (teacher, student, text)
                if spelt[0] == spelt[1]:  # else one side composes the next character, perhaps
                    assert ours[j][b] == theirs[i][a], (teacher, student, text)
                    assert before.lstrip(b" ") == others.lstrip(b" "), (teacher, student, text)
            found += len(matches)
            wanted += len(spelt[1])
    print(f"\n{found} boundaries of {wanted} bytes")
    assert found > 0.97 * wanted


@pytest.mark.parametrize("name", NAMES[:-1])  # the last has the second's tokenizer
def test_truncation_and_padding_of_the_file_never_act(vocabularies, released, name, tmp_path):
    """Some releases were saved with both: a chat would be cut, or filled, without a word."""
    copied = tmp_path / name
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(released(name), copied, ignore=weights)
    path = copied / "tokenizer.json"
    said = json.loads(path.read_text())
    filler = said["added_tokens"][0]
    said["truncation"] = {
        "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    said["padding"] = {
        "strategy": {"Fixed": 300}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": filler["id"], "pad_type_id": 0, "pad_token": filler["content"],
    }  # fmt: skip
    path.write_text(json.dumps(said))
    tokenizer = load_tokenizer(copied)
    for text in TEXTS:
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        found = tokenizer([text], return_tensors="pt", **options)
        expected = vocabularies[name][0]([text], return_tensors="pt", **options)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
