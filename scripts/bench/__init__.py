"""Measurements of speed and memory: `python -m scripts.bench text|speech|drafting|train|drafters|loading|scaling`."""
