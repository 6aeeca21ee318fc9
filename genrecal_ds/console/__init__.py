"""Reads and prints for commands: arguments, safe text, pages, refusals. Imports no torch."""
