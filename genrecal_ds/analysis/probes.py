"""Measures losses with the student's question states true, shuffled and zeroed.

    python -m genrecal_ds.analysis.probes TEACHER STAGE_FOLDER SHARDS --out probes.json

STAGE_FOLDER holds a finished stage's student/ and recalibrator/. Runs in one process, without ZeRO.

Rows a_i of the mixed pass receive the teacher's own z, from which the teacher's head already reads
the next token. Only the BOUNDARY row (the last question row) needs the student's states. A mean
over all rows hides this, and hides a wrong row shift.

Shapes: B conversations, S student length, D student width, H teacher width, N loss rows.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from genrecal_ds import IGNORE
from genrecal_ds.console.arguments import command_parser
from genrecal_ds.console.command import command
from genrecal_ds.data.batch import PairBatch, collate
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.pair import Pair
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.errors import UserError
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.config_file import read_config
from genrecal_ds.models.head import load_frozen_head
from genrecal_ds.models.recalibrator import Recalibrator, load_recalibrator
from genrecal_ds.models.vlm import VLM, TeacherBody, load_vlm
from genrecal_ds.ops.head_loss import Head, head_loss

NUM_COSINES = 10  # the paper's figure 7 is a 10 x 10 matrix


@dataclass
class TrainedStage:
    """A teacher, a student and the Recalibrator between them, whole, in fp32."""

    teacher: TeacherBody
    student: VLM
    recalibrator: Recalibrator
    head: Head
    encoders: PairEncoders

    @classmethod
    def load(cls, teacher: Path, stage: Path) -> "TrainedStage":
        facts = json.loads((stage / "recalibrator/recalibrator.json").read_text())
        student = load_vlm(stage / "student")
        width = read_config(teacher).get_text_config().hidden_size
        recalibrator = Recalibrator(
            student.text_config, width, facts["depth"], positions=facts.get("positions", "new")
        )
        load_recalibrator(recalibrator, stage / "recalibrator")
        return cls(
            TeacherBody(load_vlm(teacher)).eval(),
            student.eval(),
            recalibrator.eval(),
            load_frozen_head(teacher, torch.float32, torch.device("cpu")),
            PairEncoders(ChatEncoder(stage / "student", 1 << 20), ChatEncoder(teacher, 1 << 20)),
        )

    def batch(self, pairs: list[Pair], with_regular: bool = False) -> PairBatch:
        placeholder = self.encoders.placeholder()
        return collate(pairs, placeholder, self.encoders.vision_rules, with_regular)

    @torch.no_grad()
    def teacher_rows(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """(rows [A, H] that enter the Recalibrator, target rows [N, H])."""
        assert batch.teacher is not None
        return self.teacher(batch.teacher.inputs, batch.teacher.rows_A, batch.teacher.targets_N)

    @torch.no_grad()
    def student_hidden(self, batch: PairBatch) -> Tensor:
        return self.student.body(*batch.student.inputs)


@torch.no_grad()
def losses(subject: TrainedStage, batch: PairBatch, hidden_BSD: Tensor) -> dict[str, float]:
    """Measure the mean CE and KL of the mixed pass on boundary rows and on other rows."""
    assert batch.teacher is not None
    inputs_AH, targets_NH = subject.teacher_rows(batch)
    rows_NH = subject.recalibrator(hidden_BSD, inputs_AH, batch.teacher.layout)
    out = head_loss(rows_NH[None], targets_NH, batch.teacher.labels_N, subject.head, [1.0], [1.0])
    valid_N = batch.teacher.labels_N != IGNORE
    boundary_N = batch.teacher.boundary_N & valid_N
    other_N = ~batch.teacher.boundary_N & valid_N
    return {
        f"{name}_{rows}": float(values[0][mask].mean())
        for name, values in (("ar", out.ce_KN), ("kl", out.kl_KN))
        for rows, mask in (("boundary", boundary_N), ("other", other_N))
    }


def gradient_norms(subject: TrainedStage, batch: PairBatch) -> dict[str, float]:
    """Measure each term's gradient norm at the student's hidden states, for means as in a step."""
    assert batch.teacher is not None
    inputs_AH, targets_NH = subject.teacher_rows(batch)
    leaf_BSD = subject.student_hidden(batch).requires_grad_()
    rows_NH = subject.recalibrator(leaf_BSD, inputs_AH, batch.teacher.layout)
    norms = {}
    for rows, keep_N in (
        ("boundary", batch.teacher.boundary_N),
        ("other", ~batch.teacher.boundary_N),
    ):
        labels_N = batch.teacher.labels_N.where(keep_N, IGNORE)
        term = head_loss(rows_NH[None], targets_NH, labels_N, subject.head, [1.0], [1.0]).loss_sum
        (gradient,) = torch.autograd.grad(
            term / batch.num_teacher_rows, leaf_BSD, retain_graph=True
        )
        norms[f"mixed_{rows}"] = float(gradient.norm())
    student = batch.student
    own_rows = leaf_BSD.flatten(0, 1).index_select(0, student.rows_M)
    ce_sum, _ = subject.student.head.cross_entropy(
        own_rows, student.labels_M, torch.ones(len(own_rows))
    )
    (gradient,) = torch.autograd.grad(ce_sum / batch.num_student_rows, leaf_BSD)
    norms["student_ce"] = float(gradient.norm())
    return norms


@torch.no_grad()
def cosines(subject: TrainedStage, pairs: list[Pair]) -> dict[str, Any]:
    """Compare boundary rows of the mixed pass with those of the regular pass (paper figure 7).

    The conversations have different answers; the diagonal compares a conversation with itself.
    """
    chosen, seen = [], set()
    for pair in pairs:
        assert pair.teacher is not None
        start, end = pair.teacher.answers[0]
        answer = tuple(pair.teacher.input_ids_T[start:end].tolist())
        if answer not in seen and len(chosen) < NUM_COSINES:
            seen.add(answer)
            chosen.append(pair)
    batch = subject.batch(chosen, with_regular=True)
    assert batch.teacher is not None
    rows = subject.recalibrator(
        subject.student_hidden(batch), subject.teacher_rows(batch)[0], batch.teacher.layout
    )
    mixed, regular = (normalize(side[batch.teacher.boundary_N], dim=-1) for side in rows.chunk(2))
    matrix = mixed @ regular.T
    off = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
    return {
        "diagonal": float(matrix.diagonal().mean()),
        "off_diagonal": float(off.mean()),
        "matrix": [[round(value, 3) for value in row] for row in matrix.tolist()],
    }


def single_turns(subject: TrainedStage, reader: ShardReader, num_samples: int) -> list[Pair]:
    """Choose those of the first samples that have one turn. Raises UserError for too few."""
    samples = [reader.read(i) for i in range(min(num_samples, len(reader)))]
    encoded = [subject.encoders.encode(sample.messages, sample.images) for sample in samples]
    pairs = [pairs[0] for pairs in encoded if sum(len(p.student.answers) for p in pairs) == 1]
    if len(pairs) < NUM_COSINES:
        raise UserError(
            f"{reader.index.directory}: {len(pairs)} single-turn samples; the probes need "
            f"{NUM_COSINES}"
        )
    return pairs


def probe(teacher: Path, stage: Path, shards: Path, num_samples: int = 128) -> dict[str, Any]:
    """Run all probes of one stage's result on the first single-turn samples of `shards`."""
    subject = TrainedStage.load(teacher, stage)
    pairs = single_turns(subject, ShardReader(ShardIndex.load(shards)), num_samples)
    # Another sample's question in front of this sample's answer: everything the student could
    # have known is wrong, the teacher's rows are right.
    moved = [*pairs[1:], pairs[0]]
    shuffled = [Pair(a.teacher, b.student) for a, b in zip(pairs, moved, strict=True)]
    batch, wrong = subject.batch(pairs), subject.batch(shuffled)
    hidden_BSD = subject.student_hidden(batch)
    return {
        "num_samples": len(pairs),
        "q_s": {
            "true": losses(subject, batch, hidden_BSD),
            "shuffled": losses(subject, wrong, subject.student_hidden(wrong)),
            "zeroed": losses(subject, batch, torch.zeros_like(hidden_BSD)),
        },
        "gradient_norm": gradient_norms(subject, batch),
        "cosine": cosines(subject, pairs),
    }


