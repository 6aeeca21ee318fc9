"""Computes how much memory a stage needs on a GPU and on a host. Imports no torch.

Each part has one formula, written beside its number: `n` is a number of parameters, `w` the bytes
of a weight (2 in bf16, 4 in fp32). Parts that never exist together belong to different phases:

    peak = what is always there + the largest of the phases teacher, student, update

No GPU has confirmed the formulas yet. NOT_COUNTED says what they leave out.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from genrecal_ds.recipe.config import Placement
from genrecal_ds.recipe.kinds import Kind

GIB = 2**30
NOT_COUNTED = (
    "sequences count as max_length long; a vision encoder's activations, attention that keeps its "
    "matrix (eager) and fragmentation do not count"
)
HEAD_CHUNK_BYTES, HEAD_CHUNK_ROWS = 1_600_000_000, 128  # ops/head_loss/chunked.py, on CUDA
CONTEXT_BYTES = 2 * GIB  # CUDA's context, its libraries' workspaces and NCCL's buffers: a guess
PROCESS_BYTES = 2 * GIB  # Python, torch and transformers in a rank's host memory: a guess
PHASES = ("teacher", "student", "update")


class Decoder(NamedTuple):
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int


class Model(NamedTuple):
    """The sizes that a model's memory depends on, in parameters; a tied head counts once."""

    decoder: Decoder
    vocab: int
    total: int
    gathered: int  # the largest module that computes with weights of its own
    small: int  # tensors that ZeRO-3 keeps whole on every rank
    matrices: int  # the decoder's linear layers
    largest_matrix: int  # the largest linear layer of the decoder
    largest_tensor: int
    body: int  # everything but an untied head
    tensors: int  # number of tensors that ZeRO-3 shards
    vision: int = 0  # parameters of the vision encoder
    patches: int = 1  # patches of one visual token


