"""The memory formulas against numbers worked out by hand, for the paper's largest pair.

Teacher Qwen2-VL-72B, student Qwen2-VL-7B (their language models), 128 GPUs, bf16, 2048 tokens.
A block holds q, k, v with biases, o, three MLP matrices and two norms:

    72B   67,117,056 + 2 * 8,389,632 + 67,108,864 + 726,663,168 + 16,384 =    877,684,736
    7B    12,848,640 + 2 * 1,835,520 + 12,845,056 + 203,685,888 +  7,168 =    233,057,792
    72B   80 blocks + embedding and head 2 * 1,245,708,288 + norm 8,192  = 72,706,203,648
    7B    28 blocks + embedding and head 2 *   544,997,376 + norm 3,584  =  7,615,616,512
"""

import subprocess
import sys
from dataclasses import replace

import pytest

from genrecal_ds.estimate.memory import (
    GIB,
    HEAD_CHUNK_BYTES,
    HEAD_CHUNK_ROWS,
    Decoder,
    Load,
    Model,
    Zero,
    block_bytes,
    estimate,
    gathered,
)
from genrecal_ds.recipe.kinds import KINDS
from genrecal_ds.recipe.recipe_file import load_ds_config

pytestmark = pytest.mark.unit

BIG = Model(
    Decoder(layers=80, hidden=8192, intermediate=29568, heads=64, kv_heads=8, head_dim=128),
    vocab=152064,
    total=72_706_203_648,
    gathered=1_245_708_288,  # the embedding; an MLP matrix has 242,221,056
    small=2_138_112,  # 80 (8,192 + 2 * 1,024 + 16,384) + 8,192
    matrices=70_212_648_960,  # 80 (877,684,736 - 26,624)
    largest_matrix=242_221_056,
    largest_tensor=1_245_708_288,
    body=71_460_495_360,
    tensors=562,
)
SMALL = Model(
    Decoder(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, head_dim=128),
    vocab=152064,
    total=7_615_616_512,
    gathered=544_997_376,
    small=333_312,  # 28 (3,584 + 2 * 512 + 7,168) + 3,584 = 333,312
    matrices=6_525_288_448,  # 28 (233,057,792 - 11,776)
    largest_matrix=67_895_296,
    largest_tensor=544_997_376,
    body=7_070_619_136,
    tensors=198,
)
# two blocks of the student, 3,584 x 8,192 before and behind them, a norm of 8,192
RECALIBRATOR = 2 * 233_057_792 + 2 * 29_360_128 + 8_192
LAYERS = 28 * 233_057_792 + 3_584  # what distill trains of the student, its norm included


def load(**changes) -> Load:
    facts = {
        "gpus": 128, "per_host": 8, "width": 2, "micro_batch": 1, "kind": KINDS["distill"],
        "student": SMALL, "student_tokens": 2048,
        "student_zero": Zero.of(load_ds_config("student_zero3")),
        "trained": LAYERS + RECALIBRATOR, "trains_student": True,
        "teacher": BIG, "teacher_zero": Zero.of(load_ds_config("teacher_zero3")),
        "teacher_tokens": 2048, "recalibrator": RECALIBRATOR, "depth": 2,
    }  # fmt: skip
    return Load(**{**facts, **changes})


def parts(**changes) -> dict[str, int]:
    return {part.name: part.bytes for part in estimate(load(**changes)).parts}


def test_zero3_shares():
    found = parts()
    assert RECALIBRATOR == 524_844_032 and LAYERS + RECALIBRATOR == 7_050_465_792
    assert found["teacher: weights"] == 2 * 568_017_216  # 72,706,203,648 / 128
    assert found["student, Recalibrator: weights"] == 2 * 63_597_348  # 8,140,460,544 / 128
    assert found["gradient sums"] == 4 * 55_081_764  # 7,050,465,792 / 128
    assert found["AdamW states"] == 12 * 55_081_764
    assert found["gradients being applied"] == 4 * 50_000_000  # a sub-group of the file
    assert found["teacher: small tensors whole"] == 4_276_224


def test_states_of_fp32():
    assert parts(width=4)["AdamW states"] == 8 * 55_081_764  # no copy of weights that are fp32
    offload = Zero.of(load_ds_config("student_zero3_offload"))
    assert parts(width=4, student_zero=offload)["AdamW states"] == 12 * 55_081_764


def test_gathered_weights_and_reduced_gradients():
    found = parts()
    # both files let 1e9 live at once
    assert found["teacher: gathered weights"] == 2 * (1_245_708_288 + 1_000_000_000)
    assert found["student: gathered weights"] == 2 * (544_997_376 + 1_000_000_000)
    assert found["gradients being reduced"] == 2 * 544_997_376 + 6 * 50_000_000
    tiny = SMALL._replace(body=600_000_000)
    assert gathered(tiny, load().student_zero) == 600_000_000  # never more than there is


def test_placements_of_the_teacher():
    assert parts(placement="replica")["teacher: weights"] == 145_412_407_296
    eight = parts(placement="replica_int8")
    assert eight["teacher: weights"] == 70_212_648_960 + 2 * 2_493_554_688
    assert eight["teacher: widened matrix"] == 484_442_112
    assert "teacher: gathered weights" not in eight


