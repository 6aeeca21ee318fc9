"""Defines what a stage minimises: one file for each objective, all on base.py's skeleton."""
