"""Defines the fused operations, which import torch only; the reference defines each result."""

IGNORE = -100  # a label of a row that counts nothing, as in torch's cross_entropy
