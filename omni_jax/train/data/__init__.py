"""From files of rows to batches: deterministic, and exact when a run goes on in the middle of an epoch."""
