"""Tokens per second of a body on a micro-batch: samples padded to the longest, or as one sequence.

    python -m benchmarks.packing [--rounds 9] [--out FILE]

Forward (a teacher) and forward with backward (a student), by family and by how full a padded
batch is. On CUDA in bf16, also with flash attention where it is installed.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from benchmarks.race import Contestants, device_facts, race
from genrecal_ds.models.config_file import auto_class
from genrecal_ds.models.vlm import VLM

ON_CUDA = torch.cuda.is_available()
WIDTH, LAYERS = (2048, 8) if ON_CUDA else (256, 4)
BATCH, LONGEST = (16, 2048) if ON_CUDA else (8, 384)
TEXT = dict(
    hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
    num_attention_heads=WIDTH // 64, num_key_value_heads=WIDTH // 128, vocab_size=1000,
    pad_token_id=0,
)  # fmt: skip


def model_of(family: str, attention: str) -> PreTrainedModel:
    if family == "qwen2_vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 8, 8]}
        vision = dict(embed_dim=64, hidden_size=WIDTH, depth=1, num_heads=4)
        config = AutoConfig.for_model(
            family, text_config={**TEXT, "rope_parameters": rope}, vision_config=vision
        )
    else:
        config = AutoConfig.for_model(family, **TEXT)
    dtype = torch.bfloat16 if ON_CUDA else torch.float32
    model = auto_class(config).from_config(config, dtype=dtype, attn_implementation=attention)
    return model.cuda() if ON_CUDA else model


def batch_of(fill: float) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """One sample of full length, the others so short that this share of the batch is real."""
    device = "cuda" if ON_CUDA else "cpu"
    shorter = round((fill * BATCH - 1) / (BATCH - 1) * LONGEST)
    lengths = torch.tensor([LONGEST] + [shorter] * (BATCH - 1))
    mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    ids = torch.randint(1, 900, (BATCH, LONGEST))
    real = mask.flatten().nonzero().squeeze(-1)
    return ids.to(device), mask.to(device), {}, real.to(device)


def bodies(family: str, fill: float, trains: bool) -> tuple[Contestants, int]:
    """(contestants, real tokens)."""
    inputs = batch_of(fill)

    def run(vlm: VLM) -> Callable[[], None]:
        def call() -> None:
            with torch.set_grad_enabled(trains):
                hidden = vlm.body(*inputs)
                if trains:
                    hidden.flatten(0, 1)[inputs[3]].square().mean().backward()
                    vlm.zero_grad(set_to_none=True)

        return call

    entered = {
        "padded": run(VLM(model_of(family, "sdpa"))),
        "packed": run(VLM(model_of(family, "sdpa"), pack=True)),
        "packed, block mask": run(VLM(model_of(family, "sdpa"), True, "sdpa")),
    }
    if ON_CUDA and importlib.util.find_spec("flash_attn"):
        flash = "flash_attention_2"
        entered["packed, flash"] = run(VLM(model_of(family, flash), True, flash))
    return entered, len(inputs[3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    facts = {"date": date.today().isoformat(), "rounds": options.rounds, **device_facts()}
    rows = []
    print("| family | pass | fill | body | tokens/s | to padded |")
    print("|---|---|---|---|---|---|")
    for family in ("llama", "qwen2_vl"):
        for trains in (False, True):
            for fill in (1.0, 0.7, 0.4):
                contestants, tokens = bodies(family, fill, trains)
                found = race(contestants, options.rounds, "padded")
                what = "forward, backward" if trains else "forward"
                rows.append(
                    {"family": family, "pass": what, "fill": fill, "tokens": tokens,
                     "contestants": found}
                )  # fmt: skip
                for name, value in found.items():
                    speed, ratio = (
                        tokens / value["ms"]["median"] * 1e3,
                        1 / value["ratio"]["median"],
                    )
                    print(
                        f"| {family} | {what} | {fill} | {name} | {speed:,.0f} | {ratio:.2f} |",
                        flush=True,
                    )
    if options.out:
        options.out.write_text(json.dumps({**facts, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
