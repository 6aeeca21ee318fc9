"""Computes memory and FLOPs of a stage from the sizes of its models."""
