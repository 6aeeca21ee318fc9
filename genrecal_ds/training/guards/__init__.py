"""Watches a run: agreement of ranks, counts, faults, warnings, stop requests, stalls."""
