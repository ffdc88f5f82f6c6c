"""How omni-nano is made: its data, its stages of training, and what they are measured by."""
