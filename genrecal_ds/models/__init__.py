"""Wraps Hugging Face VLMs as vision, projector, body, head; holds the Recalibrator."""
