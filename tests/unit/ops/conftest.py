"""Triton decides when a kernel is defined whether it will be interpreted: before any import."""

import os

os.environ["TRITON_INTERPRET"] = "1"
