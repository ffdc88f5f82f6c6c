"""Low-rank adapters of the Thinker: what is adapted, their factors as an objective, and the table that says so."""
