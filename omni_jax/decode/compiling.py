"""Compiler options of the loops that decode, which read every weight and all of a cache for a few rows.

JAX takes such options of a whole program only: a function that has them cannot be called inside another `jax.jit`.
"""

# On GPU, products that XLA itself generates take no slice of a stack: it copies the layer's weights, keys and values
# first. A library's products read them where they lie.
LOOP_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