class Zero(NamedTuple):
    """The settings of a file of ds_configs/ that decide memory; sizes in parameters."""

    live: int
    reduce: int
    sub_group: int
    keeps_whole: int
    weights_on_host: bool
    states_on_host: bool

    @classmethod
    def of(cls, ds_config: dict[str, Any]) -> "Zero":
        """Read a file's settings; DeepSpeed's defaults stand for those that the file leaves out."""
        zero = ds_config.get("zero_optimization", {})
        return cls(
            live=int(zero.get("stage3_max_live_parameters", 1e9)),
            reduce=int(zero.get("reduce_bucket_size", 5e8)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            keeps_whole=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            weights_on_host=_is_on_host(zero, "offload_param"),
            states_on_host=_is_on_host(zero, "offload_optimizer"),
        )


def _is_on_host(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


@dataclass(frozen=True)
class Load:
    """One stage on one rank. Without a teacher there is no Recalibrator and no distance."""

    gpus: int
    per_host: int
    width: int  # bytes of a weight
    micro_batch: int
    student: Model
    student_zero: Zero
    student_tokens: int  # of one sample at most
    kind: Kind
    trained: int  # parameters, the Recalibrator's included
    trains_student: bool  # else the student's body runs without a graph
    trains_head: bool = False
    ce_trains: bool = True  # else the student's cross entropy is only measured
    checkpointing: bool = False
    teacher: Model | None = None
    teacher_zero: Zero | None = None
    teacher_tokens: int = 0
    placement: Placement | Literal["cache"] = "zero3"
    teacher_batches: int = 1  # micro-batches of one forward of the teacher
    recalibrator: int = 0  # parameters of the Recalibrator, or of a kind's projection
    depth: int = 0
    packed_recalibrator: bool = True  # the blocks are ours (models/packed_blocks.py)
    has_regular: bool = False

    def share(self, numbers: int) -> int:
        """Return a rank's part of a flat tensor; the last rank's part is padded."""
        return -(-numbers // self.gpus)

    @property
    def is_teacher_sharded(self) -> bool:
        return self.placement.startswith("zero3")

    @property
    def teacher_share(self) -> int:
        """Return a rank's parameters of a sharded teacher."""
        assert self.teacher is not None
        ranks = min(self.per_host, self.gpus) if self.placement == "zero3_host" else self.gpus
        return -(-self.teacher.total // ranks)

    @property
    def passes(self) -> int:
        """Count the Recalibrator's passes; a projection counts as one pass."""
        return 1 + self.has_regular

    @property
    def loss_rows(self) -> int:
        return self.micro_batch * min(self.student_tokens, self.teacher_tokens or 1 << 60)


class Part(NamedTuple):
    name: str
    bytes: int
    formula: str
    phase: str = "always"
    place: Literal["gpu", "host"] = "gpu"
    fix: str = "more GPUs"


@dataclass(frozen=True)
class Estimate:
    """The memory of one rank, by parts. Sums are bytes."""

    parts: tuple[Part, ...] = field(default_factory=tuple)

    def phase(self, name: str) -> int:
        return sum(p.bytes for p in self.parts if p.place == "gpu" and p.phase == name)

    @property
    def gpu(self) -> int:
        return self.phase("always") + max(self.phase(name) for name in PHASES)

    def host(self, ranks: int) -> int:
        """Return the host memory of a machine with so many ranks."""
        return ranks * sum(part.bytes for part in self.parts if part.place == "host")

    def largest(self, place: str) -> Part:
        """Return the largest part of the peak: what to change first if the whole does not fit."""
        peak = max(PHASES, key=self.phase)
        counted = [p for p in self.parts if p.place == place and p.bytes]
        return max((p for p in counted if p.phase in ("always", peak)), key=lambda p: p.bytes)


def estimate(load: Load) -> Estimate:
    """List every part of a rank's memory."""
    parts = _student(load)
    if load.teacher is not None:
        parts += [*_teacher(load, load.teacher), _frozen_head(load, load.teacher)]
    parts += [*_activations(load), _loss_chunk(load)]
    parts += [Part("CUDA and NCCL", CONTEXT_BYTES, "2 GiB, a guess"), *_host(load)]
    return Estimate(tuple(part for part in parts if part.bytes))


def _student(load: Load) -> list[Part]:
    """List ZeRO-3 with AdamW: a rank holds 1 / gpus of weights, gradient sums and states."""
    zero, model = load.student_zero, load.student
    weights = load.width * load.share(model.total + load.recalibrator)
    trained = load.share(load.trained)
    sums = "host" if zero.states_on_host else "gpu"
    offload = "more GPUs, student.lora, or deepspeed.student=student_zero3_offload"
    whole = gathered(model, zero)
    # A gradient leaves backward whole. In the bucket it waits in w, and as the fp32 that is sent.
    reduced = load.width * min(model.gathered, load.trained) + (load.width + 4) * zero.reduce
    update = 0 if zero.states_on_host else 4 * min(trained, zero.sub_group)
    # DeepSpeed updates fp32 weights in place. It keeps a copy of offloaded and of bf16 weights.
    master = 0 if load.width == 4 and not zero.states_on_host else 4
    return [
        Part("student, Recalibrator: weights", weights, "w n / gpus",
             place="host" if zero.weights_on_host else "gpu", fix=offload),
        Part("student: small tensors whole", load.width * model.small, "w n, n <= threshold"),
        Part("gradient sums", 4 * trained, "4 n_trained / gpus", place=sums, fix=offload),
        Part("AdamW states", (8 + master) * trained,
             f"({master} + 4 + 4) n_trained / gpus: fp32 copy, both moments",
             place=sums, fix=offload),
        Part("student: gathered weights", load.width * whole,
             "w (max_live_parameters + largest module), <= w n", "student",
             fix="a smaller stage3_max_live_parameters in deepspeed.student"),
        Part("gradients being reduced", reduced, "w largest module + (w + 4) bucket", "student",
             fix="a smaller reduce_bucket_size in deepspeed.student"),
        Part("gradients being applied", update, "4 min(n_trained / gpus, sub_group_size)",
             "update", fix="a smaller sub_group_size in deepspeed.student"),
    ]  # fmt: skip


def gathered(model: Model, zero: Zero) -> int:
    """Count the parameters that are whole on a rank at once.

    Every module that is entered fetches ahead, even a module without weights. Prefetching thus
    reaches max_live_parameters for any bucket size; then the module's own parameters come in.
    """
    return min(model.body, model.gathered + zero.live)


def _teacher(load: Load, model: Model) -> list[Part]:
    """List a frozen model: no gradient, no state. replica_int8 has the matrices in 8 bits."""
    w, zero = load.width, load.teacher_zero
    if load.placement == "cache":
        return []
    if load.is_teacher_sharded:
        assert zero is not None
        over, fix = "gpus", "more GPUs, or teacher.placement=zero3_offload"
        if load.placement == "zero3_host":
            over, fix = "gpus of a host", "teacher.placement=zero3 or zero3_offload"
        return [
            Part("teacher: weights", w * load.teacher_share, f"w n / {over}",
                 place="host" if zero.weights_on_host else "gpu", fix=fix),
            Part("teacher: small tensors whole", w * model.small, "w n, n <= threshold"),
            Part("teacher: gathered weights", w * gathered(model, zero),
                 "w (max_live_parameters + largest module), <= w n", "teacher",
                 fix="a smaller stage3_max_live_parameters in deepspeed.teacher"),
        ]  # fmt: skip
    if load.placement == "replica":
        fix = "teacher.placement=replica_int8 or zero3"
        return [Part("teacher: weights", w * model.total, "w n, a whole replica", fix=fix)]
    rest = model.total - model.matrices
    return [
        Part("teacher: weights", model.matrices + w * rest, "n_matrices + w n_others, 8 bits",
             fix="teacher.placement=zero3"),
        Part("teacher: widened matrix", w * model.largest_matrix, "w largest matrix", "teacher"),
    ]  # fmt: skip


def _frozen_head(load: Load, model: Model) -> Part:
    return Part("teacher's head", load.width * model.vocab * model.decoder.hidden, "w V H")


def block_bytes(decoder: Decoder, width: int) -> int:
    """Return the bytes that one block keeps of one token for backward.

    Each of two norms keeps its input in fp32, that input rounded, and its output. Attention keeps
    q, k, v and its output, all as wide as the queries, in two layouts: by row and by sample. The
    gated MLP keeps gate, act(gate), up and their product:

        2 (4 h + 2 w h) + 8 w h_q + 4 w i
    """
    h, q = decoder.hidden, decoder.heads * decoder.head_dim
    return 2 * (4 * h + 2 * width * h) + 8 * width * q + 4 * width * decoder.intermediate


def forward_bytes(decoder: Decoder, width: int) -> int:
    """Return one block's bytes of one token without a graph: residual, norm, 3 MLP tensors."""
    return width * (2 * decoder.hidden + 3 * decoder.intermediate)


def _activations(load: Load) -> list[Part]:
    """List tokens times what a token keeps: all blocks; checkpointed, w h per block and a block."""
    w, student = load.width, load.student.decoder
    tokens = load.micro_batch * load.student_tokens
    fix = "student.gradient_checkpointing=true, or a smaller batch.micro_batch"
    kept, formula = student.layers * block_bytes(student, w), "tokens layers block"
    if load.checkpointing:
        kept = student.layers * w * student.hidden + block_bytes(student, w)
        formula, fix = "tokens (layers w h + block)", "a smaller batch.micro_batch or max_length"
    if not load.trains_student:
        kept, formula = forward_bytes(student, w), "tokens w (2 h + 3 i), no graph"
    parts = [Part("student: activations", tokens * kept, formula, "student", fix=fix)]
    if load.teacher is None:
        return parts
    teacher, smaller = load.teacher.decoder, "a smaller batch.micro_batch or max_length"
    read = load.teacher_batches * load.micro_batch * load.teacher_tokens
    rows = 2 * read * w * teacher.hidden
    forward = 0 if load.placement == "cache" else read * forward_bytes(teacher, w)
    parts += [
        Part("teacher: activations", forward,
             "tokens w (2 h + 3 i), no graph", "teacher", fix=smaller),
        Part("teacher's rows", rows, "2 tokens w H", "student", fix=smaller),
    ]  # fmt: skip
    if load.kind.projects:
        kept = 3 * load.loss_rows * w * teacher.hidden
        formula = "3 rows w H: theirs, the teacher's beside them, their gradient"
        parts.append(Part("projected rows", kept, formula, "student", fix=smaller))
    if not load.depth:
        return parts
    # The mixed pass has the student's questions, the regular pass the teacher's.
    mixed = max(load.student_tokens, load.teacher_tokens)
    packed = load.micro_batch * (mixed + load.has_regular * load.teacher_tokens)
    kept = load.depth * block_bytes(student, w) + (4 + 2 * w) * teacher.hidden
    return [
        *parts,
        Part("Recalibrator: activations", packed * kept,
             "tokens of all passes (depth block + (4 + 2 w) H)", "student", fix=smaller),
    ]  # fmt: skip


def _loss_chunk(load: Load) -> Part:
    """Return the largest chunk of any term, and dW once for each term of a student's head that
    trains."""
    low = load.width * (load.width < 4)
    student, rows = load.student.vocab, load.loss_rows
    chunks = {"no loss of a head": 0}
    if load.kind.trains_student:
        chunks["rows V (4 + w), <= 1.6 GB or 128 rows"] = _chunk_bytes(rows, student * (4 + low))
    if load.kind.has_distance_at_own_head:
        assert load.teacher is not None
        per_row = 4 * load.kind.head_matrices * max(student, load.teacher.vocab)
        if load.kind.takes_whole_conversations:
            chunks["one conversation's rows V 4 matrices"] = rows // load.micro_batch * per_row
        else:
            chunks["rows V 4 matrices, <= 1.6 GB or 128 rows"] = _chunk_bytes(rows, per_row)
    elif load.teacher is not None:
        columns, passes = load.teacher.vocab, load.passes
        formula = "rows V (4 (passes + 1) + w passes), <= 1.6 GB or 128 rows"
        chunks[formula] = _chunk_bytes(rows, columns * (4 * (passes + 1) + low * passes))
    largest = max(chunks, key=lambda formula: chunks[formula])
    terms = load.kind.trains_student * load.ce_trains + load.kind.has_distance_at_own_head
    gradient = 4 * student * load.student.decoder.hidden * load.trains_head * terms
    formula = f"{largest}; dW 4 V D a term"
    return Part("loss: logits of a chunk", chunks[largest] + gradient, formula, "student")


def _chunk_bytes(rows: int, per_row: int) -> int:
    most = HEAD_CHUNK_BYTES // per_row // HEAD_CHUNK_ROWS * HEAD_CHUNK_ROWS
    return min(rows, max(HEAD_CHUNK_ROWS, most)) * per_row


def _host(load: Load) -> list[Part]:
    """List what loading needs: a rank's share of each model, and one tensor of a file at a time."""
    w = load.width
    offloaded = load.student_zero.weights_on_host  # then the share is counted as weights
    share = 0 if offloaded else w * load.share(load.student.total + load.recalibrator)
    tensor = load.student.largest_tensor
    if load.teacher is not None:
        tensor = max(tensor, load.teacher.largest_tensor)
        zero = load.teacher_zero
        if load.is_teacher_sharded and not (zero and zero.weights_on_host):
            share += w * load.teacher_share
    return [
        Part("loading: share and one tensor", share + w * tensor, "w (n / gpus + largest tensor)",
             place="host"),
        Part("process", PROCESS_BYTES, "2 GiB, a guess", place="host"),
    ]  # fmt: skip
