"""Starts runs: train.py, several hosts, recipes, grids, the demo, SLURM jobs, containers."""
