"""Rows of datasets as people have them: their files, their columns and the media that they name.

Evaluation and training both read rows through here; what a row means is theirs to say.
"""
