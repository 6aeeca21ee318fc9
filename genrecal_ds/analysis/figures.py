"""Draws the paper's figures 6, 7 and 9 as PNG files; other files compute the numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SIDES = (("student", "#1f6feb"), ("teacher", "#d1242f"))
# Of figure 9: the metric in a stage's log, and what it is called there.
CURVES = {
    "align": {"ar": "mixed", "regular_ar": "regular"},
    "distill": {"ar": "mixed", "student_ce": "student's own"},
}


def _figure(columns: int, rows: int = 1, size: tuple[float, float] = (4.2, 3.4)):
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def loss_curves(
    logs: Mapping[str, Sequence[Mapping[str, Any]]], own: Mapping[str, float], out: Path
) -> None:
    """Draw figure 9. logs: {stage: its metrics.jsonl}; own: each model's CE before training."""
    stages = [stage for stage in CURVES if logs.get(stage)]
    figure, axes = _figure(len(stages))
    for axis, stage in zip(axes[0], stages, strict=True):
        for metric, label in CURVES[stage].items():
            points = [
                (record["step"], record["metrics"][metric])
                for record in logs[stage]
                if metric in record["metrics"]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, linewidth=1)
        for (side, color), style in zip(SIDES, ("--", ":"), strict=True):
            axis.axhline(own[side], color=color, linestyle=style, label=f"{side}'s own, before")
        axis.set(title=stage, xlabel="step", ylabel="CE [nats per token]", ylim=(0, None))
        axis.legend(fontsize=7)
    figure.savefig(out, dpi=130)


def cosine_matrices(cosines: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Draw figure 7. cosines: {title: what probes.cosines returns}."""
    figure, axes = _figure(len(cosines))
    for axis, (title, cosine) in zip(axes[0], cosines.items(), strict=True):
        image = axis.imshow(cosine["matrix"], vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(
            title=f"{title}\ndiagonal {cosine['diagonal']:.2f}, off {cosine['off_diagonal']:.2f}",
            xlabel="teacher side (regular)", ylabel="student side (mixed)",
        )  # fmt: skip
    figure.colorbar(image, ax=axes[0].tolist(), label="cosine")
    figure.savefig(out, dpi=130)


def embeddings(panels: Mapping[str, tuple[np.ndarray, np.ndarray]], out: Path) -> None:
    """Draw figure 6. panels: {title: (student's [n, 2], teacher's [n, 2])}, two in a row."""
    figure, axes = _figure(2, -(-len(panels) // 2))
    for axis, (title, points) in zip(axes.flat, panels.items(), strict=True):
        for (side, color), flat in zip(SIDES, points, strict=True):
            axis.scatter(*flat.T, s=8, c=color, label=side, alpha=0.7)
        axis.set(title=title, xticks=[], yticks=[])
        axis.legend(fontsize=7)
    figure.savefig(out, dpi=130)
