"""Measures our code beside its peers in one run; results/ keeps the numbers as JSON."""
