"""Time the fused operations beside their peers and bare GEMMs; write a JSON and print a table.

    python -m benchmarks.ops [--cases C1 G1 ...] [--rounds 20] [--out FILE]

On a CUDA machine the G cases run, else the C cases and a small G5 and G6. Needs torch,
transformers and, for the kernels, triton; peers join where they are installed (extra `peers`). The
cases are those of docs/performance.md. No timing gates anything: read ratios, never milliseconds.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import head_cases as heads
from benchmarks.body_cases import BodyNumbers, align_cases, recalibrator_cases
from benchmarks.head_cases import Numbers
from benchmarks.peers import ce_peers, distillation_peers
from benchmarks.race import Contestants, device_facts, race, without_failures

HEADS = ((8192, 152064), (3584, 152064))  # Qwen2-VL-72B's head, Qwen2-VL-7B's
QWEN_7B = dict(
    hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
    vocab_size=8,
)  # fmt: skip
TINY = dict(hidden_size=256, intermediate_size=688, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=8)  # fmt: skip
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=None, help="ids; default: all of the device")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--scale", type=float, default=1.0, help="of the rows; below 1 to try out")
    options = parser.parse_args(arguments)
    cases = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    unknown = set(options.cases or ()) - set(cases)
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))} here; there are {', '.join(cases)}")
    torch.backends.cuda.matmul.allow_tf32 = False
    facts = {"date": date.today().isoformat(), "rounds": options.rounds, **device_facts()}
    print(json.dumps(facts), flush=True)
    rows: list[Row] = []
    for name in options.cases or cases:
        for row in cases[name](options.rounds, options.scale):
            rows.append({"case": name, **row})
            print(table([rows[-1]], header=len(rows) == 1), flush=True)
        if options.out:  # after every case: a run that is cut keeps what it has
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({**facts, "results": rows}, indent=1) + "\n")
    return 0


def table(rows: list[Row], header: bool = True) -> str:
    lines = []
    if header:
        lines += ["| case | shape | what | ms | to the yardstick | extra memory, MiB | error |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        for name, found in row["contestants"].items():
            ms, ratio = found["ms"], found["ratio"]
            error = f"{found['error']:.1e}" if "error" in found else ""
            lines.append(
                f"| {row['case']} | {row['shape']} | {name} | {ms['median']:.2f} | "
                f"{ratio['median']:.2f} [{ratio['p10']:.2f}, {ratio['p90']:.2f}] | "
                f"{found['peak_bytes'] / 2**20:,.0f} | {error} |"
            )
        for name, reason in row.get("failed", {}).items():
            lines.append(f"| {row['case']} | {row['shape']} | {name} | failed: {reason} | | | |")
    return "\n".join(lines)


def head_case(
    shapes: list[tuple[int, int, int]],
    dtype: torch.dtype,
    contestants: Callable[[Numbers], Contestants],
    tolerance: float,
) -> Callable[[int, float], Any]:
    """A case over (N, H, V) shapes; its first contestant is the yardstick, the second the truth."""

    def run(rounds: int, scale: float) -> Any:
        for num_rows, width, vocabulary in shapes:
            if scale < 1:
                num_rows, vocabulary = max(16, int(num_rows * scale)), int(vocabulary * scale)
            numbers = Numbers(num_rows, width, vocabulary, dtype)
            entered, failed = without_failures(contestants(numbers))
            yardstick, truth = list(entered)[:2]
            differences = heads.agree(entered, truth, tolerance)
            found = race(entered, rounds, yardstick)
            for name in differences:
                gradient = entered[name]()
                if gradient.ndim == 3 and gradient.shape[0] == 1:
                    found[name]["error"] = heads.error_in_fp64(numbers, gradient)
            shape = f"N={num_rows} H={width} V={vocabulary}"
            yield {"shape": shape, "dtype": str(dtype), "contestants": found, "failed": failed}
            del numbers, entered
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return run


def frozen_head(numbers: Numbers) -> Contestants:
    """C1, G1, G7: CE + KL through a frozen head."""
    entered: Contestants = {
        "3 bare GEMMs": heads.gemms(numbers, logits=2, rows=1),
        "ours": heads.ours(numbers),
        "torch, whole logits": heads.naive(numbers),
    }
    return entered | distillation_peers(numbers)


def stage_one(numbers: Numbers) -> Contestants:
    """G2: two passes that share the teacher's logits."""
    return {
        "5 bare GEMMs": heads.gemms(numbers, logits=3, rows=2),
        "ours, one call": heads.ours(numbers, passes=2),
        "ours, two calls": heads.ours_twice(numbers),
    }


