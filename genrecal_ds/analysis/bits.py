"""Measures students on held-out text per byte, so that any two tokenizers can be compared.

    python -m genrecal_ds.analysis.bits TEACHER SHARDS STUDENT [STUDENT ..] --out bits.json

    bits_per_byte   what the student's own head needs for the answers, their ends included
    teacher_kl      bits of the byte KL (objectives/byte_kd.py) at a shared byte boundary, mean
    at              per sample, to compare two students pairwise

The students are one model in several states: a folder and results of its training. Runs in one
process, in fp32; the teacher runs once.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genrecal_ds.analysis.gap import ByteModels
from genrecal_ds.console.arguments import command_parser, positive
from genrecal_ds.console.command import command
from genrecal_ds.data.batch import PairBatch
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.pair import Pair, Unusable
from genrecal_ds.data.reader import Sample, ShardReader
from genrecal_ds.errors import UserError
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.loading import load_full
from genrecal_ds.objectives.base import TeacherRows


class Read(NamedTuple):
    """One held-out sample as both models read it."""

    batch: PairBatch
    rows: TeacherRows
    num_bytes: int
    teacher_nats: float  # of the answers, by the teacher's own head


def bits(teacher: Path, students: Sequence[Path], samples: Sequence[Sample]) -> dict[str, Any]:
    """{student's folder, and `teacher`: its numbers}. Raises UserError for unlike students."""
    first = ChatEncoder(students[0], 1).digest
    for folder in students[1:]:
        if ChatEncoder(folder, 1).digest != first:
            raise UserError(f"{folder}: not the tokens of {students[0]}; measure it by itself")
    models = ByteModels.load(teacher, students[0])
    reads = list(_reads(models, samples))
    if not reads:
        raise UserError(
            "no held-out sample that both models read; see python -m data_tools.inspect"
        )
    found: dict[str, Any] = {}
    for folder in students:
        load_full(models.objective.student.model, folder)
        found[str(folder)] = _numbers(reads, [_student(models, read) for read in reads])
    own = [(read.teacher_nats, 0.0, 1) for read in reads]
    return {"teacher": _numbers(reads, own), **found}


def _reads(models: ByteModels, samples: Sequence[Sample]) -> Iterator[Read]:
    for sample in samples:
        try:
            pairs = models.encoders.encode(sample.messages, sample.images)
        except Unusable:
            continue
        batch = models.batch(pairs)
        assert batch.teacher is not None
        with torch.no_grad():
            view = batch.teacher
            rows = TeacherRows(*models.teacher(view.inputs, view.rows_A, view.targets_N))
            logits = models.objective.teacher_head.logits(rows.targets_NH)
            nats = torch.nn.functional.cross_entropy(logits, view.labels_N, reduction="sum")
        yield Read(batch, rows, _num_bytes(pairs, models), float(nats))


def _num_bytes(pairs: list[Pair], models: ByteModels) -> int:
    """Bytes of the answers, by the student's tokens without the ends of turns."""
    pieces = models.matcher.student
    return sum(
        len(pieces[token] or b"")
        for pair in pairs
        for start, end in pair.student.answers
        for token in pair.student.input_ids_T[start : end - 1].tolist()
    )


@torch.no_grad()
def _student(models: ByteModels, read: Read) -> tuple[float, float, int]:
    """(nats of the answers, sum of the byte KL, boundaries that it is summed over)"""
    objective, student = models.objective, read.batch.student
    hidden_BSD = objective.student.body(*student.inputs)
    rows_MD: Tensor = hidden_BSD.flatten(0, 1).index_select(0, student.rows_M)
    ones_M = torch.ones(len(rows_MD))
    nats, _ = objective.student.head.cross_entropy(rows_MD, student.labels_M, ones_M)
    kl, _, _ = objective.kd(rows_MD, read.batch, read.rows)
    assert read.batch.shared_bytes is not None
    return float(nats), float(kl), len(read.batch.shared_bytes.student_I)


def _numbers(reads: list[Read], values: list[tuple[float, float, int]]) -> dict[str, Any]:
    nats, kls, boundaries = zip(*values, strict=True)
    sizes = [read.num_bytes for read in reads]
    bit = math.log(2)
    return {
        "bits_per_byte": sum(nats) / sum(sizes) / bit,
        "teacher_kl": sum(kls) / sum(boundaries) / bit,
        "num_bytes": sum(sizes),
        "at": {
            "bits_per_byte": [n / size / bit for n, size in zip(nats, sizes, strict=True)],
            "teacher_kl": [kl / count / bit for kl, count in zip(kls, boundaries, strict=True)],
        },
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("python -m genrecal_ds.analysis.bits", __doc__)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("student", type=Path, nargs="+", help="model folders")
    parser.add_argument("--samples", type=positive(int), default=64, help="the first ones")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    reader = ShardReader(ShardIndex.load(arguments.shards))
    numbers = tuple(range(min(arguments.samples, len(reader))))
    samples = [s for s in reader.read_many(numbers) if isinstance(s, Sample)]
    found = bits(arguments.teacher, arguments.student, samples)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    for name, values in found.items():
        print(f"{values['bits_per_byte']:.3f} bits/byte  KL {values['teacher_kl']:.3f}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
