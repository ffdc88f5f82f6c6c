"""Compiler options of programs that decode.

JAX takes such options of a whole program only: a function that has them cannot be called inside another `jax.jit`.
"""

import jax

# The loops that decode read every weight and all of a cache for a few rows. On GPU, products that XLA itself generates
# take no slice of a stack: it copies the layer's weights, keys and values first. A library's products read them where
# they lie.
LOOP_OPTIONS = {"xla_gpu_enable_triton_gemm": False}

# On CPU, XLA's newer emitters set up a compiler for each kernel. The older ones compile a third faster, and do not slow
# the Talker's programs. They slow prompts of 512 tokens, the loop over text, and Code2Wav. JAX 0.11 has no choice.
OLDER_EMITTERS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
