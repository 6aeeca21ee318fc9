"""What changes in each stage, resume, and the ways to launch: real runs of launch/train.py."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from genrecal_ds.models.config_file import read_config
from genrecal_ds.models.families import FAMILIES
from genrecal_ds.models.vlm import component_of
from tests.fixtures import ROOT, environment, recipe_tree, run_ranks, write_recipe
from tests.unit.models.test_loading_ties import another, with_head

pytestmark = pytest.mark.dist

LANGUAGE = "model.language_model."
TRAINS = {
    "align": set(),
    "distill": {"layers", "norm"},
    "sft": {"projector", "embeddings", "layers", "norm", "head"},
    "pretrain": {"vision", "projector", "embeddings", "layers", "norm", "head"},
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """By transformers' own loader: names in the files are those of older releases."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").state_dict()


def test_an_ended_stage_leaves_no_engine(tmp_path, pair, shards):
    """Else each stage would hold the weights and optimizer states of all stages before it."""
    stages = [{"kind": "distill", "steps": 1}, {"kind": "sft", "steps": 1}]
    tree = recipe_tree(tmp_path, pair, shards, stages=stages)
    script = ROOT / "tests/dist/ranks_ended_stages.py"
    said = run_ranks(script, [write_recipe(tmp_path / "r.yaml", **tree)])
    assert "behind distill: 0 engines" in said and "behind sft: 0 engines" in said, said


@pytest.mark.parametrize("student", ["student_init", "student_untied", "student_own_head"])
def test_exactly_the_papers_parameters_change(tmp_path, pair, shards, student):
    """After 3 steps of each stage; every one starts from the same folder.

    The last student's config says tied, and its files have a head that differs.
    """
    if student == "student_own_head" and not (pair / student).exists():
        with_head(pair / "student_init", pair / student, another)
    stages = [{"kind": kind, "steps": 3, "student": str(pair / student)} for kind in TRAINS]
    tree = recipe_tree(tmp_path, pair, shards, student, stages=stages)
    run_ranks(ROOT / "launch/train.py", [write_recipe(tmp_path / "r.yaml", **tree)])
    before = weights(pair / student)
    is_tied = torch.equal(before["lm_head.weight"], before[f"{LANGUAGE}embed_tokens.weight"])
    assert is_tied == (student == "student_init")
    for kind, trains in TRAINS.items():
        assert read_config(tmp_path / "run" / kind / "student").tie_word_embeddings == is_tied
        after = weights(tmp_path / "run" / kind / "student")
        assert after.keys() == before.keys()
        changed, same = set(), set()
        for name, value in after.items():
            component = component_of(name, FAMILIES["internvl"].components)
            (same if torch.equal(value, before[name]) else changed).add((component, name))
        assert {component for component, _ in changed} == trains & {c for c, _ in changed | same}
        stuck = {name for component, name in same if component in trains}
        # Attention is blind to what a key bias adds to all scores alike: its gradient is zero.
        assert all(name.endswith("k_proj.bias") for name in stuck), stuck
    assert not (tmp_path / "run/sft/recalibrator").exists()
    first = load_file(tmp_path / "run/align/recalibrator/recalibrator.safetensors")
    second = load_file(tmp_path / "run/distill/recalibrator/recalibrator.safetensors")
    for name in first:  # distill goes on from align's
        assert not torch.equal(first[name], second[name]) or name.endswith("k_proj.bias"), name


