"""Runs the demo, a whole distillation at toy size: `python -m launch.demo.run`."""
