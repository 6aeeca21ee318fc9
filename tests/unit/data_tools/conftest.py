"""The same shards as the tests of genrecal_ds/data."""

from tests.unit.data.conftest import built, raw, shards, write_unchecked

__all__ = ["built", "raw", "shards", "write_unchecked"]
