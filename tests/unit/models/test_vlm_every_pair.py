"""Every row of the zoo as teacher of one student and as student of one teacher: stages 1 and 2 on
a batch with and without pictures, then export, reload and generate."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from genrecal_ds.data.batch import PairBatch, collate
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.reader import Sample
from genrecal_ds.evaluate.generate import Generator
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.head import FrozenHead, load_final_norm, load_frozen_head
from genrecal_ds.models.recalibrator import Recalibrator
from genrecal_ds.models.saving import write_student
from genrecal_ds.models.vlm import TeacherBody, load_vlm
from genrecal_ds.objectives.base import Ingredients, TeacherRows, Totals
from genrecal_ds.objectives.genrecal import GenRecal
from genrecal_ds.objectives.report import Clock
from genrecal_ds.recipe.stage_config import StageConfig
from tests.unit.models.test_vlm_every_family import most_turns, reads_images, samples
from tests.zoo import ROWS

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


class Stage(NamedTuple):
    """An objective beside the one batch it is trained on."""

    objective: GenRecal
    batch: PairBatch
    rows: TeacherRows

    def loss(self) -> torch.Tensor:
        totals = Totals(self.batch.num_teacher_rows, self.batch.num_student_rows)
        return self.objective(self.batch, self.rows, totals)[0]


def stage(teacher: Path, student: Path, trains_student: bool, pack: bool = False) -> Stage:
    torch.manual_seed(0)
    encoders = PairEncoders(ChatEncoder(student, 2000), ChatEncoder(teacher, 2000))
    sees = all(reads_images(folder) for folder in (teacher, student))
    asked = samples(sees, turns=most_turns(teacher, student))
    pairs = [pair for sample in asked for pair in encoders.encode(*sample)]
    batch = collate(pairs, encoders.placeholder(), encoders.vision_rules, not trains_student)
    body, model = TeacherBody(load_vlm(teacher, pack=pack)), load_vlm(student, pack=pack)
    read = batch.teacher
    with torch.no_grad():
        rows = TeacherRows(*body(read.inputs, read.rows_A, read.targets_N))
    model.train_only(("layers", "norm") if trains_student else ())
    recalibrator = Recalibrator(model.text_config, rows.inputs_AH.shape[1])
    recalibrator.initialize(0.1, load_final_norm(teacher))
    head = FrozenHead(load_frozen_head(teacher, torch.float32, CPU))
    config = StageConfig(kind="distill" if trains_student else "align", steps=1)
    parts = Ingredients(config, model, encoders, Clock(), head, recalibrator)
    return Stage(GenRecal(parts).train(), batch, rows)


def train(trained: Stage, steps: int = 2) -> list[float]:
    """Losses before each step and after the last. Every trainable parameter must get a gradient."""
    parameters = [p for p in trained.objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = trained.loss()
        loss.backward()
        losses.append(loss.item())
        for name, parameter in trained.objective.named_parameters():
            if parameter.requires_grad and not is_blind(name):
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            else:
                assert parameter.requires_grad or parameter.grad is None, name
        optimizer.step()
    return [*losses, trained.loss().item()]


def is_blind(name: str) -> bool:
    """Attention does not see what a key bias adds to all scores alike: its gradient is zero."""
    return name.endswith("k_proj.bias")


def counterpart(zoo, row: str, role: str) -> tuple[Path, Path]:
    """(teacher, student); the other one has another tokenizer and, where it can, another family."""
    folder = zoo(row)
    if reads_images(folder):
        other = zoo("internvl", "spm_bpe") if role == "teacher" else zoo("qwen2_vl", "tiktoken")
    else:
        other = zoo("llama", "spm_bpe") if role == "teacher" else zoo("qwen3", "tiktoken")
    return (folder, other) if role == "teacher" else (other, folder)


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("row", ROWS)
def test_a_pair_learns_in_both_stages(zoo, row, role):
    teacher, student = counterpart(zoo, row, role)
    for trains_student in (False, True):
        losses = train(stage(teacher, student, trains_student))
        assert all(torch.isfinite(torch.tensor(losses)))
        assert losses[0] >= losses[1] >= losses[2], losses


@pytest.mark.parametrize("row", ROWS)
def test_a_trained_student_is_a_plain_folder_again(zoo, row, tmp_path):
    teacher, student = counterpart(zoo, row, "student")
    trained = stage(teacher, student, trains_student=True)
    before = {path.name: path.read_bytes() for path in student.iterdir()}
    train(trained, steps=1)
    model: nn.Module = trained.objective.student.model
    write_student(model, dict(model.state_dict()), student, tmp_path / "out")
    changed = {
        path.name for path in (tmp_path / "out").iterdir() if before[path.name] != path.read_bytes()
    }
    assert changed == {"model.safetensors"}  # tokenizer, processor, template: byte for byte

    again = load_vlm(tmp_path / "out").eval()
    with torch.no_grad():
        inputs = trained.batch.student.inputs
        expected = trained.objective.student.eval().body(*inputs)
        torch.testing.assert_close(again.body(*inputs), expected, rtol=0, atol=0)
    generator = Generator(tmp_path / "out", max_new_tokens=4)
    asked = [
        Sample(str(number), images, messages, "", [], "")
        for number, (messages, images) in enumerate(
            samples(reads_images(student), turns=most_turns(student))
        )
    ]
    answers = [answer for part in generator.answers(asked, 2) for answer in part]
    assert len(answers) == len(asked) and all(isinstance(answer, str) for answer in answers)
