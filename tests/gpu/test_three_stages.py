"""On a CUDA machine: the three stages in bf16 with NCCL beside fp32 on the CPU.

make test-gpu PYTHON=python3
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.models.chat import ChatEncoder
from tests.fixtures import ROOT, environment, write_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
KINDS = ("align", "distill", "sft")


def launch(recipe: Path, *overrides: str, **env: str) -> str:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "1"]
    command = [*launcher, "launch/train.py", str(recipe), *overrides]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def records(run: Path, kind: str) -> list[dict]:
    return [json.loads(line) for line in (run / kind / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pair, shards):
    """The same recipe twice: fp32 on the CPU, bf16 on the device with a checkpoint at step 3."""
    folder = tmp_path_factory.mktemp("gpu")
    recipe = write_recipe(
        folder / "recipe.yaml",
        run_dir=str(folder / "cpu"), precision="fp32",
        teacher={"path": str(pair / "teacher_init"), "max_length": 128},
        student={"path": str(pair / "student_init"), "max_length": 128},
        data={"train": str(shards / "train"), "validation": str(shards / "validation")},
        batch={"global_batch": 16, "micro_batch": 8},
        log={"validation_samples": 16},
        stages=[{"kind": kind, "steps": 5} for kind in KINDS],
    )  # fmt: skip
    launch(recipe, CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    device = [f"run_dir={folder / 'device'}", "precision=bf16", "checkpoint.every=3"]
    launch(recipe, *device)
    return folder, recipe


@pytest.mark.parametrize("kind", KINDS)
def test_losses_in_bf16_are_those_of_fp32_on_the_cpu(runs, kind):
    folder, _ = runs
    for cpu, device in zip(
        records(folder / "cpu", kind), records(folder / "device", kind), strict=True
    ):
        for name in ("loss", "ar", "student_ce"):
            if name in cpu["metrics"]:
                expected = cpu["metrics"][name]
                assert device["metrics"][name] == pytest.approx(expected, rel=1e-2), (name, cpu)


def test_peak_memory_is_the_devices(runs):
    folder, _ = runs
    peaks = [record["peak_memory_gib"] for record in records(folder / "device", "distill")]
    assert 0 < max(peaks) < 8
    print(f"peak device memory {max(peaks):.3f} GiB on {torch.cuda.get_device_name()}")


def test_resume_on_the_device(runs):
    folder, recipe = runs
    again = folder / "again"
    for kind in ("align", "distill"):
        shutil.copytree(folder / "device" / kind, again / kind)
    for part in ("DONE", "student", "recalibrator"):
        path = again / "distill" / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    output = launch(recipe, f"run_dir={again}", "precision=bf16", "checkpoint.every=3")
    assert "resumed at step 3" in output
    for first, second in zip(
        records(folder / "device", "distill"), records(again, "distill"), strict=True
    ):
        assert second["metrics"]["loss"] == pytest.approx(first["metrics"]["loss"], rel=2e-3)


def test_exported_student_answers_on_device_and_cpu_alike(runs, shards):
    folder, _ = runs
    exported = folder / "device/sft/student"
    sample = ShardReader(ShardIndex.load(shards / "validation")).read(0)
    prompt = ChatEncoder(exported, 500).prompt(sample.messages[:-1], sample.images)
    logits = []
    for device in ("cpu", "cuda"):
        model = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)
        with torch.no_grad():
            moved = {key: value.to(device) for key, value in prompt.items()}
            logits.append(model.to(device).eval()(**moved).logits.cpu())
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
