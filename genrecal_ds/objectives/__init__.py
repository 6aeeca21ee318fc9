"""Computes what a stage minimises: one file per objective, all on the skeleton of base.py."""
