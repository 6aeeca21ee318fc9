"""Plans a distillation before any GPU is asked for: `python -m genrecal_ds.planner`.

facts.py   GPUs, and models by folder, config file or name (models/*.json)
cost.py    bytes on the wire and seconds of a step, by arithmetic
search.py  every arrangement of a recipe, the fastest that fits, and why others do not
report.py  what is printed, and the recipe that is written
measured.py  runs that were, beside the same arithmetic
"""
