"""Inputs that cannot be used, by kind: each module lists `CASES`, and `tests/test_bad_inputs.py` runs them all."""
