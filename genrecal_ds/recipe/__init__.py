"""Reads what a run is told: the recipe, its rules, DeepSpeed JSON, hostfiles. No torch."""
