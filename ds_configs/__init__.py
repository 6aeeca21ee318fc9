"""DeepSpeed JSON templates, structure only: numbers come from the recipe (genrecal_ds/recipe).

This package holds no code. It is one so that an installed wheel carries the JSON files.
"""