def test_resumed_run_equals_uninterrupted_bitwise(tmp_path, pair, shards):
    stages = [{"kind": "distill", "steps": 6}]
    tree = recipe_tree(tmp_path, pair, shards, stages=stages, checkpoint={"every": 3})
    recipe = write_recipe(tmp_path / "whole.yaml", **tree)
    run_ranks(ROOT / "launch/train.py", [recipe])
    whole = tmp_path / "run/distill"

    other = tmp_path / "other/distill"
    shutil.copytree(whole / "checkpoints", other / "checkpoints")
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    (other / "metrics.jsonl").write_text("\n".join(lines[:5]) + "\n")  # it died after step 5
    output = run_ranks(ROOT / "launch/train.py", [recipe, f"run_dir={tmp_path}/other"])
    assert "resumed at step 3" in output
    for part in ("student/model.safetensors", "recalibrator/recalibrator.safetensors"):
        assert (other / part).read_bytes() == (whole / part).read_bytes(), part
    records = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in lines]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["metrics"]["loss"] for r in records] == [r["metrics"]["loss"] for r in expected]

    damaged = tmp_path / "damaged/distill"
    shutil.copytree(whole / "checkpoints", damaged / "checkpoints")
    victim = next((damaged / "checkpoints/step-00000003").glob("*rank_1*optim_states.pt"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(AssertionError, match="is damaged"):
        run_ranks(ROOT / "launch/train.py", [recipe, f"run_dir={tmp_path}/damaged"])

    export = [sys.executable, "-m", "genrecal_ds.export"]
    middle = whole / "checkpoints/step-00000003"
    subprocess.run([*export, middle, tmp_path / "middle"], check=True, env=environment(), cwd=ROOT)
    early, late = weights(tmp_path / "middle"), weights(whole / "student")
    assert early.keys() == late.keys()
    assert not torch.equal(early["model.language_model.norm.weight"],
                           late["model.language_model.norm.weight"])  # fmt: skip
    repeated = subprocess.run(
        [*export, middle, tmp_path / "middle"], env=environment(), cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert repeated.returncode == 2 and "exists already" in repeated.stderr


def without_compiler(folder: Path) -> dict[str, str]:
    """A PATH with this interpreter's commands, a shell, and no compiler."""
    commands = folder / "commands"
    commands.mkdir()
    for name in ("sh", "bash", "env", "hostname", "uname", "cat", "which"):
        if found := shutil.which(name):
            (commands / name).symlink_to(found)
    path = os.pathsep.join([str(Path(sys.executable).parent), str(commands)])
    assert shutil.which("g++", path=path) is None and shutil.which("c++", path=path) is None
    return {"PATH": path, "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}


def test_bf16_offload_and_monitor_need_no_compiler(tmp_path, pair, shards):
    configs = {"student": "student_zero3_offload", "teacher": "teacher_zero3_offload"}
    tree = recipe_tree(
        tmp_path, pair, shards, precision="bf16", deepspeed=configs,
        log={"tensorboard": True, "probes_every": 1}, profile="1:2",
        stages=[{"kind": "distill", "steps": 2}],
    )  # fmt: skip
    recipe = write_recipe(tmp_path / "r.yaml", **tree)
    run_ranks(ROOT / "launch/train.py", [recipe], **without_compiler(tmp_path))
    run = tmp_path / "run/distill"
    assert all(value.dtype == torch.bfloat16 for value in weights(run / "student").values())
    assert list(run.rglob("events.out.tfevents*"))
    assert list((run / "profile").glob("rank*.json.gz"))
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"loss", "ar_boundary", "kl_other", "gradient/ar_boundary"} <= record["metrics"].keys()
    assert {"teacher", "student", "recalibrator", "head", "optimizer"} <= record["phases"].keys()


@pytest.mark.parametrize(
    "command",
    [
        ["deepspeed", "--num_accelerators", "2", "launch/train.py", "RECIPE"],
        ["deepspeed", "launch/train.py", "RECIPE", "--hostfile", "HOSTFILE"],
        ["torchrun", "--nproc_per_node", "2", "launch/train.py", "RECIPE"],
    ],
)
def test_every_form_of_launch_starts_two_ranks(tmp_path, pair, shards, command):
    tree = recipe_tree(tmp_path, pair, shards, stages=[{"kind": "sft", "steps": 2}])
    names = {
        "RECIPE": str(write_recipe(tmp_path / "r.yaml", **tree)),
        "HOSTFILE": str(tmp_path / "hosts"),
    }
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    program = Path(sys.executable).parent / command[0]
    launched = subprocess.run(
        [str(program), *(names.get(word, word) for word in command[1:])],
        env=environment(DS_ACCELERATOR="cpu", PYTHONWARNINGS=""), cwd=ROOT, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    output = launched.stdout + launched.stderr
    assert launched.returncode == 0, output[-6000:]
    said = Counter(line for line in output.splitlines() if "Warning: " in line)
    assert all(times <= 2 for times in said.values()), said  # once a rank
    path = tmp_path / "run/sft/DONE"
    assert json.loads(path.read_text())["steps"] == 2
    record = json.loads((tmp_path / "run/sft/metrics.jsonl").read_text().splitlines()[0])
    assert record["world_size"] == 2
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["seed"] == 0


def test_runs_without_a_launcher_do_not_meet_on_one_port(tmp_path, pair, shards):
    """Where torch's and DeepSpeed's usual one is taken, as by another such run."""
    tree = recipe_tree(tmp_path, pair, shards, stages=[{"kind": "sft", "steps": 1}])
    recipe = write_recipe(tmp_path / "r.yaml", **tree)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # taken is what it shall be
            other.bind(("", 29500))
            other.listen()
        own = environment()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            own.pop(name, None)
        done = subprocess.run(
            [sys.executable, "launch/train.py", str(recipe)], env=own, cwd=ROOT,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_adapters_resume_bitwise_and_leave_a_plain_student(tmp_path, pair, shards):
    """With what else saves memory: packed bodies, checkpointed blocks, a replicated teacher."""
    tree = recipe_tree(
        tmp_path, pair, shards, stages=[{"kind": "distill", "steps": 4}], checkpoint={"every": 2}
    )
    tree["teacher"] |= {"pack": True, "placement": "replica"}
    tree["student"] |= {
        "pack": True, "gradient_checkpointing": True, "lora": {"rank": 4, "alpha": 8},
    }  # fmt: skip
    recipe = write_recipe(tmp_path / "r.yaml", **tree)
    run_ranks(ROOT / "launch/train.py", [recipe])
    whole = tmp_path / "run/distill"
    before, after = weights(pair / "student_init"), weights(whole / "student")
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    prefix = "model.language_model."
    assert all(name.startswith((f"{prefix}layers.", f"{prefix}norm.")) for name in changed)
    assert any("q_proj.weight" in name for name in changed)
    assert not any("layernorm" in name or name.endswith("bias") for name in changed)

    facts = json.loads((whole / "start.json").read_text())
    assert facts["pixels"] == {"teacher": "pil", "student": "pil"}
    assert len(facts["host_memory_gib"]) == 2 and all(0 < g < 10 for g in facts["host_memory_gib"])

    shutil.copytree(whole / "checkpoints", tmp_path / "other/distill/checkpoints")
    run_ranks(ROOT / "launch/train.py", [recipe, f"run_dir={tmp_path}/other"])
    again = tmp_path / "other/distill/student/model.safetensors"
    assert again.read_bytes() == (whole / "student/model.safetensors").read_bytes()
    export = [sys.executable, "-m", "genrecal_ds.export", whole / "checkpoints/step-00000002"]
    subprocess.run([*export, tmp_path / "middle"], check=True, env=environment(), cwd=ROOT)
    middle = weights(tmp_path / "middle")
    assert middle.keys() == before.keys()
    name = next(name for name in changed if "q_proj.weight" in name)
    assert not torch.equal(middle[name], before[name])
    assert not torch.equal(middle[name], after[name])


def test_secrets_are_in_no_file_of_a_run(tmp_path, pair, shards):
    """In the recipe, the environment and an error; grep over the whole run folder and output."""
    token, password = "hf_" + "Zz9" * 10, "hunter2secret"
    marker = tmp_path / "marker"
    tree = recipe_tree(
        tmp_path, pair, shards, stages=[{"kind": "sft", "steps": 2}], checkpoint={"every": 1}
    )
    # A folder whose name holds what a shell, or a reader of a log, must not take for their own.
    hostile = tmp_path / f"run $(touch {marker.name}) {token}"
    tree["data"]["remote"] = ["s3"]
    tree["data"]["cache"] = {"dir": f"{tmp_path}/s3://bob:{password}@store"}
    tree["log"]["wandb"] = None
    recipe = write_recipe(tmp_path / "r.yaml", **tree)
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    done = subprocess.run(
        [sys.executable, "-m", "launch", recipe, "--hostfile", hosts, f"run_dir={hostile}"],
        env=environment(DS_ACCELERATOR="cpu", HF_TOKEN=token, WANDB_API_KEY=password),
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    files = [path for path in hostile.rglob("*") if path.is_file()]
    assert len(files) > 15 and (hostile / "DONE").is_file()
    for secret in (token, password):
        found = [path.name for path in files if secret.encode() in path.read_bytes()]
        assert found == [], (secret, found)
        assert secret not in done.stdout
    assert not marker.exists() and not (ROOT / marker.name).exists()
