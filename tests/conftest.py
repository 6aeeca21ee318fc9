"""Shared by all tests: one thread per process, so that results do not depend on the machine."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides at its own import whether kernels are interpreted: before anyone else's.
    os.environ["TRITON_INTERPRET"] = "1"

from tests.fixtures import build_digit_shards, texts_of_digits, untie

torch.set_num_threads(1)
pytest_plugins = ["tests.zoo.table"]


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Path:
    """Folder with teacher_init (Qwen2-VL), student_init (InternVL, tied) and student_untied."""
    from launch.demo.pair import build_pair

    folder = tmp_path_factory.mktemp("pair")
    build_pair(texts_of_digits(), folder)
    untie(folder / "student_init", folder / "student_untied")
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Folder with train (text-only and two-turn samples among them) and validation."""
    folder = tmp_path_factory.mktemp("shards")
    build_digit_shards(folder / "train", "train", 200, seed=2)  # six samples are text only
    build_digit_shards(folder / "validation", "validation", 24)
    return folder
