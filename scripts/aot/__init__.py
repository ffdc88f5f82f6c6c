"""Programs compiled ahead of time for GPUs that are not there: `python -m scripts.aot report|hlo`."""
