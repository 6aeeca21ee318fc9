"""Adds LoRA adapters to the student's blocks, by peft; merges them into a stage's result.

Shapes: r rank, I inputs, O outputs of a linear layer.
"""

from torch import Tensor, nn

from genrecal_ds.errors import UserError
from genrecal_ds.models.vlm import VLM
from genrecal_ds.recipe.config import LoraConfig

ADAPTER = "default"  # peft's name for a module's only adapter


def add_adapters(vlm: VLM, config: LoraConfig) -> None:
    """Put an adapter beside every linear layer of the decoder blocks that `targets` names.

    Afterwards `layers` trains the adapters alone. Call it on loaded weights, sharded or not.
    Raises UserError where peft is missing or no layer is named so.
    """
    try:
        import peft
    except ImportError:
        raise UserError("student.lora needs peft: pip install peft") from None
    names = [
        name.removeprefix("model.")
        for name, module in vlm.named_modules()
        if isinstance(module, nn.Linear)
        and vlm.component_of(f"{name}.weight") == "layers"
        and (not config.targets or name.rsplit(".", 1)[-1] in config.targets)
    ]
    if not names:
        raise UserError(
            f"student.lora.targets: no linear layer of the decoder is named {config.targets}"
        )
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names
    )
    # Fresh adapters are equal on all ranks: every rank comes here with the same seed.
    peft.inject_adapter_in_model(settings, vlm.model)
    vlm.adapter_scale = config.alpha / config.rank


def merged(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Merge the adapters of a state into its weights: W + scale * B A, under the layers' own names.

    The sum is formed in fp32 and rounded once.
    """
    plain = {
        name.replace(".base_layer.", "."): value
        for name, value in state.items()
        if ".lora_" not in name
    }
    for name, down_rI in state.items():
        layer, is_adapter, _ = name.partition(f".lora_A.{ADAPTER}.weight")
        if is_adapter:
            up_Or = state[f"{layer}.lora_B.{ADAPTER}.weight"]
            weight_OI = plain[f"{layer}.weight"]
            change_OI = scale * (up_Or.float() @ down_rI.float())
            plain[f"{layer}.weight"] = (weight_OI + change_OI).to(weight_OI.dtype)
    return plain
