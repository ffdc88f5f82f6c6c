"""Proof on a small scale: a small target learns a text, drafters learn the target, and what they save is measured."""
