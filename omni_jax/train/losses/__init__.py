"""Losses as pure functions of parameters and a batch."""
