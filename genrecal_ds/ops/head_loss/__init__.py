"""head_loss: a*CE + b*KL through the frozen teacher head, never holding all logits at once."""

from genrecal_ds.ops.head_loss.reference import Head, HeadLoss, head_loss_reference

__all__ = ["Head", "HeadLoss", "head_loss"]

head_loss = head_loss_reference
