"""Settings that recipes share: the name of each, its type, default and meaning, for flags, TOML and Python alike.

    flags, config.toml -> Recipe (a frozen dataclass with these groups and its own fields) -> Objective, batches -> loop

Parsers make them without checks, since a parser of flags takes a ValueError for wrong usage; `check` finds what cannot
be, before any weight is read.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Literal

from tyro.conf import OmitArgPrefixes

from omni_jax.distributed import Machines
from omni_jax.errors import InputError
from omni_jax.flags import MediaFlags, PreparationFlags
from omni_jax.inputs.values import shown
from omni_jax.sharding import platform

# Settings that do not change what is learned: a run may go on with others.
FREE = (
    *("run.output", "run.save_every", "run.keep", "run.log_every", "batch.workers", "compute.mesh"),
    *("compute.distributed", "compute.coordinator", "compute.processes", "compute.process"),
)
# What `omni_jax[train]` installs and a run cannot do without.
PACKAGES = ("optax", "grain", "tensorboardX")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained on what, for how long, and what is kept of it."""

    model: Path
    """Model id, Hugging Face directory, converted checkpoint (python -m convert SRC DST), or nano."""
    data: tuple[Path, ...]
    """Files of conversations, one JSON object per line, or directories of them."""
    output: Path
    """Directory for checkpoints, metrics and the trained model; that of a stopped run goes on."""
    steps: int | None = None
    """Steps of the optimizer; by default as many as --epochs take."""
    epochs: int = 1
    """How often the data are gone through, where --steps is not given."""
    seed: int = 0
    """Of the order of the data and of parameters that begin as random numbers."""
    save_every: int = 500
    """Steps between checkpoints; there is one at the end anyway."""
    keep: int = 2
    """How many of the latest checkpoints stay, in addition to the one with the lowest loss."""
    log_every: int = 10
    """Steps between rows of metrics, which are means over these steps."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer, and how its learning rate goes: linear warmup, then a cosine."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for matrices and AdamW for all else, which learns a new model in fewer steps."""
    learning_rate: float = 5e-6
    """Highest learning rate."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the learning rate rises to it."""
    final_ratio: float = 0.1
    """Share of it that is left at the last step."""
    beta1: float = 0.9
    """How much of the mean of gradients a step keeps."""
    beta2: float = 0.98
    """How much of the mean of squared gradients a step keeps; Muon's matrices have none."""
    weight_decay: float = 0.1
    """Decay of weights, relative to the learning rate; norms and biases do not decay."""
    clip_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it."""
    accumulation: int = 1
    """Batches whose gradients make a step."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How large batches are."""

    rows: int = 1
    """Rows of a batch, rounded up to what the mesh divides."""
    max_length: int = 4096
    """Most tokens of a row; longer samples are reported and left out."""
    unpacked: bool = False
    """Give each sample a row of its own; by default a row may hold several, which do not see each other."""
    workers: int = 2
    """Processes that prepare data, above all media; 0 for none."""
    coarse: bool = False
    """Pad pictures and sounds of a batch more, so that fewer programs are compiled."""
    fatal: bool = False
    """Stop at the first row that cannot be used; by default it is reported and left out."""


