"""Run on every rank: a config that says tied, files with two tensors, loaded sharded.

ranks_untied.py FOLDER [FOLDER ...]
"""

import sys

import torch
from deepspeed import zero

from genrecal_ds import dist
from genrecal_ds.models.config_file import auto_class, read_config
from genrecal_ds.training import engine
from genrecal_ds.training.weights import DTYPES, load_vlm_sharded

IDS = torch.arange(3, 11)[None]


def check(folder: str, precision: str) -> None:
    vlm = load_vlm_sharded(folder, "student_zero3", precision).eval()
    assert not vlm.is_tied
    family = auto_class(read_config(folder))
    expected = family.from_pretrained(folder, dtype=DTYPES[precision]).eval()
    names = dict(vlm.model.named_parameters()).keys()
    assert names == dict(expected.named_parameters()).keys() | {"lm_head.weight"}
    with zero.GatheredParameters(list(vlm.parameters())), torch.no_grad():
        assert torch.equal(vlm.head.weight, expected.lm_head.weight)
        logits = [model(input_ids=IDS).logits for model in (vlm.model, expected)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def main() -> None:
    engine.start()
    for folder in sys.argv[1:]:
        for precision in ("fp32", "bf16"):
            check(folder, precision)
    dist.leave()


if __name__ == "__main__":
    main()
