"""Fuzzers of the lane, with other readers of HTTP as oracles. `python -m tests.fuzz` takes long, pytest does not."""
