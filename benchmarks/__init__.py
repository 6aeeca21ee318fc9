"""Measurements, side by side in one run; correctness is the tests' business, never a timing."""