def trained_head(numbers: Numbers) -> Contestants:
    """G4: the student's CE with dW."""
    entered: Contestants = {
        "3 bare GEMMs": heads.gemms(numbers, logits=1, rows=1, weight=1),
        "ours": heads.student_ce(numbers),
        "torch, whole logits": heads.student_ce_torch(numbers),
    }
    return entered | ce_peers(numbers)


def alignment(sizes: list[tuple[int, int, int]], dtype: torch.dtype) -> Callable[[int, float], Any]:
    """G5: token_align; half of the rows are answers, the padded batch is half full."""

    def run(rounds: int, scale: float) -> Any:
        for num_answers, width, teacher_width in sizes:
            numbers = BodyNumbers(
                max(300, int(num_answers * scale)), 2 / 3, 0.5, width, teacher_width, dtype
            )
            found = race(align_cases(numbers), rounds, "two bare GEMMs")
            shape = f"A={len(numbers.teacher)} D={width} H={teacher_width}"
            yield {"shape": shape, "dtype": str(dtype), "contestants": found}

    return run


def recalibrators(
    num_answers: int, config: dict, teacher_width: int, dtype: torch.dtype, attention: str
) -> Callable[[int, float], Any]:
    """G6: 89 % of the rows are questions, as at the paper's sizes."""

    def run(rounds: int, scale: float) -> Any:
        for fill in (1.0, 0.6):
            numbers = BodyNumbers(
                max(300, int(num_answers * scale)), 0.89, fill, config["hidden_size"],
                teacher_width, dtype,
            )  # fmt: skip
            cases = recalibrator_cases(numbers, config, attention)
            found = race(cases, rounds, "transformers, padded")
            shape = f"P={len(numbers.layout.source_P)} fill={numbers.fill:.2f}"
            yield {"shape": shape, "dtype": str(dtype), "contestants": found}

    return run


def shapes(*rows: int) -> list[tuple[int, int, int]]:
    return [(n, width, vocabulary) for width, vocabulary in HEADS for n in rows]


BF16, FP32 = torch.bfloat16, torch.float32
GPU_CASES = {
    "G1": head_case(shapes(4096, 8192, 16384), BF16, frozen_head, 0.2),
    "G2": head_case(shapes(4096), BF16, stage_one, 0.2),
    "G4": head_case([(8192, 3584, 152064), (8192, 1536, 151936)], BF16, trained_head, 0.2),
    "G5": alignment([(4096, 3584, 8192), (8192, 3584, 8192), (8192, 1536, 3584)], BF16),
    "G6": recalibrators(1500, QWEN_7B, 8192, BF16, "varlen"),
    "G7": head_case(shapes(64, 150, 512, 1024), BF16, frozen_head, 0.2),
}
CPU_CASES = {
    "C1": head_case([(1024, 1024, 32768)], FP32, frozen_head, 1e-3),
    "C1b": head_case([(512, 1024, 32768)], FP32, stage_one, 1e-3),
    "C1c": head_case([(1024, 1024, 32768)], FP32, trained_head, 1e-3),
    "G5": alignment([(2400, 512, 1024)], FP32),
    "G6": recalibrators(600, TINY, 512, FP32, "sdpa"),
}


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(code)
