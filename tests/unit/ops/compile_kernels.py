"""Compile every kernel, in every branch, to machine code for real GPUs; none has to be there.

A process of its own: Triton decides at import whether kernels are interpreted.
"""

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from genrecal_ds.ops.head_loss import kernels as head_loss
from genrecal_ds.ops.token_align import kernels as token_align

PER_ROW = dict.fromkeys(("lse", "teacher_lse", "label_logit", "kl", "row_weights"), "*fp32")
SIZES = dict(num_rows="i32", vocabulary="i32", scale="fp32", softcap="fp32", ignore="i32")
LABELS = dict.fromkeys(("labels", "top1", "teacher_top1"), "*i64")


def compile_for(capability: int, kernel, types: dict[str, str], constants: dict) -> None:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    assert {n for n, t in signature.items() if t == "constexpr"} == set(constants)
    compiled = triton.compile(
        ASTSource(kernel, signature, positions),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": head_loss.NUM_WARPS},
    )
    assert compiled.asm["cubin"]


def main() -> None:
    compiled = 0
    # The head's dtype changes two loads and a store: fp32 is compiled once, bf16 for every GPU.
    for capability, low in ((80, "fp32"), (80, "bf16"), (90, "bf16"), (100, "bf16")):
        for teacher, bias, cap in itertools.product((True, False), repeat=3):
            types = {**PER_ROW, **SIZES, **LABELS, "student": "*fp32", "teacher": "*fp32",
                     "bias": f"*{low}", "out": f"*{low}", "coefficients": "*fp32"}  # fmt: skip
            constants = dict(HAS_TEACHER=teacher, HAS_BIAS=bias, HAS_CAP=cap, BLOCK=head_loss.BLOCK)
            for kernel in (head_loss._row_statistics, head_loss._write_dlogits):
                compile_for(capability, kernel, types, constants)
                compiled += 1
        rows = dict.fromkeys(("student", "projected", "grad", "out"), f"*{low}")
        types = {**rows, "source": "*i32", "uses": "*i32", "width": "i32"}
        compile_for(capability, token_align._gather, types, dict(BLOCK=token_align.BLOCK))
        for uses in (1, 2):
            constants = dict(U=uses, BLOCK=token_align.BLOCK)
            compile_for(capability, token_align._sum_uses, types, constants)
        compiled += 3
    print(f"{compiled} kernels")


if __name__ == "__main__":
    main()
