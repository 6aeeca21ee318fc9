"""What several test files need: the tiny pair, digit shards, and a way to run ranks."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import yaml

from tests.forked_ranks import Rank, RankServers

ROOT = Path(__file__).resolve().parent.parent


def build_digit_shards(folder: Path, split: str, num_samples: int, seed: int = 0) -> Path:
    from data_tools.builder import build
    from data_tools.sources import digits

    arguments = {"split": split, "num_samples": num_samples, "seed": seed}
    build(digits.Digits(split, num_samples, seed), folder, arguments=arguments)
    return folder


@cache
def texts_of_digits(num_samples: int = 500) -> list[str]:
    from data_tools.sources import digits

    return [
        part["text"]
        for sample in digits.Digits("train", num_samples, 0).rows(0, num_samples)
        for message in sample.messages
        for part in message["content"]
        if part["type"] == "text"
    ]


def untie(folder: Path, out: Path) -> Path:
    """A copy of a tied model with a head of its own, random."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    shutil.copytree(folder, out)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    torch.manual_seed(1)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(out)
    return out


def write_recipe(path: Path, **tree) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def partitioning_ds_configs(folder: Path, project: Path = ROOT) -> dict[str, str]:
    """The packaged ZeRO-3 files with no parameter small enough to be kept whole on every rank, and
    with several sub-groups, as large students have."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for side in ("student", "teacher"):
        config = json.loads((project / f"ds_configs/{side}_zero3.json").read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if side == "student":
            config["zero_optimization"]["sub_group_size"] = 20_000
        path = folder / f"{side}_zero3.json"
        path.write_text(json.dumps(config))
        paths[side] = str(path)
    return paths


def recipe_tree(folder, pair, shards, student="student_init", **tree):
    """A recipe for the tiny pair, without stages."""
    return dict(
        run_dir=str(folder / "run"), precision="fp32", deterministic=True,
        teacher={"path": str(pair / "teacher_init"), "max_length": 128},
        student={"path": str(pair / student), "max_length": 128},
        data={"train": str(shards / "train"), "validation": str(shards / "validation")},
        batch={"global_batch": 8, "micro_batch": 2},
        optimizer={"lr": 1e-3},
        log={"validation_samples": 8},
        deepspeed=partitioning_ds_configs(folder),
    ) | tree  # fmt: skip


def records(stage_folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of one of a stage's logs."""
    return [json.loads(line) for line in (stage_folder / name).read_text().splitlines()]


def environment(**extra: str) -> dict[str, str]:
    """Of a child process: this interpreter's commands first, one thread, no warnings."""
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    inherited = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    return {
        **inherited,
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        **extra,
    }


def run_ranks(
    script: Path | str,
    arguments: Sequence[str],
    world_size: int = 2,
    timeout: int = 240,
    is_fresh: bool = False,
    **env: str,
) -> str:
    """Run a script on world_size ranks and return rank 0's output.

    Ranks are forks of processes that have done the imports; those with an environment of their own
    are not, nor with `is_fresh`, for scripts that measure a process's memory, nor beside a GPU,
    which a fork cannot use.

    The timeout is the guard against hangs: a rank that waits in a collective for one that
    never comes fails the test instead of blocking the suite. All ranks are ended with it.
    """
    port = str(20000 + os.getpid() % 20000)
    environments = [
        environment(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **env,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    command = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{rank}.txt" for rank in range(world_size)]
        if env or is_fresh or torch.cuda.is_available():
            codes = _run_fresh(command, environments, files, timeout)
        else:
            ranks = [
                Rank(command[0], command[1:], own, str(file), timeout)
                for own, file in zip(environments, files, strict=True)
            ]
            codes = _rank_servers().run(ranks)
        outputs = [file.read_text(errors="replace") for file in files]
    for rank, code in enumerate(codes):
        assert code == 0, f"rank {rank}: exit {code}\n{outputs[rank]}"
    return outputs[0]


@cache
def _rank_servers() -> RankServers:
    servers = RankServers(environment(), str(ROOT))
    atexit.register(servers.stop)
    return servers


def _run_fresh(
    command: list[str], environments: list[dict[str, str]], files: list[Path], timeout: int
) -> list[int]:
    processes = []
    for own, file in zip(environments, files, strict=True):
        with open(file, "wb") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command], env=own, cwd=ROOT, stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # shown by the exit codes, with what the ranks said
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes]
