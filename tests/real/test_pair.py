"""SmolLM2-135M-Instruct and Gemma 3 270M teach each other: every kind of stage, released weights.

fp32 and plain SGD: two steps of Adam need more memory than they show. The weights are read again
before each kind.
"""

import math
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genrecal_ds.data.batch import PairBatch, collate
from genrecal_ds.data.byte_matching import ByteMatcher
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.reader import Sample
from genrecal_ds.evaluate.generate import Generator
from genrecal_ds.models.head import FrozenHead, load_final_norm, load_frozen_head
from genrecal_ds.models.loading import load_full
from genrecal_ds.models.recalibrator import Recalibrator
from genrecal_ds.models.saving import write_student
from genrecal_ds.models.token_bytes import token_bytes
from genrecal_ds.models.vlm import VLM, TeacherBody, load_vlm
from genrecal_ds.objectives.base import Ingredients, TeacherRows, Totals
from genrecal_ds.objectives.report import Clock
from genrecal_ds.recipe.kinds import KINDS
from genrecal_ds.recipe.stage_config import StageConfig
from tests.real.chats import MODELS, TURNS, conversations, encoder

pytestmark = pytest.mark.real
CPU = torch.device("cpu")
STEP = 0.02  # the length of a step, along the gradient


@dataclass
class Beside:
    """A student beside its teacher, and the one batch that every kind is trained on."""

    teacher: Path
    folder: Path
    student: VLM
    encoders: PairEncoders
    head: FrozenHead
    matcher: ByteMatcher
    batches: dict[bool, PairBatch]  # by with_regular
    rows: dict[bool, TeacherRows]

    @classmethod
    def load(cls, teacher: Path, folder: Path) -> "Beside":
        encoders = PairEncoders(encoder(folder), encoder(teacher))
        pieces = (token_bytes(e.tokenizer, e.folder) for e in (encoders.teacher, encoders.student))
        matcher = ByteMatcher(*pieces)
        pairs = [pair for chat in conversations(*TURNS) for pair in encoders.encode(chat, [])]
        body, batches, rows = TeacherBody(load_vlm(teacher)), {}, {}
        for regular in (False, True):
            batch = collate(pairs, encoders.placeholder(), encoders.vision_rules, regular, matcher)
            view = batch.teacher
            with torch.no_grad():
                rows[regular] = TeacherRows(*body(view.inputs, view.rows_A, view.targets_N))
            batches[regular] = batch
        head = FrozenHead(load_frozen_head(teacher, torch.float32, CPU))
        return cls(teacher, folder, load_vlm(folder), encoders, head, matcher, batches, rows)

    def objective(self, kind: str):
        facts = KINDS[kind]
        torch.manual_seed(0)
        load_full(self.student.model, self.folder)
        self.student.train_only(facts.trains)
        recalibrator = None
        if facts.has_recalibrator:
            width = self.rows[True].inputs_AH.shape[1]
            recalibrator = Recalibrator(self.student.text_config, width)
            recalibrator.initialize(0.02, load_final_norm(self.teacher))
        stage = StageConfig(kind=kind, steps=1)
        parts = Ingredients(
            stage, self.student, self.encoders, Clock(), self.head, recalibrator, self.matcher
        )
        return import_module(facts.objective).build(parts).train()

    def losses(self, kind: str, steps: int = 2) -> list[float]:
        """Before each step and after the last."""
        objective, facts = self.objective(kind), KINDS[kind]
        batch = self.batches[facts.has_regular]
        rows = self.rows[facts.has_regular] if facts.has_teacher else None
        totals = Totals(batch.num_teacher_rows, batch.num_student_rows)
        trained = [p for p in objective.parameters() if p.requires_grad]
        found = []
        for _ in range(steps):
            loss = objective(batch, rows, totals)[0]
            loss.backward()
            found.append(loss.item())
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            with torch.no_grad():
                for parameter in trained:
                    parameter.sub_(parameter.grad, alpha=STEP)
                    parameter.grad = None
        with torch.no_grad():
            return [*found, objective(batch, rows, totals)[0].item()]


@pytest.fixture(
    scope="module", params=[MODELS, MODELS[::-1]], ids=["gemma_student", "smol_student"]
)
def beside(request, released):
    teacher, student = request.param
    return Beside.load(released(teacher), released(student))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not KINDS[kind].needs_one_tokenizer])
def test_every_kind_learns(beside, kind):
    losses = beside.losses(kind)
    print(f"\n{kind}: {losses}")
    assert all(map(math.isfinite, losses)) and losses[0] > losses[-1], losses


def test_a_trained_student_is_a_plain_folder_and_answers(beside, tmp_path):
    """Untrained, its weights are the release's, bit for bit; trained, it says something else."""
    asked = [Sample("0", [], chat, "", [], "") for chat in conversations(*TURNS)]
    (before,) = Generator(beside.folder, max_new_tokens=12).answers(asked, 2)
    assert all(before)
    model = beside.student.model
    load_full(model, beside.folder)
    released = load_file(beside.folder / "model.safetensors")
    own = model.state_dict()
    assert all(torch.equal(own[name], value.float()) for name, value in released.items())
    del released

    beside.losses("sft", steps=4)
    state = {name: value.bfloat16() for name, value in model.state_dict().items()}
    write_student(model, state, beside.folder, tmp_path / "out")
    del state
    same = {path.name for path in beside.folder.iterdir()} - {"config.json", "model.safetensors"}
    for name in same:
        assert (tmp_path / "out" / name).read_bytes() == (beside.folder / name).read_bytes()
    again = load_vlm(tmp_path / "out", torch.bfloat16).model.state_dict()
    assert all(torch.equal(again[name], value.bfloat16()) for name, value in own.items())
    del again
    (after,) = Generator(tmp_path / "out", max_new_tokens=12).answers(asked, 2)
    print(f"\nbefore {before}\nafter  {after}")
    assert all(after) and after != before


def test_one_tokenizer_compares_token_by_token(released):
    """The kind that compares equal ids: SmolLM2 as its own teacher, where the KL starts at 0."""
    folder = released("smollm2_135m")
    losses = Beside.load(folder, folder).losses("logit_kd")
    assert all(map(math.isfinite, losses)) and losses[0] > losses[-1], losses
