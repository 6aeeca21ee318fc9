"""A released pair through the launcher, as a user starts it: shards, two stages, an export."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.builder import build
from data_tools.sources import llava
from genrecal_ds.data.reader import Sample
from genrecal_ds.evaluate.generate import Generator
from launch.real.functions import conversation
from tests.fixtures import ROOT, environment, records, write_recipe

pytestmark = pytest.mark.real
ROLES = ("user", "assistant")
FUNCTIONS = {
    'def is_even(n):\n    """Tell whether n is even."""': "return n % 2 == 0",
    'def last(items):\n    """Return the last item."""': "return items[-1]",
    'def clamp(x, a, b):\n    """Keep x within a and b."""': "return max(a, min(x, b))",
    'def words(text):\n    """Count words."""': "return len(text.split())",
}


def test_a_real_pair_through_the_launcher(released, tmp_path):
    lines = [
        json.dumps(conversation(number, *pair)) for number, pair in enumerate(FUNCTIONS.items())
    ]
    (tmp_path / "functions.jsonl").write_text("\n".join(lines))
    build(llava.open_source(str(tmp_path / "functions.jsonl")), tmp_path / "data", arguments={})
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        run_dir=str(tmp_path / "run"), precision="bf16",
        teacher={"path": str(released("gemma3_270m")), "max_length": 256},
        student={"path": str(released("smollm2_135m")), "max_length": 256},
        data={"train": str(tmp_path / "data")},
        batch={"global_batch": 2, "micro_batch": 2},
        stages=[{"kind": "align", "steps": 2}, {"kind": "byte_kd", "steps": 2}],
    )  # fmt: skip
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    done = subprocess.run(
        [deepspeed, "--num_accelerators", "1", "launch/train.py", str(recipe)],
        env=environment(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="2"), cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (tmp_path / "run/DONE").is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    for stage, term in (("align", "regular_kl"), ("byte_kd", "kd")):
        steps = records(tmp_path / "run" / stage)
        assert len(steps) == 2 and all(0 < step["metrics"][term] < 1e4 for step in steps)
        print(f"\n{stage}: {max(step['peak_memory_gib'] for step in steps):.2f} GiB")
    parts = [{"type": "text", "text": next(iter(FUNCTIONS))}]
    asked = [Sample("0", [], [{"role": role, "content": parts} for role in ROLES], "", [], "")]
    for folder in (tmp_path / "run/align/student", tmp_path / "run/byte_kd/student"):
        (answers,) = Generator(folder, max_new_tokens=8).answers(asked, 1)
        assert answers[0]
