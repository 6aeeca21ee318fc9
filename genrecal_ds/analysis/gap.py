"""Measures how far students are from their teacher, and whether they use the question.

    python -m genrecal_ds.analysis.gap TEACHER SHARDS STUDENT [STUDENT ..] --out gap.json

The distance is the byte KL of objectives/byte_kd.py. It exists for any two tokenizers and for any
student, however the student was trained. It is measured on boundary rows (the first answer token of
a turn) and on all other rows, with the student's own question and with the next sample's question.
A student that reads only the answer so far has the same distance with both. Also measured: the norm
of the KL's gradient at the student's answer rows, beside that of its cross entropy. Runs in one
process, without ZeRO.

Shapes: M student loss rows, D student width.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from genrecal_ds.console.arguments import command_parser
from genrecal_ds.data.batch import PairBatch, collate
from genrecal_ds.data.byte_matching import ByteMatcher
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.pair import Pair, Unusable
from genrecal_ds.data.reader import Sample, ShardReader
from genrecal_ds.errors import UserError
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.head import FrozenHead, load_frozen_head
from genrecal_ds.models.token_bytes import token_bytes
from genrecal_ds.models.vlm import TeacherBody, load_vlm
from genrecal_ds.objectives.base import Ingredients, TeacherRows
from genrecal_ds.objectives.byte_kd import ByteKD, build
from genrecal_ds.objectives.report import Clock
from genrecal_ds.recipe.stage_config import StageConfig

CPU = torch.device("cpu")


class ByteModels(NamedTuple):
    teacher: TeacherBody
    objective: ByteKD
    encoders: PairEncoders
    matcher: ByteMatcher

    @classmethod
    def load(cls, teacher: Path, student: Path) -> "ByteModels":
        """Load both models whole, in fp32. Raises UserError for a tokenizer of unknown bytes."""
        ours, theirs = ChatEncoder(student, 1 << 20), ChatEncoder(teacher, 1 << 20)
        matcher = ByteMatcher(*(token_bytes(e.tokenizer, e.folder) for e in (theirs, ours)))
        encoders = PairEncoders(ours, theirs)
        head = FrozenHead(load_frozen_head(teacher, torch.float32, CPU))
        stage = StageConfig(kind="byte_kd", steps=1)
        parts = Ingredients(
            stage, load_vlm(student).eval(), encoders, Clock(), head, matcher=matcher
        )
        return cls(TeacherBody(load_vlm(teacher)).eval(), build(parts), encoders, matcher)

    def batch(self, pairs: list[Pair]) -> PairBatch:
        placeholder, rules = self.encoders.placeholder(), self.encoders.vision_rules
        return collate(pairs, placeholder, rules, with_regular=False, matcher=self.matcher)


def gap(teacher: Path, student: Path, samples: Sequence[Sample]) -> dict[str, float]:
    """Measure means over rows, and norms. samples: at least 2, of one turn each."""
    models = ByteModels.load(teacher, student)
    encode = models.encoders.encode
    pairs = [encode(sample.messages, sample.images)[0] for sample in samples]
    moved = [*samples[1:], samples[0]]
    wrong = [
        encode([*other.messages[:-1], own.messages[-1]], other.images)[0]
        for own, other in zip(samples, moved, strict=True)
    ]
    # The teacher reads its own question in both.
    exchanged = [replace(a, student=b.student) for a, b in zip(pairs, wrong, strict=True)]
    true, shuffled = (models.batch(of) for of in (pairs, exchanged))
    assert true.teacher is not None
    with torch.no_grad():
        view = true.teacher
        rows = TeacherRows(*models.teacher(view.inputs, view.rows_A, view.targets_N))
        kls = _by_class("kl", true, *_kl(models, true, rows))
        kls |= _by_class("kl_shuffled", shuffled, *_kl(models, shuffled, rows))
    return kls | _gradient_norms(models, true, rows)


def _rows(models: ByteModels, batch: PairBatch) -> Tensor:
    """[M, D]"""
    hidden_BSD = models.objective.student.body(*batch.student.inputs)
    return hidden_BSD.flatten(0, 1).index_select(0, batch.student.rows_M)


def _kl(models: ByteModels, batch: PairBatch, rows: TeacherRows) -> tuple[Tensor, Tensor]:
    """(KL by row [M], which rows have one [M])"""
    _, kl_M, is_taught_M = models.objective.kd(_rows(models, batch), batch, rows)
    return kl_M, is_taught_M


def _gradient_norms(models: ByteModels, batch: PairBatch, rows: TeacherRows) -> dict[str, float]:
    with torch.no_grad():
        leaf_MD = _rows(models, batch)
    leaf_MD.requires_grad_()
    kl_sum, _, _ = models.objective.kd(leaf_MD, batch, rows)
    (of_kl_MD,) = torch.autograd.grad(kl_sum, leaf_MD)
    ones_M = torch.ones(len(leaf_MD))
    ce_sum, _ = models.objective.student.head.cross_entropy(leaf_MD, batch.student.labels_M, ones_M)
    (of_ce_MD,) = torch.autograd.grad(ce_sum, leaf_MD)
    boundary_M = batch.student.boundary_M
    return {
        f"gradient/{name}_{rows_of}": float(gradient_MD[mask_M].norm()) / batch.num_student_rows
        for name, gradient_MD in (("kl", of_kl_MD), ("student_ce", of_ce_MD))
        for rows_of, mask_M in (("boundary", boundary_M), ("other", ~boundary_M))
    }


def _by_class(name: str, batch: PairBatch, values_M: Tensor, valid_M: Tensor) -> dict[str, float]:
    boundary_M = batch.student.boundary_M
    return {
        f"{name}_boundary": float(values_M[valid_M & boundary_M].mean()),
        f"{name}_other": float(values_M[valid_M & ~boundary_M].mean()),
    }


def markdown(by_student: dict[str, dict[str, float]]) -> str:
    lines = [
        "| student | boundary KL | other's question | times | other rows' KL | other's question "
        "| times | gradient, boundary | gradient, other | CE, boundary | CE, other |",
        "|---" * 11 + "|",
    ]
    for name, values in by_student.items():
        cells = [name]
        for rows in ("boundary", "other"):
            true, shuffled = values[f"kl_{rows}"], values[f"kl_shuffled_{rows}"]
            cells += [f"{true:.3f}", f"{shuffled:.3f}", f"{shuffled / max(true, 1e-9):.1f}"]
        keys = [
            f"gradient/{of}_{rows}" for of in ("kl", "student_ce") for rows in ("boundary", "other")
        ]
        lines.append("| " + " | ".join([*cells, *(f"{values[key]:.3f}" for key in keys)]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("python -m genrecal_ds.analysis.gap", __doc__)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("student", type=Path, nargs="+", help="model folders")
    parser.add_argument("--samples", type=int, default=64, help="the first ones of one turn")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        reader = ShardReader(ShardIndex.load(arguments.shards))
        numbers = tuple(range(min(arguments.samples, len(reader))))
        samples = [s for s in reader.read_many(numbers) if isinstance(s, Sample)]
        samples = [s for s in samples if sum(m["role"] == "assistant" for m in s.messages) == 1]
        if len(samples) < 2:
            raise UserError(f"{arguments.shards}: no two samples of one turn to exchange")
        by_student = {str(s): gap(arguments.teacher, s, samples) for s in arguments.student}
    except (UserError, Unusable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.out.write_text(json.dumps(by_student, indent=2) + "\n")
    print(markdown(by_student))
    return 0


if __name__ == "__main__":
    sys.exit(main())
