"""Holds the fused operations. They import only torch; each op's reference is its definition."""

IGNORE = -100  # the label of a row that adds nothing, the same number as in torch's cross_entropy
