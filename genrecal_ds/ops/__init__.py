"""Defines the fused operations, which import torch only; the reference defines each result."""
