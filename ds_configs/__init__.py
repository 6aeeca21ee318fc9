"""Holds DeepSpeed JSON templates, structure only; the recipe gives the numbers.

This package holds no code. It is one so that an installed wheel carries the JSON files.
"""
