"""Building, verifying and inspecting shards: build.py, verify.py, inspect.py, and sources/."""
