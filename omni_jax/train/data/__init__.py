"""From files of rows to the batches of a training step.

    rows -> [forms] -> examples -> [samples] -> samples, kept in a file --.
    their lengths -> [plan] -> which samples a batch holds ----------------+-> [samples] -> batches

All rows are read once before training (`survey`), which names those that cannot be used and counts tokens; then every
epoch is a list of batches that follows from the seed (`plan`), and a step is one number in it (`stream`). A recipe says
how a row becomes samples and how samples become a batch; the rest is common. Worker processes never import jax.
"""
