"""The fused operations. They import torch only; the reference of each is its definition."""

IGNORE = -100  # a label of a row that counts nothing, as in torch's cross_entropy
