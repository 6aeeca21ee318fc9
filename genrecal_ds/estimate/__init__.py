"""Memory and FLOPs of a stage by arithmetic, and the sizes they are computed from."""
