"""Two ranks, two accumulation steps: gradients of every stage equal plain torch."""

import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.convert_slow_tokenizer import bytes_to_unicode

from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.plan import PADDING
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.models.recalibrator import Recalibrator
from genrecal_ds.recipe.recipe_file import load_recipe
from genrecal_ds.training.inputs import open_inputs
from launch.demo.pair import build_teacher
from tests.dist.reference import Reference
from tests.dist.slots import steps_of
from tests.fixtures import ROOT, partitioning_ds_configs, run_ranks, texts_of_digits, write_recipe

pytestmark = pytest.mark.dist


# A case's name, where it is not a kind, is what its stage changes.
STAGES = {
    "logit_kd": {"losses": {"divergence": "reverse_kl"}},
    "mot": {"losses": {"kl": 0.15}},
    "byte_kd alone": {"kind": "byte_kd", "losses": {"student_ce": 0.0}},
}


def recipe_for(folder, pair, shards, student, kind, teacher_keys, student_keys, **tree):
    return write_recipe(
        folder / "recipe.yaml",
        run_dir=str(folder / "run"), precision="fp32",
        teacher={"path": str(pair / "teacher_init"), "max_length": 128, **teacher_keys},
        student={"path": str(pair / student), "max_length": 128, **student_keys},
        data={"train": str(shards / "train")},
        batch={"global_batch": 8, "micro_batch": 2},
        optimizer={"lr": 1e-3, "clip": 0.0},
        deepspeed=partitioning_ds_configs(folder),
        log={"probes_every": 1},  # the probe must leave no gradient behind
        stages=[{"kind": kind, "name": "tested", "steps": 2, **STAGES.get(kind, {})}],
        **tree,
    )  # fmt: skip


def pieces_of(tokenizer):
    """The bytes of every token, spelt by hand: byte-level, or sentencepiece's marks."""
    is_byte_level = "\u0120plus" in tokenizer.get_vocab()
    to_byte = {char: byte for byte, char in bytes_to_unicode().items()}
    pieces = [None] * len(tokenizer)
    for word, token in tokenizer.get_vocab().items():
        added = tokenizer.added_tokens_decoder.get(token)
        if token in tokenizer.all_special_ids or (added and added.special):
            continue
        if is_byte_level:
            pieces[token] = bytes(to_byte[char] for char in word)
        elif word.startswith("<0x"):
            pieces[token] = bytes.fromhex(word[3:5])
        else:
            pieces[token] = word.replace("\u2581", " ").encode()
    return pieces


def reference_gradients(recipe_path, result):
    """The second step's gradients from the weights the ranks had before it."""
    recipe = load_recipe(recipe_path)
    stage = recipe.stages[0]
    inputs = open_inputs(recipe)
    encoders = inputs.encoders[stage.facts.has_teacher]
    index = ShardIndex.load(recipe.data.train)
    reader = ShardReader(index)
    slots = [s for micro in steps_of(index)[1] for s in micro if s != PADDING]
    samples = [reader.read(slot) for slot in slots]
    pairs = [pair for s in samples for pair in encoders.encode(s.messages, s.images)]
    assert {len(sample.images) for sample in samples} == {0, 1}
    assert (
        len({len(p.teacher.input_ids_T if p.teacher else p.student.input_ids_T) for p in pairs}) > 3
    )
    assert any(len(pair.student.answers) == 2 for pair in pairs)

    load = AutoModelForImageTextToText.from_pretrained
    student = load(recipe.student.path, dtype=torch.float64).requires_grad_(False)
    teacher = load(recipe.teacher.path, dtype=torch.float64).requires_grad_(False)
    reference, parameters = reference_of(stage, teacher, student, encoders, result)
    reference.loss(pairs).backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


