"""Trains a recipe's stages: the loop, its engines, checkpoints and guards."""
