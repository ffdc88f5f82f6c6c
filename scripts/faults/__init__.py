"""Ill-treat a server, and see that every client is answered: `python -m scripts.faults --model nano`."""
