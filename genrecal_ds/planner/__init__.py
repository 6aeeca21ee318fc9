"""Plans a distillation before any GPU is asked for: `python -m genrecal_ds.planner`."""
