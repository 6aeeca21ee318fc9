"""What a stage minimises: one file for each objective, all on the skeleton of base.py."""
