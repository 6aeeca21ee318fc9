"""Computes the bytes on the wire and the seconds of one optimizer step on one GPU.

Within a phase, gathering runs beside computing, so a phase takes the longer of the two:

    step = ceil(m / k) max(teacher computes, teacher gathers)
         + m max(student computes, student gathers and reduces) + update

A step has m micro-batches, k of them in one forward of the teacher. An all-gather of b bytes over P
ranks brings each rank b (P - 1) / P bytes, through rings with a latency of P - 1 hops.
"""

from typing import NamedTuple

from genrecal_ds.estimate import flops
from genrecal_ds.estimate.memory import Load
from genrecal_ds.planner.facts import Gpu

HOP_SECONDS = 3e-6  # a guess: of one step of a ring
HOST_MEMORY_GBS = 200.0  # a guess: of one host, for optimizer states that lie there


class Machine(NamedTuple):
    gpu: Gpu
    mfu: float  # part of the nominal rate that matrix products reach

    @property
    def rate(self) -> float:
        return self.gpu.tflops * 1e12 * self.mfu


class Wire(NamedTuple):
    """Bytes that one rank receives: teacher's per forward, student's per micro-batch."""

    teacher: int
    student: int
    reduced: int


class Step(NamedTuple):
    """Seconds of an optimizer step, by what they are spent on; `whole` is the whole step's."""

    teacher: float
    teacher_gathers: float
    student: float
    student_gathers: float
    update: float
    whole: float

    @property
    def limit(self) -> str:
        """Name what the largest part of the step waits for."""
        parts = {
            "the teacher computes": self.teacher,
            "gathering the teacher": self.teacher_gathers,
            "the student computes": self.student,
            "gathering and reducing the student": self.student_gathers,
            "the update": self.update,
        }
        return max(parts, key=lambda name: parts[name])


def micro_steps(load: Load, global_batch: int) -> int:
    """Micro-steps of a rank in one step; 0 where the batch does not divide."""
    whole, rest = divmod(global_batch, load.micro_batch * load.gpus)
    return 0 if rest else whole


def received(whole: int, ranks: int) -> int:
    """Bytes that each rank receives in an all-gather or reduce-scatter of so many bytes."""
    return whole * (ranks - 1) // ranks


def teacher_ranks(load: Load) -> int:
    return min(load.per_host, load.gpus) if load.placement == "zero3_host" else load.gpus


def wire(load: Load) -> Wire:
    w, teacher = load.width, 0
    if load.teacher is not None and load.is_teacher_sharded:
        teacher = received(w * (load.teacher.body - load.teacher.small), teacher_ranks(load))
    student = received(w * _student_gathered(load), load.gpus)
    return Wire(teacher, student, received(4 * load.trained, load.gpus))


def _student_gathered(load: Load) -> int:
    """Parameters, as often as they are gathered: forward and backward of what trains, or of what
    a gradient goes through. Checkpointed blocks are still there when backward comes to them."""
    body = load.student.total - load.student.small
    return (2 if load.trains_student else 1) * body + 2 * load.recalibrator


def step_seconds(
    load: Load, sample: flops.SampleTokens, machine: Machine, global_batch: int
) -> Step:
    """Seconds of one step, for a batch that divides: see micro_steps."""
    gpu, count = machine.gpu, micro_steps(load, global_batch)
    assert count, "asked for only where the batch divides"
    moved, counted = wire(load), flops.of_stage(load, sample)
    forwards = -(-count // load.teacher_batches)
    samples = count * load.micro_batch
    teacher = samples * counted["teacher"] / machine.rate
    student = samples * (sum(counted.values()) - counted["teacher"]) / machine.rate
    gathers, tensors = 0.0, load.teacher.tensors if load.teacher else 0
    if moved.teacher:
        gathers = forwards * _seconds(moved.teacher, teacher_ranks(load), tensors, load, gpu)
        if load.teacher_zero and load.teacher_zero.weights_on_host:
            gathers += forwards * load.width * load.teacher_share / (gpu.host_link * 1e9)
    tensors = (2 if load.trains_student else 1) * load.student.tensors
    over = _seconds(moved.student + moved.reduced, load.gpus, tensors, load, gpu)
    own = load.width * load.share(load.student.total) if load.student_zero.weights_on_host else 0
    over += own / (gpu.host_link * 1e9)
    update = _update(load, gpu)
    whole = max(teacher, gathers) + max(student, count * over) + update
    return Step(teacher, gathers, student, count * over, update, whole)


def _seconds(moved: int, ranks: int, tensors: int, load: Load, gpu: Gpu) -> float:
    """Seconds of a transfer. A host's GPUs share its network and the bytes that come in."""
    if ranks < 2:
        return 0.0
    bandwidth = gpu.link if ranks <= load.per_host else min(gpu.link, gpu.net)
    return moved / (bandwidth * 1e9) + tensors * (ranks - 1) * HOP_SECONDS


def _update(load: Load, gpu: Gpu) -> float:
    """Seconds of AdamW: it reads and writes gradient, moments, weights, 2 * 16 bytes a number."""
    own = 32 * load.share(load.trained)
    if load.student_zero.states_on_host:
        return own / (HOST_MEMORY_GBS * 1e9 / min(load.per_host, load.gpus))
    return own / (gpu.memory_gbs * 1e9)
