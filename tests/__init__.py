"""Tests everything: unit/ (one room), dist/ (ranks on the CPU), gpu/, cluster/ (hosts, kills)."""
