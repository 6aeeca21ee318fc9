"""What stands in the place of the teacher's answer rows; the paper's rows where nothing is set."""

import pytest
import torch

from genrecal_ds.models.vlm import TeacherBody, load_vlm
from genrecal_ds.objectives.answer_inputs import AnswerInputs
from genrecal_ds.recipe.stage_config import AnswersConfig
from tests.unit.objectives.test_genrecal import Setting

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def setting(pair, shards):
    return Setting(pair, shards)


@pytest.fixture(scope="module")
def batch(setting):
    return setting.batch(with_regular=True).teacher


def rows_like(batch):
    torch.manual_seed(0)
    return torch.randn(len(batch.rows_A), 128)


def test_the_paper_reads_the_same_tensor(batch):
    rows = rows_like(batch)
    assert AnswerInputs()(rows, batch, is_training=True) is rows
    changed = AnswerInputs(AnswersConfig(masked=0.5, noise=1.0))
    assert changed(rows, batch, is_training=False) is rows


def test_embeddings_are_those_of_the_answer_tokens(setting, batch):
    table = load_vlm(setting.teacher_folder).model.get_input_embeddings().weight.detach()
    rows, num = rows_like(batch), len(batch.labels_N)
    found = AnswerInputs(AnswersConfig(embeddings=1.0), table)(rows, batch, is_training=False)
    tokens = batch.inputs.input_ids.flatten()[batch.rows_A[:num]]
    assert torch.equal(found[:num], table[tokens])
    assert torch.equal(found[num:], rows[num:])  # question rows of the regular pass
    half = AnswerInputs(AnswersConfig(embeddings=0.5), table)(rows, batch, is_training=True)
    is_other = (half[:num] != rows[:num]).any(-1)
    sequence = batch.packing.sequence_P[batch.packing.loss_rows[:num]]
    for conversation in sequence.unique():  # each as a whole
        assert len(is_other[sequence == conversation].unique()) == 1
    assert len(is_other.unique()) == 2


def test_masks_take_their_share_in_spans_and_noise_its_size(batch):
    inputs = AnswerInputs(AnswersConfig(masked=0.4))
    torch.manual_seed(1)
    masked = inputs._masked(40_000, torch.device("cpu"))
    assert masked.float().mean() == pytest.approx(0.4, abs=0.02)
    runs = torch.diff(torch.cat([torch.zeros(1), masked.float(), torch.zeros(1)])).abs().sum() / 2
    assert masked.sum() / runs > 3
    rows, num = rows_like(batch), len(batch.labels_N)
    found = inputs(rows, batch, is_training=True)[:num]
    zeroed = (found == 0).all(-1)
    assert 0 < zeroed.sum() < num and torch.equal(found[~zeroed], rows[:num][~zeroed])
    noisy = AnswerInputs(AnswersConfig(noise=0.5))(rows, batch, is_training=True)[:num]
    assert (noisy - rows[:num]).std() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("pack", [False, True])
def test_rows_of_a_layer_are_those_of_transformers(setting, pack):
    vlm = load_vlm(setting.teacher_folder, pack=pack)
    batch = setting.batch().teacher
    rows, targets = TeacherBody(vlm, 2)(batch.inputs, batch.rows_A, batch.targets_N)
    _, own_targets = setting.teacher(batch.inputs, batch.rows_A, batch.targets_N)
    torch.testing.assert_close(targets, own_targets, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        states = load_vlm(setting.teacher_folder).model.base_model(
            input_ids=batch.inputs.input_ids, attention_mask=batch.inputs.attention_mask,
            **batch.inputs.vision, output_hidden_states=True, use_cache=False,
        ).hidden_states  # fmt: skip
    expected = states[2].flatten(0, 1)[batch.rows_A]
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match="teacher.answer_layer: 9, and it has 3 layers"):
        TeacherBody(vlm, 9)
