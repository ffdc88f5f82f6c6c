"""Measurements of speed and memory: `python -m scripts.bench text|speech|drafting|drafters|loading|scaling`."""
