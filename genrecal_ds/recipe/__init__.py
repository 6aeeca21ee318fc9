"""A run's recipe: its keys and rules, its reading, DeepSpeed's JSON, hostfiles. No torch."""