def reference_of(stage, teacher, student, encoders, result):
    """(the loss, what trains by its name), with the ranks' weights."""
    recalibrator = projection = None
    widths = [m.config.get_text_config().hidden_size for m in (student, teacher)]
    if stage.kind in ("align", "distill"):
        recalibrator = Recalibrator(student.config.get_text_config(), widths[1]).double()
    if stage.kind == "dskd":
        projection = torch.nn.Linear(*widths, bias=False, dtype=torch.float64)
    modules = {
        "student.model.": student, "recalibrator.": recalibrator, "projection.": projection
    }  # fmt: skip
    parameters = {}
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters() if module else ():
            with torch.no_grad():
                parameter.copy_(result["weights"][prefix + name])
            parameter.requires_grad_(prefix + name in result["gradients"])
            if parameter.requires_grad:
                parameters[prefix + name] = parameter
    pieces = None
    if stage.kind == "byte_kd":
        pieces = [pieces_of(e.tokenizer) for e in (encoders.teacher, encoders.student)]
    ce_weight = stage.losses.student_ce
    reference = Reference(teacher, student, recalibrator, stage.kind, projection, pieces, ce_weight)
    return reference, parameters


def check_gradients(recipe, result):
    expected = reference_gradients(recipe, result)
    assert expected.keys() == result["gradients"].keys() and expected
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in result["gradients"].items():
        truth = expected[name]
        # Relative to the tensor's norm; tensors that are zero but for rounding, to the largest.
        error = (gradient.double() - truth).norm() / max(truth.norm(), 1e-4 * scale)
        assert error < 1e-5, f"{name}: relative error {error:.2e}"


PACK = {"pack": True}
LEAN = {"pack": True, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    "kind, student, teacher_keys, student_keys",
    [("align", "student_init", {}, {}),
     ("align", "student_init", PACK, PACK),
     ("distill", "student_init", {}, {}),
     ("distill", "student_untied", {"placement": "replica"}, LEAN),
     ("sft", "student_init", {}, LEAN),
     ("sft", "student_untied", {}, {}),
     ("uld", "student_init", {}, LEAN),
     ("logit_kd", "twin", {}, {}),
     ("mot", "student_init", {}, LEAN),
     ("dskd", "student_untied", {}, {}),
     ("byte_kd", "student_init", {}, LEAN),
     ("byte_kd alone", "student_untied", {"placement": "replica"}, {})],
)  # fmt: skip
def test_gradients_equal_plain_torch(
    tmp_path, pair, shards, kind, student, teacher_keys, student_keys
):
    if student == "twin":  # a smaller model with the teacher's tokenizer
        pair_folder, pair = pair / "teacher_init", tmp_path
        shutil.copytree(pair_folder, tmp_path / "teacher_init")
        build_teacher(texts_of_digits(), pair / "twin", width=64, layers=2)
    recipe = recipe_for(tmp_path, pair, shards, student, kind, teacher_keys, student_keys)
    run_ranks(ROOT / "tests/dist/ranks_gradients.py", [recipe, "tested", tmp_path / "result.pt"])
    result = torch.load(tmp_path / "result.pt")
    check_gradients(recipe, result)
    assert {name.split(".")[0] for name in result["gradients"]} == {
        "align": {"recalibrator"}, "distill": {"student", "recalibrator"}, "sft": {"student"},
        "uld": {"student"}, "logit_kd": {"student"}, "mot": {"student"},
        "dskd": {"student", "projection"}, "byte_kd": {"student"},
    }[load_recipe(recipe).stages[0].kind]  # fmt: skip
    assert result["still_whole"] == [], "parameters stay gathered after the step"

    exported = tmp_path / "tested_export" / "student"
    model = AutoModelForImageTextToText.from_pretrained(exported)
    assert not any("recalibrator" in name for name in model.state_dict())
    logits = exported_logits(model, result["inputs"])
    # The export is asked with padding: packed rows sum in another order.
    tolerance = 1e-5 if student_keys.get("pack") else 1e-6
    torch.testing.assert_close(logits, result["logits"], rtol=0, atol=tolerance)


def exported_logits(model, inputs):
    """Of the same rows of the same batch as `logits` in ranks_gradients, by the export alone."""
    inputs = dict(inputs)
    rows = inputs.pop("rows")
    with torch.no_grad():
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        return model.lm_head(hidden.flatten(0, 1)[rows])