def facts(values: dict[str, Any]) -> dict[str, bool]:
    """Check what must hold in any sound run, whatever its scores: {statement: whether it holds}.

    A row shift by one, a leak between conversations or a missing regulariser breaks these first.
    """
    true, shuffled, zeroed = (values["q_s"][state] for state in ("true", "shuffled", "zeroed"))
    norms, cosine = values["gradient_norm"], values["cosine"]
    return {
        "boundary KL with shuffled question states is over 5 times the true": (
            shuffled["kl_boundary"] > 5 * true["kl_boundary"]
        ),
        "other rows do not notice zeroed question states": (
            abs(zeroed["ar_other"] - true["ar_other"]) < 0.05
        ),
        "other rows send the student under an eighth of the boundary rows' gradient": (
            norms["mixed_other"] < norms["mixed_boundary"] / 8
        ),
        "a boundary row is nearer to its own regular row than to others, by .3 in cosine": (
            cosine["diagonal"] > cosine["off_diagonal"] + 0.3
        ),
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("python -m genrecal_ds.analysis.probes", __doc__)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("stage", type=Path, nargs="+", help="one or more finished stages' folders")
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    result = {
        stage.name: probe(arguments.teacher, stage, arguments.shards) for stage in arguments.stage
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, values in result.items():
        print(name, json.dumps({k: v for k, v in values.items() if k != "cosine"}))
        print(name, "cosine", {k: round(v, 3) for k, v in list(values["cosine"].items())[:2]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
