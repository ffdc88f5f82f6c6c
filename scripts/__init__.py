"""Tools for developers: measurements, checks on GPUs, small checkpoints. Scripts import omni_jax, never the reverse."""
