"""The bytes of tokens, for every kind of tokenizer; matches of two against their offsets."""

import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from genrecal_ds.data.byte_matching import UNKNOWN, match_bytes
from genrecal_ds.errors import UserError
from genrecal_ds.models.processors import load_tokenizer
from genrecal_ds.models.token_bytes import token_bytes
from tests.unit.models.test_tokenizer_files import (
    ids_of,
    model_folder,
    sentencepiece_file,
    sentences,
)
from tests.zoo.tokenizers import END, KINDS

pytestmark = pytest.mark.unit
# Characters of several bytes, decomposed ones, characters no training text had.
TEXTS = [text.strip() for text in sentences(60)]


@pytest.fixture(scope="module")
def tokenizers(zoo):
    """kind -> (tokenizer, its pieces)."""
    found = {}
    for kind in KINDS:
        folder = zoo("llama", kind)
        tokenizer = load_tokenizer(folder)
        found[kind] = tokenizer, token_bytes(tokenizer, folder)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_spell_the_text(tokenizers, kind):
    tokenizer, pieces = tokenizers[kind]
    spelt = 0
    for text in TEXTS:
        ids = ids_of(tokenizer, text)
        if tokenizer.unk_token_id in ids:
            continue
        said = b"".join(pieces[token] for token in ids)
        assert said.removeprefix(b" ") == text.encode(), text
        spelt += 1
    assert spelt > 20
    for token in (END, "<|user|>"):
        assert pieces[tokenizer.convert_tokens_to_ids(token)] is None


@pytest.mark.parametrize(
    "kind, named, blank",
    [
        ("bpe", "LlamaTokenizer", True),
        ("bpe", "PreTrainedTokenizerFast", False),
        ("unigram", "PreTrainedTokenizerFast", False),
    ],
)
def test_pieces_of_a_sentencepiece_file_alone(tmp_path, kind, named, blank):
    folder = model_folder(tmp_path / "model", tokenizer_class=named)
    sentencepiece_file(folder / "tokenizer.model", kind, add_dummy_prefix=blank)
    tokenizer = load_tokenizer(folder)
    pieces = token_bytes(tokenizer, folder)
    for text in TEXTS[:20]:
        said = b"".join(pieces[token] or b"" for token in ids_of(tokenizer, text))
        assert said.removeprefix(b" ") == text.encode()


def ends_of(tokenizer, text):
    """Characters that each token ends behind, and whether one shares its last character."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ends = [end for _, end in spans]
    is_inside = [end == later for end, later in itertools.pairwise(ends)] + [False]
    return ends, is_inside


@pytest.mark.parametrize("kinds", list(itertools.permutations(KINDS, 2)))
def test_matches_meet_where_the_offsets_do(tokenizers, kinds):
    """By the tokenizers' own character offsets: nothing of ours."""
    (teacher, theirs), (student, ours) = (tokenizers[kind] for kind in kinds)
    met = 0
    for text in TEXTS:
        ids = [ids_of(tokenizer, text) for tokenizer in (teacher, student)]
        if teacher.unk_token_id in ids[0] or student.unk_token_id in ids[1]:
            continue
        sides = [[p[t] for t in i] + [None] for p, i in zip((theirs, ours), ids, strict=True)]
        matched = match_bytes(*sides)
        starts = (matched.teacher_depth_I == 0) & (matched.student_depth_I == 0)
        both_start = dict(zip(matched.teacher_I[starts], matched.student_I[starts], strict=True))
        (ends, inside), (own_ends, own_inside) = (ends_of(t, text) for t in (teacher, student))
        whole = {end for end, part in zip(own_ends, own_inside, strict=True) if not part}
        for i, end in enumerate(ends[:-1]):
            if not inside[i] and end >= own_ends[0]:
                assert (i + 1 in both_start) == (end in whole), (text, i)
                if end in whole:
                    assert own_ends[both_start[i + 1] - 1] == end
                    met += 1
        assert len(matched.student_I) == len(text.encode()) + 1  # every byte, and the end
        assert (np.diff(matched.teacher_I) >= 0).all()
    assert met > 100


def without_byte_fallback(kind):
    """A vocabulary of a few letters: what it lacks becomes an unknown token."""
    if kind == "unigram":  # which makes one token of all that it lacks in a row
        model, trainer = models.Unigram(), trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>")
    else:
        model = models.BPE(unk_token="<unk>", fuse_unk=kind == "bpe, fused")
        trainer = trainers.BpeTrainer(vocab_size=60)
    trainer.special_tokens, trainer.show_progress = ["<unk>", "<end>"], False
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator(
        ["3 plus 8 is eleven", "a  b, it's 2024\n", "\u00e9"] * 9, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )


@pytest.mark.parametrize("is_teacher", [True, False])
@pytest.mark.parametrize("kind", ["unigram", "bpe, fused", "bpe, one by one"])
def test_matches_around_unknown_tokens_meet_where_the_offsets_do(
    tokenizers, tmp_path, kind, is_teacher
):
    lacking = without_byte_fallback(kind)
    pieces = token_bytes(lacking, tmp_path)
    assert pieces[lacking.unk_token_id] == UNKNOWN and pieces[lacking.eos_token_id] is None
    texts = ["it \u4e2d\u4e2d is", "\u4e2da\u4e2db", "a??a?a b", "\ufb01ve", "a \u4e2d", "ee\u0301"]
    num_unknown = num_starts = 0
    for text in [*texts, *TEXTS]:
        sides = []
        for tokenizer, own in ((lacking, pieces), tokenizers["byte_bpe"]):
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            sides.append(([own[t] for t in found["input_ids"]] + [None], found["offset_mapping"]))
        num_unknown += sides[0][0].count(UNKNOWN)
        (theirs, spans), (ours, own_spans) = sides if is_teacher else sides[::-1]
        matched = match_bytes(theirs, ours)
        starts = (matched.teacher_depth_I == 0) & (matched.student_depth_I == 0)
        both = zip(matched.teacher_I[starts], matched.student_I[starts], strict=True)
        for i, j in list(both)[:-1]:
            assert spans[i][0] == own_spans[j][0], (text, theirs, ours, i, j)
            num_starts += 1
    # Both start a token, of characters that both know, in 511 places (506 of the BPE kind).
    assert num_unknown > 100 and num_starts > 480


def test_runs_of_blanks_among_the_added_tokens(tokenizers, zoo):
    """As Gemma's have them: not special, and written with sentencepiece's mark."""
    tokenizer = load_tokenizer(zoo("llama", "spm_bpe"))
    tokenizer.add_tokens(["\u2581\u2581\u2581"])
    pieces = token_bytes(tokenizer, zoo("llama", "spm_bpe"))
    assert pieces[tokenizer.convert_tokens_to_ids("\u2581\u2581\u2581")] == b"   "


def test_what_cannot_be_spelt_is_refused(tmp_path):
    """Pieces of the BERT kind do not say where blanks were."""
    words = ["[UNK]", "3", "plus", "8", "is", "ele", "##ven", ",", "it", "'", "s", "2024"]
    model = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")
    with pytest.raises(UserError, match="cannot tell the bytes of its tokens") as error:
        token_bytes(tokenizer, tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
