"""Compares arms of an experiment over seeds, as tables: `python -m genrecal_ds.ablate`."""
