"""Side-by-side timings, each a command: ``python -m benchmarks.step_cost``."""
