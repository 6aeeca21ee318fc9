"""LoRA, gradient checkpointing, replicas in full precision and in 8 bits, compiled blocks."""

import shutil
from importlib.util import find_spec

import pytest
import torch

from genrecal_ds.errors import UserError
from genrecal_ds.models import replica
from genrecal_ds.models.lora import add_adapters, merged
from genrecal_ds.models.replica import load_replica
from genrecal_ds.models.saving import write_student
from genrecal_ds.models.vlm import load_vlm
from genrecal_ds.recipe.config import LoraConfig
from tests.unit.models.test_vlm_every_family import encode
from tests.unit.models.test_vlm_every_pair import CPU, stage, train

pytestmark = pytest.mark.unit
SEEING_ROWS = ["qwen2_vl", "internvl", "llava"]


@pytest.mark.parametrize("row", SEEING_ROWS)
def test_adapters_alone_train_and_are_merged_into_a_plain_folder(zoo, row, tmp_path):
    trained = stage(zoo("qwen2_5_vl", "tiktoken"), zoo(row), trains_student=True)
    student = trained.objective.student
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    torch.manual_seed(0)
    config = LoraConfig(rank=4, alpha=16)
    add_adapters(student, config)
    student.train_only(("layers", "norm"))
    training = {name for name, p in student.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or "norm" in name for name in training)
    # B is zero at first, so A has no gradient before the first update.
    parameters = [p for p in trained.objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        trained.loss().backward()
        optimizer.step()
    for name, parameter in student.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    state = merged(dict(student.model.state_dict()), student.adapter_scale)
    assert state.keys() == load_vlm(zoo(row)).model.state_dict().keys()
    write_student(student.model, state, zoo(row), tmp_path / "out")
    again = load_vlm(tmp_path / "out").eval()
    changed = {n for n, p in again.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("layers." in name or "norm" in name for name in changed)
    inputs = trained.batch.student.inputs
    with torch.no_grad():
        expected = student.eval().body(*inputs)
        torch.testing.assert_close(again.body(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_targets_that_name_no_layer_are_refused(zoo):
    with pytest.raises(UserError, match="student.lora.targets: no linear layer"):
        add_adapters(load_vlm(zoo("internvl")), LoraConfig(targets=("query",)))


@pytest.mark.parametrize("row", SEEING_ROWS)
def test_checkpointed_blocks_have_the_same_gradients(zoo, row):
    gradients = []
    for checkpointing in (False, True):
        trained = stage(zoo("qwen2_5_vl", "tiktoken"), zoo(row), trains_student=True)
        if checkpointing:
            trained.objective.student.model.gradient_checkpointing_enable({"use_reentrant": False})
        trained.loss().backward()
        gradients.append({n: p.grad for n, p in trained.objective.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None)
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("row", [*SEEING_ROWS, "gemma2"])
def test_a_replica_is_the_teacher(zoo, row):
    _, batch = encode(zoo(row))
    expected = load_vlm(zoo(row)).eval().body(*batch.inputs)
    loaded = load_replica(zoo(row), torch.float32, CPU)
    assert torch.equal(loaded.body(*batch.inputs), expected)
    assert not any(p.requires_grad for p in loaded.parameters())


@torch.no_grad()
@pytest.mark.parametrize("row", [*SEEING_ROWS, "gemma2"])
def test_8_bits_are_near_the_teacher(zoo, row, monkeypatch):
    """Also where ZeRO-3 has put its own product in place of F.linear, in the whole process."""

    def zero3_linear(rows, weight, bias=None):
        product = rows.matmul(weight.t())
        return product if bias is None else product + bias

    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear)
    monkeypatch.setattr(replica, "linear", zero3_linear)
    if find_spec("torchao") is None:
        with pytest.raises(UserError, match="replica_int8 needs torchao: pip install torchao"):
            load_replica(zoo(row), torch.float32, CPU, int8=True)
        return
    _, batch = encode(zoo(row))
    expected = load_vlm(zoo(row)).eval().body(*batch.inputs)
    quantised = load_replica(zoo(row), torch.float32, CPU, int8=True)
    error = (quantised.body(*batch.inputs) - expected).norm() / expected.norm()
    assert 0 < error < 0.05


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_same_rows(zoo):
    _, batch = encode(zoo("llama"))
    expected = load_vlm(zoo("llama")).eval().body(*batch.inputs)
    compiled = load_replica(zoo("llama"), torch.float32, CPU)
    compiled.compile_blocks()
    torch.testing.assert_close(compiled.body(*batch.inputs), expected, rtol=1e-5, atol=1e-5)


def test_both_roles_pack(zoo):
    """The losses of a packed pair are those of a padded one."""
    teacher, student = zoo("qwen2_vl", "tiktoken"), zoo("internvl", "spm_bpe")
    padded = train(stage(teacher, student, True))
    packed = train(stage(teacher, student, True, pack=True))
    assert packed == pytest.approx(padded, rel=1e-5)
