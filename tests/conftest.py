"""Shared by all tests: JAX with 8 virtual CPU devices, small random checkpoints, and the reference model of each."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from scripts.small.quick import QUICK_FLAGS

# All must be in place before anything imports jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMNI_JAX_CACHE"] = "off"  # Tests leave the user's directory alone.
# A run of the tests compiles a program once, in whichever of its processes; the next run compiles it again.
if "OMNI_JAX_TESTED_PROGRAMS" not in os.environ:
    os.environ["OMNI_JAX_TESTED_PROGRAMS"] = tempfile.mkdtemp(prefix="omni_jax-programs-")
    atexit.register(shutil.rmtree, os.environ["OMNI_JAX_TESTED_PROGRAMS"], ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["OMNI_JAX_TESTED_PROGRAMS"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {QUICK_FLAGS}"

import pytest

DATA = Path(__file__).resolve().parent / "data"


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs() -> Iterator[None]:
    """Free what a test module has compiled: a process with too many programs crashes while it compiles the next."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real media, the real tokenizer and the public configuration."""
    return DATA


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoints("tiny")` is the directory of that random checkpoint, written once per session (seed 0, float32).

    "nano" is the trained one of the package, in bfloat16.
    """
    from omni_jax.weights.locate import NANO
    from scripts.small.checkpoint import make_checkpoint

    @cache
    def build(variant: str) -> Path:
        if variant == "nano":
            return NANO
        return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / variant, variant)

    return build


@pytest.fixture(scope="session")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`drafters("dflash", "tiny")` is the directory of the random drafter of that kind for that checkpoint."""
    from scripts.small.drafter import make_drafter

    @cache
    def build(kind: str, variant: str) -> Path:
        return make_drafter(tmp_path_factory.mktemp("drafters") / f"{kind}-{variant}", variant, kind)

    return build


@pytest.fixture(scope="session")
def reference(checkpoints: Callable[[str], Path]) -> Callable[[str], Any]:
    """`reference("tiny")` is the whole transformers model of that checkpoint: float32, eager attention, one thread."""

    @cache
    def load(variant: str) -> Any:
        torch = pytest.importorskip("torch")
        from transformers import Qwen3OmniMoeForConditionalGeneration

        torch.set_num_threads(1)
        model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
            checkpoints(variant), dtype=torch.float32, attn_implementation="eager"
        )
        # transformers reads this for a prompt with audio and vision together, although no configuration has it.
        model.talker.config.audio_config = model.thinker.config.audio_config
        return model.eval()

    return load


@pytest.fixture(scope="session")
def omnis(checkpoints: Callable[[str], Path]) -> Callable[[str], Any]:
    """`omnis("tiny")` is our whole model of that checkpoint, loaded straight from its safetensors."""
    from omni_jax.loading import load

    return cache(lambda variant: load(checkpoints(variant)))
