"""XLA flags with which programs of small checkpoints compile fast and run slowly, for tests and what they start.

Tests spend more time compiling than running, so the compiler's slowest passes are off. The older code generator takes
half the time of the newer one; jax 0.11 and later have only the newer one. Imports nothing that imports jax.
"""

from importlib.metadata import version

QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1" + (
    " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
)
