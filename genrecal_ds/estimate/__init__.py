"""Computes memory and FLOPs of a stage by arithmetic, and the sizes that both need."""
