"""Writes what `make real` found: held-out bits per byte, the teacher's KL, three bodies.

    python -m launch.real.report runs/real/steps120 --seeds 1 2 3

Reads seedN/bits.json of genrecal_ds.analysis.bits; writes report.json and report.md.
"""

import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genrecal_ds.console.arguments import command_parser
from genrecal_ds.console.command import command
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.evaluate.generate import Generator
from launch.real.releases import FOLDER

ARMS = {"SFT": "sft", "byte KL": "byte_kd", "GenRecal": "genrecal"}
CONTROL = "SFT"
MODELS = FOLDER / "models"
STUDENT, TEACHER = MODELS / "smollm2_135m", MODELS / "qwen2_5_coder_0_5b"
NUM_BODIES, BODY_TOKENS = 3, 96
MEASURES = {"bits_per_byte": "bits per byte", "teacher_kl": "teacher's KL, bits per byte"}


def numbers(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """{model: {measure: by seed}}, and each arm's differences to the control by sample."""
    found: dict[str, Any] = {}
    by_seed = {seed: json.loads((folder / f"seed{seed}/bits.json").read_text()) for seed in seeds}
    first = by_seed[seeds[0]]
    start = first[str(STUDENT)]
    for name, values in (("teacher", first["teacher"]), ("student, before", start)):
        found[name] = {measure: [values[measure]] for measure in MEASURES}
    for arm, run in ARMS.items():
        own = [
            by_seed[seed][str(folder / f"seed{seed}" / run / "second/student")] for seed in seeds
        ]
        found[arm] = {measure: [values[measure] for values in own] for measure in MEASURES}
        found[arm]["at"] = {
            measure: [statistics.mean(at) for at in zip(*(v["at"][measure] for v in own),
                                                        strict=True)]
            for measure in MEASURES
        }  # fmt: skip
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval over held-out samples, which are many."""
    return statistics.mean(values), 1.96 * statistics.stdev(values) / len(values) ** 0.5


def table(found: dict[str, Any]) -> list[str]:
    """One line a model. The intervals pair each arm with the control, sample by sample."""
    heads = [*MEASURES.values(), *(f"minus {CONTROL} [95 %]: {m}" for m in MEASURES.values())]
    lines = ["| model | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, values in found.items():
        cells = [name, *(" ".join(f"{v:.3f}" for v in values[measure]) for measure in MEASURES)]
        for measure in MEASURES:
            if name == CONTROL or "at" not in values:
                cells.append("")
                continue
            pairs = zip(values["at"][measure], found[CONTROL]["at"][measure], strict=True)
            mean, half = interval([own - other for own, other in pairs])
            cells.append(f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def bodies(folder: Path, seed: int) -> list[dict[str, str]]:
    """Held-out questions with every model's greedy answer."""
    reader = ShardReader(ShardIndex.load(folder / "data/heldout"))
    samples = [reader.read(number) for number in range(NUM_BODIES)]
    found = [{"question": _text(s.messages[-2]), "written": _text(s.messages[-1])} for s in samples]
    students = {arm: folder / f"seed{seed}/{run}/second/student" for arm, run in ARMS.items()}
    for name, model in {"teacher": TEACHER, "student, before": STUDENT, **students}.items():
        generator = Generator(model, max_new_tokens=BODY_TOKENS)
        (answers,) = generator.answers(samples, len(samples))
        for body, answer in zip(found, answers, strict=True):
            body[name] = answer
    return found


def _text(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"])


def seconds(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Of each arm's stages: seconds of the steps, and the peak of its rank's memory in GiB."""
    found = {}
    for arm, run in ARMS.items():
        logs = sorted((folder / f"seed{seed}" / run).glob("*/metrics.jsonl"))
        lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
        found[arm] = {
            "seconds": sum(line["seconds"] for line in lines),
            "peak_memory_gib": max(line["peak_memory_gib"] for line in lines),
        }
    return found


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# A released student before and after",
        "",
        f"Held-out functions of the standard library of Python {report['python']}, by module. "
        f"Seeds {report['seeds']}.",
        "",
        *table(report["models"]),
        "",
        "| arm | seconds of its steps | peak memory of its rank, GiB |",
        "|---|---|---|",
        *(
            f"| {arm} | {cost['seconds']:.0f} | {cost['peak_memory_gib']:.2f} |"
            for arm, cost in report["costs"].items()
        ),
    ]
    for body in report["bodies"]:
        for name, text in body.items():
            lines += ["", f"**{name}**", "", "````", text.rstrip(), "````"]
        lines += ["", "---"]
    return "\n".join(lines) + "\n"


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("python -m launch.real.report", __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    given = parser.parse_args(argv)
    report = {
        "python": platform.python_version(),
        "seeds": given.seeds,
        "models": numbers(given.folder, given.seeds),
        "costs": seconds(given.folder, given.seeds[0]),
        "bodies": bodies(given.folder, given.seeds[0]),
    }
    (given.folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (given.folder / "report.md").write_text(markdown(report))
    print("\n".join(table(report["models"])))
    print(f"\n{given.folder / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