def test_the_frozen_head():
    assert parts()["teacher's head"] == 2_491_416_576  # 2 * 152,064 * 8,192


def test_a_chunk_of_logits():
    # one pass: 152,064 (4 * 2 + 2) bytes a row, 1,024 rows; two: 152,064 (4 * 3 + 4), 640 rows
    assert parts()["loss: logits of a chunk"] == 1024 * 1_520_640
    regular = parts(kind=KINDS["align"], has_regular=True)
    assert regular["loss: logits of a chunk"] == 640 * 2_433_024
    # through the student's head alone: 152,064 (4 + 2), 1,664 of 2,048 rows, and dW
    own = {"recalibrator": 0, "depth": 0, "trains_head": True}
    alone = parts(**own, kind=KINDS["sft"], teacher=None, teacher_tokens=0)
    assert alone["loss: logits of a chunk"] == 1664 * 912_384 + 4 * 544_997_376
    # a distance at the student's head: 16 fp32 matrices of 128 rows; labels and it have a dW each
    own |= {"kind": replace(KINDS["uld"], head_matrices=16), "student_tokens": 128}
    both = parts(**own)
    assert both["loss: logits of a chunk"] == 128 * 64 * 152_064 + 2 * 4 * 544_997_376
    own["ce_trains"] = False
    one = 4 * 544_997_376
    assert parts(**own)["loss: logits of a chunk"] == 128 * 64 * 152_064 + one
    eight = parts(**own | {"kind": replace(KINDS["uld"], head_matrices=8)})
    assert eight["loss: logits of a chunk"] == 128 * 32 * 152_064 + one
    # by conversations no budget holds
    own |= {"kind": replace(KINDS["mot"], head_matrices=7), "student_tokens": 2048}
    whole = parts(**own, micro_batch=4)
    assert whole["loss: logits of a chunk"] == 2048 * 28 * 152_064 + one


def test_a_baseline_has_no_recalibrator():
    found = parts(kind=KINDS["dskd"], recalibrator=8192 * 3584, depth=0)
    assert "Recalibrator: activations" not in found
    assert found["projected rows"] == 3 * 2048 * 2 * 8192
    assert found["teacher's rows"] == parts()["teacher's rows"]


def test_the_chunk_is_that_of_the_loss():
    from genrecal_ds.ops.head_loss import chunked

    expected = (chunked.CHUNK_BYTES["cuda"], chunked.CHUNK_MULTIPLE["cuda"])
    assert (HEAD_CHUNK_BYTES, HEAD_CHUNK_ROWS) == expected


def test_activations():
    # 2 (4 + 4) h + 16 h + 8 * 18,944, h = h_q = 3,584
    assert block_bytes(SMALL.decoder, 2) == 57_344 + 57_344 + 151_552 == 266_240
    assert parts()["student: activations"] == 2048 * 28 * 266_240 == 15_267_266_560
    checkpointed = parts(checkpointing=True)["student: activations"]
    assert checkpointed == 2048 * (28 * 7_168 + 266_240) == 956_301_312
    assert parts(trains_student=False)["student: activations"] == 2048 * 2 * 64_000
    assert parts()["teacher: activations"] == 2048 * 2 * (2 * 8192 + 3 * 29568)
    assert parts()["Recalibrator: activations"] == 2048 * (2 * 266_240 + 8 * 8192)
    assert parts()["teacher's rows"] == 2 * 2048 * 2 * 8192


def test_the_peak_is_what_stays_and_the_largest_phase():
    found = estimate(load())
    student = (
        3_089_994_752 + 1_389_994_752 + 15_267_266_560 + 67_108_864 + 1_224_736_768
        + 1_557_135_360
    )  # fmt: skip
    always = (
        1_136_034_432 + 4_276_224 + 127_194_696 + 666_624 + 220_327_056 + 660_981_168
        + 2_491_416_576 + 2 * GIB
    )  # fmt: skip
    assert found.gpu == always + student
    assert found.largest("gpu").name == "student: activations"


def test_offload_moves_to_the_host():
    zero = Zero.of(load_ds_config("student_zero3_offload"))
    there, here = estimate(load(student_zero=zero)), estimate(load())
    moved = 2 * 63_597_348 + (4 + 12 + 0) * 55_081_764
    assert here.phase("always") - there.phase("always") == moved
    states = 16 * 55_081_764  # the weights' share was there already, while loading
    assert there.host(8) - here.host(8) == 8 * states


def test_a_host_while_loading():
    # a share of both models and the Recalibrator, and the largest tensor once
    rank = 2 * (568_017_216 + 63_597_348) + 2 * 1_245_708_288 + 2 * GIB
    assert estimate(load()).host(8) == 8 * rank


def test_imports_no_torch():
    program = "import sys, genrecal_ds.estimate.memory; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_a_teacher_in_a_cache_costs_its_head_and_rows_only():
    live, cached, twice = parts(), parts(placement="cache"), parts(teacher_batches=2)
    assert live.keys() - cached.keys() == {
        "teacher: weights", "teacher: small tensors whole", "teacher: gathered weights",
        "teacher: activations",
    }  # fmt: skip
    for name in ("teacher: activations", "teacher's rows"):
        assert twice[name] == 2 * live[name]
