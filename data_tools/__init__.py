"""Builds, checks and inspects folders of shards; one command per module."""
