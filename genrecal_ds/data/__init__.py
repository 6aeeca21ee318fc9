"""Turns shards into micro-batches: index, plan of the order, samples, tokens, PairBatch."""
