"""token_align: student and teacher rows become the Recalibrator's packed input, in one call."""

from genrecal_ds.ops.token_align.reference import token_align_reference

__all__ = ["token_align"]

token_align = token_align_reference
