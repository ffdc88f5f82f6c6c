"""Training: recipes, their losses and data, and the one loop that runs them.

    rows of JSON -> examples -> samples with a loss mask -> batches --.
    a model -> a recipe -> Objective: what is trained, and its loss ---+-> loop -> checkpoints, metrics, what users load

Every loss is a pure function of parameters and a batch, and needs neither the loop nor the data of this package.
"""
