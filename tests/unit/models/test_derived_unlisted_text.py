"""Text-only classes without an entry in models/families.py: proved at load, or refused."""

import pytest
import torch

from genrecal_ds.errors import UserError
from genrecal_ds.estimate.sizes import model_of
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.derived import adds_one, blocks_in
from genrecal_ds.models.families import FAMILIES
from genrecal_ds.models.recalibrator import OWN_BLOCKS, Recalibrator
from genrecal_ds.models.saving import write_student
from genrecal_ds.models.vlm import load_vlm, skeleton
from tests.unit.models.test_vlm_every_family import chat
from tests.unit.models.test_vlm_every_pair import stage
from tests.zoo import any_text

pytestmark = pytest.mark.unit
# Experts, learned positions, norms with biases, tied heads, scaled logits, attention sinks.
CLASSES = ("cohere2", "ernie4_5", "exaone4", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite",
           "mixtral", "olmo2", "qwen3_moe", "smollm3")  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folders = {}

    def folder(model_type):
        assert model_type not in FAMILIES
        if model_type not in folders:
            folders[model_type] = any_text.write(model_type, tmp_path_factory.mktemp("t") / "m")
        return folders[model_type]

    return folder


def check(folder):
    """Load as a run does, and prove that our head on our body gives the class's own logits."""
    vlm = load_vlm(folder, pack=None).eval()
    view = ChatEncoder(folder, 500).encode(chat((0, "what is 1 plus 2 ?", "it is 3")), [])
    vlm.check(view.input_ids_T[None])
    return vlm


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_class_without_an_entry_loads_and_every_parameter_has_its_component(written, model_type):
    vlm = check(written(model_type))
    assert not vlm.pack
    by_component = {component: name for name, _, component in vlm.components()}
    assert {"embeddings", "layers", "norm"} <= by_component.keys()
    assert by_component.keys() <= {"embeddings", "layers", "norm", "head"}
    assert vlm.is_tied or "head" in by_component
    decoder = vlm.model.get_decoder()
    parts = {id(p): "embeddings" for p in vlm.model.get_input_embeddings().parameters()}
    parts |= {id(p): "head" for p in vlm.head.parameters() if id(p) not in parts}
    for layers in (getattr(decoder, name, ()) for name in ("layers", "h")):
        parts |= {id(p): "layers" for layer in layers for p in layer.parameters()}
    for _, parameter, component in vlm.components():
        assert parts.get(id(parameter), component) == component


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("model_type", CLASSES)
def test_it_learns_in_both_stages(zoo, written, model_type, role):
    folder, other = written(model_type), zoo("llama", "spm_bpe")
    teacher, student = (folder, other) if role == "teacher" else (other, folder)
    for trains_student in (False, True):
        trained = stage(teacher, student, trains_student)
        parameters = {n: p for n, p in trained.objective.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = trained.loss()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        assert losses[0] > losses[2] and torch.isfinite(torch.tensor(losses)).all(), losses
        # Experts that no token chose have zeros, but all have a gradient.
        assert all(parameter.grad is not None for parameter in parameters.values())
        assert sum(bool(p.grad.abs().max() > 0) for p in parameters.values()) > len(parameters) / 2


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_moe", "gpt2"])
def test_a_student_of_it_is_a_plain_folder_again(written, model_type, tmp_path):
    vlm = check(written(model_type))
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.add_(0.01)
    write_student(vlm.model, dict(vlm.model.state_dict()), written(model_type), tmp_path / "out")
    again = check(tmp_path / "out")
    ids = torch.arange(9)[None]
    mask = torch.ones_like(ids)
    torch.testing.assert_close(again.body(ids, mask, {}), vlm.body(ids, mask, {}), rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "mamba", "mpt", "gpt_oss"])
def test_sizes_and_blocks_are_found_whatever_they_are_called(written, model_type):
    vlm = skeleton(written(model_type))
    assert len(blocks_in(vlm.model.get_decoder())) == any_text.LAYERS
    decoder = model_of(vlm, 0).decoder
    assert (decoder.layers, decoder.hidden) == (any_text.LAYERS, any_text.WIDTH)
    assert decoder.intermediate in (64, 128) and decoder.heads in (1, any_text.HEADS)
    with torch.device("meta"):
        blocks = Recalibrator(vlm.text_config, 24).blocks
    assert len(blocks.layers) == 2 and blocks.config.hidden_size == any_text.WIDTH


def test_a_class_whose_body_cannot_be_run_alone_is_refused(written):
    with pytest.raises(UserError, match="Llama4ForCausalLM: transformers runs its body with its"):
        check(written("llama4_text"))


def test_a_class_whose_logits_we_cannot_make_is_refused_by_the_proof_that_fails(written):
    with pytest.raises(UserError, match=r"BertLMHeadModel: head\(body\(x\)\) differs"):
        check(written("bert"))


@pytest.mark.parametrize(("row", "adds"), [("gemma2", True), ("llama", False), ("qwen3", False)])
def test_what_a_norm_multiplies_by_is_seen(zoo, row, adds):
    vlm = load_vlm(zoo(row))
    norm = vlm.model.get_decoder().norm
    assert adds_one(norm, len(norm.weight)) == adds


def test_blocks_of_a_listed_text_model_are_its_own():
    assert {"llama", "qwen2", "gemma3_text", "phi3"} <= set(OWN_BLOCKS)
    assert not set(CLASSES) & set(OWN_BLOCKS)
