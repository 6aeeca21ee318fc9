"""Every row of the zoo: our body and head against the family's own, packed against padded,
pictures that are really seen, and every parameter in a component."""

import pytest
import torch
from PIL import Image

from genrecal_ds.data.batch import collate, join_teacher
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.config_file import read_config
from genrecal_ds.models.families import family_of
from genrecal_ds.models.vlm import TeacherBody, load_vlm, plain_model
from tests.zoo import ROWS

pytestmark = pytest.mark.unit
GREEN, RED = (9, 200, 99), (250, 9, 9)


def reads_images(folder):
    return bool(family_of(read_config(folder).model_type).vision_inputs)


def chat(*turns, system=None):
    """turns: (number of pictures, question, answer)."""
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for pictures, question, answer in turns:
        parts = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def samples(sees: bool, color=GREEN, turns: int = 2):
    """Wide, square, two pictures in one turn, two turns, no picture."""
    wide, square = Image.new("RGB", (64, 32), color), Image.new("RGB", (32, 32), RED)
    if not sees:
        two = [(0, "x ?", "it is 7"), (0, "why ?", "3 plus 4 is 7")]
        return [(chat((0, "what is 3 plus 4 ?", "7")), []), (chat(*two[:turns]), [])]
    return [
        (chat((1, "what digit is this ?", "7")), [wide]),
        (chat((2, "where ?", "at the left"), system="be short"), [square, wide]),
        (chat(*[(1, "x ?", "it is 7"), (0, "why ?", "3 plus 4 is 7")][:turns]), [square]),
        (chat((0, "what is 3 plus 4 ?", "7")), []),
    ]


def most_turns(*folders):
    """1 where one of the families reads a single question."""
    one = any(family_of(read_config(folder).model_type).prefix_lm for folder in folders)
    return 1 if one else 2


def encode(folder, color=GREEN):
    encoders = PairEncoders(ChatEncoder(folder, 2000))
    asked = samples(reads_images(folder), color, most_turns(folder))
    pairs = [pair for sample in asked for pair in encoders.encode(*sample)]
    return pairs, collate(pairs, encoders.placeholder(), encoders.vision_rules, False).student


def own_answer_logits(folder, pairs):
    """The family's own class, one sample at a time: what every other way is held to."""
    model = plain_model(folder).eval()
    expected = []
    for pair in pairs:
        view = pair.student
        per_token = {key: value[None] for key, value in view.per_token.items()}
        ids = view.input_ids_T[None]
        out = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), **view.vision, **per_token
        ).logits[0]
        expected += [out[start - 1 : end - 1] for start, end in view.answers]
    return torch.cat(expected)


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_a_batch_equals_single_samples_of_the_family(zoo, row):
    folder = zoo(row)
    pairs, batch = encode(folder)
    vlm = load_vlm(folder).eval()
    rows = vlm.body(*batch.inputs).flatten(0, 1)[batch.rows_M]
    scale, softcap = vlm.head.transform
    logits = vlm.head(rows) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(logits, own_answer_logits(folder, pairs), rtol=1e-4, atol=2e-5)
    vlm.check(batch.inputs.input_ids[:1, :8])


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_packed_samples_do_not_see_each_other(zoo, row):
    folder = zoo(row)
    if not family_of(read_config(folder).model_type).packs:
        pytest.skip("the family does not pack")
    _, batch = encode(folder)
    padded, packed = load_vlm(folder).eval(), load_vlm(folder, pack=True).eval()
    real = batch.inputs.real_P
    expected = padded.body(*batch.inputs).flatten(0, 1)[real]
    found = packed.body(*batch.inputs).flatten(0, 1)[real]
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_the_answer_rows_see_the_picture(zoo, row):
    folder = zoo(row)
    if not reads_images(folder):
        pytest.skip("reads text only")
    vlm = load_vlm(folder).eval()
    first, second = (
        vlm.body(*batch.inputs).flatten(0, 1)[batch.rows_M]
        for _, batch in (encode(folder, GREEN), encode(folder, (1, 2, 3)))
    )
    (pairs, batch) = encode(folder)
    answers = [end - start for pair in pairs for start, end in pair.student.answers]
    change = [part.abs().max().item() for part in (first - second).split(answers)]
    assert change[0] > 1e-3 and change[1] > 1e-3  # the first two samples show it
    assert max(change[2:]) < 1e-5  # the others do not


@pytest.mark.parametrize("row", ROWS)
def test_every_parameter_has_a_component(zoo, row):
    vlm = load_vlm(zoo(row))
    found = {component for _, _, component in vlm.components()}
    assert found >= {"embeddings", "layers", "norm"}
    assert ({"vision", "projector"} <= found) == reads_images(zoo(row))
    assert ("head" in found) != vlm.is_tied


@pytest.mark.parametrize("row", list(ROWS))
@torch.no_grad()
def test_one_forward_over_micro_batches_gives_each_its_own_rows(row, zoo):
    """What teacher.forward_batches does: with other lengths, several pictures, and none."""
    folder = zoo(row)
    encoders = PairEncoders(ChatEncoder(zoo("internvl"), 2000), ChatEncoder(folder, 2000))
    asked = samples(reads_images(folder), turns=most_turns(folder))
    pairs = [pair for sample in asked for pair in encoders.encode(*sample)]
    batches = [
        collate(group, encoders.placeholder(), encoders.vision_rules, True)
        for group in (pairs[:1], pairs[-1:], pairs[1:-1] or pairs)
    ]
    body = TeacherBody(load_vlm(folder)).eval()
    joined = join_teacher(batches, encoders.teacher.vision_rules)
    rows, targets = body(*joined[:3])
    rows = rows.split([size for size, _ in joined.sizes])
    targets = targets.split([size for _, size in joined.sizes])
    for batch, own_rows, own_targets in zip(batches, rows, targets, strict=True):
        view = batch.teacher
        expected = body(view.inputs, view.rows_A, view.targets_N)
        torch.testing.assert_close(own_rows, expected[0], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(own_targets, expected[1], rtol=1e-4, atol=2e-5)