@dataclass(frozen=True, kw_only=True)
class Compute(Machines):
    """How and where steps are computed."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the computation, by default bfloat16, on CPU float32; weights that are trained stay float32."""
    remat: Literal["layer", "none"] = "layer"
    """What the backward pass computes anew: each layer, which takes a third more time and much less memory, or none."""

    def type(self) -> str:
        """The type of the computation, also where none is stated."""
        return self.dtype or ("float32" if platform() == "cpu" else "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is asked for, which is no part of a run's configuration."""

    config: Path | None = None
    """TOML file with settings, such as a run's config.toml; flags come before it."""
    dry_run: bool = False
    """Say what would be trained, with what memory, and show a batch; train nothing."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Groups that every recipe has.

    A recipe also has a NAME, the PARTS of the model that it loads, what can be done NEXT with the directory that it
    writes, and three methods:

        objective(omni) -> Objective     what is trained of a loaded model
        batches(omni) -> Batches         its data
        shown(omni, step) -> str         a batch as text, with what is learned of it
    """

    NAME: ClassVar[str]
    PARTS: ClassVar[tuple[str, ...]] = ("thinker",)
    NEXT: ClassVar[str] = "python -m convert --reverse {} DST writes it for other programs"

    run: OmitArgPrefixes[Run]
    optimizer: OmitArgPrefixes[Optimizer] = field(default_factory=Optimizer)
    batch: OmitArgPrefixes[Batching] = field(default_factory=Batching)
    compute: OmitArgPrefixes[Compute] = field(default_factory=Compute)
    call: OmitArgPrefixes[Call] = field(default_factory=Call)


@dataclass(frozen=True, kw_only=True)
class TextRecipe(Recipe):
    """A recipe whose data are conversations, with pictures, sounds and videos, or plain texts."""

    prompt: OmitArgPrefixes[PreparationFlags] = field(default_factory=PreparationFlags)
    media: OmitArgPrefixes[MediaFlags] = field(default_factory=MediaFlags)


def values_of(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting of a recipe by its dotted name, such as "run.steps"; without those of the call."""
    found: dict[str, Any] = {}
    for one in fields(recipe):
        value = getattr(recipe, one.name)
        if is_dataclass(value):
            found |= {} if isinstance(value, Call) else values_of(value, f"{prefix}{one.name}.")
        else:
            found[f"{prefix}{one.name}"] = value
    return found


def changed(before: Recipe, now: Recipe) -> list[str]:
    """What differs between two configurations of a run, as "name was 1, is 2", apart from what is `FREE`."""
    old, new = values_of(before), values_of(now)
    return [
        f"{name} was {shown(old.get(name))}, is {shown(new.get(name))}"
        for name in {**old, **new}
        if name not in FREE and old.get(name) != new.get(name)
    ]


def check(recipe: Recipe) -> None:
    """Raise InputError for the first setting that cannot be, which it names as a flag, or a package that is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"training needs {' and '.join(missing)}: install omni_jax[train]")
    check_ranges(_ranges(recipe))


# A setting that has a range: its name, its value, whether that is valid, and what is.
Range = tuple[str, Any, bool, str]


def check_ranges(ranges: Iterable[Range]) -> None:
    """Raise InputError for the first setting that is out of its range, which it names as a flag."""
    for name, value, valid, expected in ranges:
        if not valid:
            raise InputError(f"--{name.replace('_', '-')} is {shown(value)}; it must be {expected}")


def _ranges(recipe: Recipe) -> Iterator[Range]:
    run, optimizer, batch = recipe.run, recipe.optimizer, recipe.batch
    yield "data", run.data, len(run.data) > 0, "at least one file"
    if run.steps is not None:
        yield "steps", run.steps, run.steps >= 1, "at least 1"
        yield "epochs", run.epochs, run.epochs == Run.epochs, "left out where --steps is given"
    yield "epochs", run.epochs, run.epochs >= 1, "at least 1"
    yield "seed", run.seed, 0 <= run.seed < 2**32, "from 0 to 4294967295"
    for name in ("save_every", "keep", "log_every"):
        yield name, getattr(run, name), getattr(run, name) >= 1, "at least 1"
    for name in ("learning_rate", "clip_norm"):
        value = getattr(optimizer, name)
        yield name, value, isfinite(value) and value > 0, "a number above 0"
    for name in ("warmup_ratio", "final_ratio"):
        yield name, getattr(optimizer, name), 0 <= getattr(optimizer, name) <= 1, "from 0 to 1"
    for name in ("beta1", "beta2"):
        yield name, getattr(optimizer, name), 0 <= getattr(optimizer, name) < 1, "from 0 to less than 1"
    yield "weight_decay", optimizer.weight_decay, 0 <= optimizer.weight_decay < float("inf"), "0 (off) or more"
    yield "accumulation", optimizer.accumulation, optimizer.accumulation >= 1, "at least 1"
    yield "rows", batch.rows, batch.rows >= 1, "at least 1"
    yield "workers", batch.workers, batch.workers >= 0, "0 or more"
    yield "max_length", batch.max_length, batch.max_length >= 2, "at least 2 tokens"
