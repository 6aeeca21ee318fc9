"""The fused operations. They import torch only; the reference of each is its definition."""
