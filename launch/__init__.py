"""Starting runs: train.py, the demo, recipes, SLURM jobs, containers."""
