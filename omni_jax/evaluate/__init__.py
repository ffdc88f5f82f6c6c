"""Evaluation: datasets, metrics, a runner that resumes, a report, and a model for lm-evaluation-harness.

data -> samples -> tasks (answers from the model) -> run (one line each, as they come) -> metrics -> report
"""
