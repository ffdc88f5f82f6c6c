"""What is checked and measured on a GPU machine: `python -m scripts.gpu`."""
