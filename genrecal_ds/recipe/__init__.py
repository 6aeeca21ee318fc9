"""What a run is told: the recipe's tree of keys, its reading, DeepSpeed's JSON, hostfiles. No torch."""
