"""Runs two DeepSpeed ZeRO-3 engines in one process: one student that trains, one frozen teacher.

    build_sharded / load_sharded    models that never exist whole on any rank
    StudentEngine                   ONE trainable module with an optimizer
    TeacherEngine                   a frozen body, no optimizer, called under no_grad only

Facts that this file relies on were measured with DeepSpeed 0.19; each is stated where it is used.
"""

import gc
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

if not torch.cuda.is_available():  # stated: if DeepSpeed guesses, every rank prints a warning
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
import torch.distributed as torch_dist
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor, nn

from genrecal_ds import dist
from genrecal_ds.recipe.config import OptimizerConfig
from genrecal_ds.recipe.hostfile import free_port

Module = TypeVar("Module", bound=nn.Module)
DsConfig = dict[str, Any]

# The watchdog ends a stalled run first; the process group's own limit is later and says less.
AFTER_WATCHDOG = timedelta(minutes=2)


def start(stall_seconds: float = 1800, dumps: Path | None = None) -> None:
    """Join the process group: nccl on CUDA, gloo on the CPU. A single process needs no launcher.

    stall_seconds: the watchdog's limit; 0 = a collective may wait for a day. dumps: the folder for
    NCCL's flight recorder, which writes every rank's collectives when one has timed out.
    """
    port = 29500 if "WORLD_SIZE" in os.environ else free_port()
    for key, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", port)):
        os.environ.setdefault(key, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.local_rank())
    # DeepSpeed compiles a CPU all-reduce kernel at init, fatal without a compiler. We never use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dumps is not None:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(dumps / "nccl-rank"))
    if not torch_dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        limit = timedelta(seconds=stall_seconds) + AFTER_WATCHDOG
        deepspeed.init_distributed(
            backend, verbose=False, timeout=limit if stall_seconds else timedelta(days=1)
        )


def structure(ds_config: DsConfig, precision: str) -> DsConfig:
    """Return ds_configs/*.json plus the numbers that every engine needs to be built."""
    filled = dict(ds_config)
    filled["train_micro_batch_size_per_gpu"] = 1
    filled["bf16"] = {"enabled": precision == "bf16"}
    if precision == "bf16":  # sums of bf16 gradients over micro-steps and ranks lose small ones
        filled["data_types"] = {"grad_accum_dtype": "fp32"}
        filled["communication_data_type"] = "fp32"
    return filled


def build_sharded(
    construct: Callable[[], Module],
    ds_config: DsConfig,
    precision: str,
    group: torch_dist.ProcessGroup | None = None,
) -> Module:
    """Call `construct` so that every parameter is sharded as soon as its module exists, over the
    ranks of `group`, default all. A smaller group is for frozen modules: no gradient leaves it.

    The values of the parameters are not used: load_sharded fills the parameters.
    """
    from transformers.initialization import no_init_weights
    from transformers.integrations import deepspeed as hf_deepspeed

    # zero.Init casts every new tensor to the model's dtype. The rotary inv_freq would be wrong by
    # 3e-2, silently: the guard must be entered first. zero.Init's own dtype argument is ignored.
    # no_init_weights: initialising a sharded tensor by index fails, and its values are not used.
    with hf_deepspeed.prevent_arange_dtype_change(), no_init_weights():
        filled = structure(ds_config, precision)
        with _Unfilled(config_dict_or_path=filled, data_parallel_group=group):
            return construct()


