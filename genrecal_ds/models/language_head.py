"""A model's own output layer, which can also compute a loss without all logits.

Shapes: N loss rows, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig

from genrecal_ds.ops.head_loss import Head
from genrecal_ds.ops.linear_cross_entropy import linear_cross_entropy
from genrecal_ds.ops.linear_distance import MATRICES, ChunkDistance, linear_distance
from genrecal_ds.ops.softcap import softcapped


class LogitTransform(NamedTuple):
    """What a family does to logits after its head: softcap(scale * logits)."""

    scale: float = 1.0
    softcap: float | None = None


Loss = Callable[[Tensor, Head], tuple[Tensor, Tensor]]


class LanguageHead(nn.Linear):
    """A model's own output layer that can also compute a loss without all logits.

    The loss is computed inside this module's forward, because ZeRO-3 has gathered the weight there.
    Anywhere else the weight has no elements.
    """

    transform = LogitTransform()

    def forward(self, rows: Tensor, loss: Loss | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits of rows [.., D] as the family's code expects them, before its transform.

        With `loss`, return what `loss` makes of rows [N, D] and the head, transform included."""
        if loss is None:
            return super().forward(rows)
        return loss(rows, Head(self.weight, self.bias, *self.transform))

    def cross_entropy(
        self, rows_ND: Tensor, labels_N: Tensor, row_weights_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(weighted sum, CE per row [N]); see ops/linear_cross_entropy.py."""
        return self(
            rows_ND, lambda rows, head: linear_cross_entropy(rows, labels_N, head, row_weights_N)
        )

    def distance(
        self,
        rows_ND: Tensor,
        distance: ChunkDistance,
        sizes: Sequence[int] | None = None,
        teacher_vocabulary: int = 0,
        matrices: int = MATRICES,
    ) -> tuple[Tensor, Tensor]:
        """(sum, distance per row [N]); see ops/linear_distance.py."""
        options = {"teacher_vocabulary": teacher_vocabulary, "matrices": matrices}
        return self(
            rows_ND, lambda rows, head: linear_distance(rows, head, distance, sizes, **options)
        )

    def logits(self, rows: Tensor) -> Tensor:
        """The model's logits for rows [.., D], its transform included."""
        return transformed(self(rows), self.transform)


def logit_transform(config: PreTrainedConfig) -> LogitTransform:
    """Read the transform from a text config; VLM.check shows whether the config says everything."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(text, "logits_scaling", None) or 1.0  # Granite divides
    return LogitTransform(float(scale), getattr(text, "final_logit_softcapping", None))


def transformed(logits: Tensor, transform: LogitTransform) -> Tensor:
    logits = logits * transform.scale
    return softcapped(logits, transform.softcap)
