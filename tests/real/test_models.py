"""SmolLM2-135M-Instruct and Gemma 3 270M in our body and head: logits, and packed samples."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from genrecal_ds.data.batch import collate
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.models.vlm import load_vlm
from tests.real.chats import MODELS, TURNS, conversations, encoder

pytestmark = pytest.mark.real


def student_batch(folder: Path, messages):
    encoders = PairEncoders(encoder(folder))
    pairs = [pair for chat in messages for pair in encoders.encode(chat, [])]
    return pairs, collate(pairs, encoders.placeholder(), encoders.vision_rules, False).student


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_our_logits_are_those_of_transformers(released, name):
    folder = released(name)
    pairs, batch = student_batch(folder, conversations(*TURNS))
    for dtype in (torch.bfloat16, torch.float32):
        vlm = load_vlm(folder, dtype).eval()
        vlm.check(batch.inputs.input_ids[:1, :32])
    # Not plain_model(..).float(): bf16 has rounded the factor of Gemma's embeddings by then.
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row, pair in enumerate(pairs):
        view = pair.student
        logits = expected(input_ids=view.input_ids_T[None]).logits[0]
        own = vlm.head.logits(vlm.body(*batch.inputs)[row, : len(logits)])
        assert (own - logits).abs().max() < 1e-4 * logits.abs().max()
        # A model that has learned something: below a third of a uniform guess's bits.
        start, end = view.answers[0]
        ce = torch.nn.functional.cross_entropy(logits[start - 1 : end - 1],
                                               view.input_ids_T[start:end])  # fmt: skip
        assert ce < math.log(logits.shape[1]) / 3, (row, float(ce))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_samples_do_not_see_each_other(released, name):
    """With one longer than Gemma's window of 512 tokens."""
    folder = released(name)
    long = " ".join(f"{number} is {number * number}." for number in range(85))
    _, batch = student_batch(folder, conversations(TURNS[0], (long, "yes")))
    assert batch.inputs.input_ids.shape[1] > 540
    real = batch.inputs.real_P
    padded = load_vlm(folder).eval().body(*batch.inputs).flatten(0, 1)[real]
    packed = load_vlm(folder, pack=True).eval().body(*batch.inputs).flatten(0, 1)[real]
    assert (packed - padded).abs().max() <= 1e-4 * padded.abs().max()