class _Unfilled(deepspeed.zero.Init):
    """zero.Init without its broadcast of every parameter's first values from rank 0.

    load_sharded overwrites the values. For a teacher of 72B parameters the broadcast sends 145 GB
    to every rank, and each rank's copy counts as memory that the rank really touched.
    """

    def _zero_init_param(self, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


@torch.no_grad()
def load_sharded(parameters: Iterable[tuple[nn.Parameter, Callable[[int, int], Tensor]]]) -> None:
    """Fill sharded parameters; `read(start, stop)` returns a flat range of the full tensor.

    Each rank reads only its own range: no communication, no full model anywhere. Call this before
    the engine is built, because the engine keeps gathered copies of small parameters.
    """
    for parameter, read in parameters:
        shard = parameter.ds_tensor
        first = parameter.ds_zero_partition_rank * shard.numel()
        last = min(first + shard.numel(), parameter.ds_numel)  # the last shard is padded
        if first < last:
            shard.data.view(-1)[: last - first].copy_(read(first, last))


def loss_scale(world_size: int, accumulation_steps: int) -> float:
    """Return the factor of a micro-batch's loss that turns DeepSpeed's mean into our sum.

    A step's loss is L = sum over micro-batches of l_i, each already divided by the whole step's
    rows. DeepSpeed's gradient is  1/world * sum_ranks( 1/accumulation * sum_steps( grad l_i ) ):
    engine.backward divides by accumulation_steps, the reduction averages over ranks. This factor
    undoes both divisions; no other place does.
    """
    return float(world_size * accumulation_steps)


class TeacherEngine:
    """A frozen module, sharded; its parameters are gathered layer by layer during a forward."""

    def __init__(self, module: nn.Module, ds_config: DsConfig, precision: str):
        module.requires_grad_(False)
        self._engine = deepspeed.initialize(model=module, config=structure(ds_config, precision))[0]
        self._engine.eval()
        self.module: nn.Module = self._engine.module

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def close(self) -> None:
        self.module = None  # type: ignore[assignment]
        _free(self)


class TeacherReplica:
    """A frozen module, whole on every rank; a forward is no collective."""

    def __init__(self, module: nn.Module):
        self.module: nn.Module = module.eval()

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def close(self) -> None:
        self.module = None  # type: ignore[assignment]
        _release_memory()


Teacher = TeacherEngine | TeacherReplica


class StudentEngine:
    """The trainable module with AdamW; frozen parameters are in no optimizer."""

    def __init__(
        self,
        module: nn.Module,
        ds_config: DsConfig,
        precision: str,
        optimizer: OptimizerConfig,
        accumulation_steps: int,
        monitor: DsConfig | None = None,
    ):
        filled = structure(ds_config, precision)
        filled["gradient_accumulation_steps"] = accumulation_steps
        filled["gradient_clipping"] = optimizer.clip  # DeepSpeed's default is 1.0, not off
        filled.update(monitor or {})
        self._scale = loss_scale(dist.world_size(), accumulation_steps)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.AdamW(
                parameter_groups(module, optimizer.weight_decay),
                lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps,
            ),
            config=filled,
        )  # fmt: skip
        self.module: nn.Module = self._engine.module

    @property
    def layout(self) -> dict[str, int]:
        """What decides which numbers a rank's optimizer files hold, and in which order."""
        sub_group_size = self._engine.zero_sub_group_size()
        return {"world_size": dist.world_size(), "sub_group_size": sub_group_size}

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Run backward for one micro-batch's loss, already divided by the whole step's rows."""
        # A loss that is not finite must show in the gradient: all ranks judge the step by that.
        is_finite = loss.detach() * 0 + 1  # 1, or NaN
        self._engine.backward(loss * is_finite * self._scale)

    def step(self) -> None:
        """Step after every backward; the update happens on the step's last micro-batch.

        If the global gradient norm is not finite, all ranks leave weights and optimizer state
        unchanged, and is_applied is False.
        """
        self._engine.step()

    @property
    def is_applied(self) -> bool:
        """True if the last update changed the weights; the same on every rank."""
        return bool(self._engine.was_step_applied())

    @property
    def gradient_norm(self) -> float:
        """Return the last update's global gradient norm before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def log(self, values: dict[str, float], samples: int) -> None:
        """Write to TensorBoard and W&B, if the recipe asks, by DeepSpeed's monitor."""
        if self._engine.monitor.enabled and dist.is_main():
            self._engine.monitor.write_events([(k, v, samples) for k, v in values.items()])

    def save(self, folder: Path, tag: str, files: Any) -> None:
        """Save shards of trainable parameters and optimizer by `files`, a CheckpointEngine of
        DeepSpeed. Every rank calls this."""
        self._engine.checkpoint_engine = files
        self._engine.save_checkpoint(
            str(folder), tag, save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, folder: Path, tag: str, universal: bool = False) -> None:
        """Restore what save wrote at this world size, or DeepSpeed's universal form of it.

        A save has no frozen parameters: those come from their own folders and are loaded before.
        """
        decays = [group["weight_decay"] for group in self._optimizer.param_groups]
        self._engine._config.load_universal_checkpoint = universal
        path, _ = self._engine.load_checkpoint(
            str(folder), tag, load_module_strict=False, load_lr_scheduler_states=False
        )
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint {tag} in {folder}")
        # A universal load gives every group the first group's settings, so norms and biases would
        # decay. It gives all parameters one tensor as step count, which each would increase.
        for group, decay in zip(self._optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for moments in self._optimizer.optimizer.state.values():
            moments["step"] = torch.as_tensor(moments["step"]).clone()

    def full_state(self, prefix: str) -> dict[str, Tensor]:
        """Gather whole parameters under `prefix` on the main rank's CPU; {} on other ranks.

        A collective. One parameter at a time: no device ever holds the whole model.
        """
        state: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            if not name.startswith(prefix):
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                if dist.is_main():
                    state[name.removeprefix(prefix)] = parameter.detach().cpu().clone()
        return state

    def close(self) -> None:
        self.module = None  # type: ignore[assignment]
        self._optimizer = None
        _free(self)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group trainable parameters: matrices decay, norms and biases do not (paper section 4)."""
    decay, plain = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decay if len(shape) > 1 else plain).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def monitor_config(folder: Path, tensorboard: bool, wandb_project: str | None) -> DsConfig:
    """Return DeepSpeed's monitor section for the recipe's log keys."""
    config: DsConfig = {}
    if tensorboard:
        config["tensorboard"] = {"enabled": True, "output_path": str(folder), "job_name": "events"}
    if wandb_project:
        config["wandb"] = {"enabled": True, "project": wandb_project}
    return config


def is_gathered(parameter: nn.Parameter) -> bool:
    """True if a sharded parameter is whole on this rank right now."""
    return parameter.ds_status == ZeroParamStatus.AVAILABLE


def _free(owner: TeacherEngine | StudentEngine) -> None:
    """Drop hooks and buffers so that the next stage's engines find the memory."""
    owner._engine.destroy()
    _forget(owner._engine.module)
    del owner._engine
    _release_memory()


def _forget(module: nn.Module) -> None:
    """Take an engine's module out of what DeepSpeed keeps for the whole process.

    destroy leaves both there, and with the module weights, gradients and optimizer states stay: the
    modules whose forward runs, the root among them, and a cache of what to release behind each."""
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [running for running in stack if running is not module]
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():  # DeepSpeed wraps it for nvtx
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
