"""Drafters from the directories in which they are published, and whether one fits a model.

    config.json, *.safetensors -> load_drafter -> Drafter (configuration, declaration, parameters) -> check_drafter

Both public layouts are read: DFlash (z-lab, SpecForge) and EAGLE-3 (the layer as `midlayer` or as `layers.0`), each
with or without a "model." before any name. `table` is the one list of names and places; `convert` writes files from it.
Names are remembered as they were found, so that the way back gives the same tensors.

A drafter decides how fast a reply comes and never what it says; all the same, nothing is guessed or left out: every
tensor has a place and every place is filled.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from omni_jax import sharding
from omni_jax.config import DecoderConfig, OmniConfig
from omni_jax.draft_config import DFlashConfig, Eagle3Config, read_draft_config
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.files import read_object, reason_of, user_path
from omni_jax.models.dflash import DFlash
from omni_jax.models.eagle3 import Eagle3
from omni_jax.models.param import Declaration, bind, declare
from omni_jax.weights.checkpoint import flatten, nest

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = ("float32", "bfloat16")
WEIGHTS = tuple(np.dtype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16))
PREFIX, LAYER, LAYER_ALIAS = "model.", "midlayer.", "layers.0."
EMBED, TO_TARGET, IN_DRAFT = "embed_tokens.weight", "d2t", "t2d"
SHOWN = 5

Config = DFlashConfig | Eagle3Config
Tensors = dict[str, np.ndarray]
Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor as it was found: its name, and its dtype."""

    name: str
    dtype: np.dtype


@dataclass(frozen=True)
class Row:
    """A tensor of the public layout: its name, its shape, and where it lies in which array of ours."""

    name: str
    shape: tuple[int, ...]
    path: str
    at: Index = ()


@dataclass(frozen=True, eq=False)
class Drafter:
    """A loaded drafter.

    kind: "dflash" or "eagle3". declaration, params: for `bind`, as those of the model's parts. values: its config.json.
    stored: by the layout's own name, how each tensor was found; empty for a drafter that comes from no files.
    """

    kind: str
    config: Config
    declaration: Declaration
    params: dict
    values: dict[str, Any]
    stored: Mapping[str, Stored]

    @property
    def module(self) -> DFlash | Eagle3:
        """The drafter as an NNX module with its parameters in place."""
        return bind(self.declaration, self.params)

    def placed(self, mesh: Mesh | None) -> "Drafter":
        """The same drafter laid over `mesh`, replicated where it does not divide; itself without a mesh."""
        if mesh is None:
            return self
        axes = flatten(self.declaration.axes)
        params = {path: sharding.place(x, axes[path], mesh) for path, x in flatten(self.params).items()}
        return replace(self, declaration=replace(self.declaration, mesh=mesh), params=nest(params))

    def taps(self, target_layers: int) -> tuple[int, ...]:
        """The hidden states that it reads of a Thinker of `target_layers` layers, by the numbers of `Thinker.extend`.

        Their order is that in which `fuse` wants them side by side.
        """
        return self.config.taps(target_layers)


def load_drafter(directory: str | Path, dtype: str | None = None) -> Drafter:
    """Load a drafter from its public safetensors directory; `dtype` "float32" or "bfloat16", by default as stored.

    ConfigError or CheckpointError, naming the key, tensor or file and the remedy, for anything that is not complete.
    """
    directory = user_path(directory, "the drafter")
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype {dtype!r}; choose from {list(DTYPES)}")
    path = directory / "config.json"
    values = read_object(path, error=ConfigError, remedy="take it from the drafter's own directory")
    config = read_draft_config(values, str(path))
    tensors, stored = _canonical(directory, _read_tensors(directory), config)
    kind, declaration = declare_drafter(config, own_embedding=EMBED in tensors)
    others = {TO_TARGET: _take_vocabulary(directory, tensors, config)} if isinstance(config, Eagle3Config) else {}
    rows = table(config, EMBED in tensors)
    _check_rows(directory, tensors, rows)
    arrays = _fill(directory, tensors, rows, declaration, np.dtype(dtype) if dtype else None)
    params = nest({path: jnp.asarray(array) for path, array in {**arrays, **others}.items()})
    return Drafter(kind, config, declaration, params, values, stored)


def declare_drafter(config: Config, own_embedding: bool = False) -> tuple[str, Declaration]:
    """The kind of drafter that a configuration describes, and its declaration."""
    if isinstance(config, DFlashConfig):
        return "dflash", declare(DFlash, config)
    return "eagle3", declare(Eagle3, config, own_embedding)


def check_drafter(drafter: Drafter, config: OmniConfig) -> None:
    """Raise InputError, naming what differs, unless the drafter was made for the Thinker of `config`."""
    text = config.thinker.text
    own = drafter.config.layers if isinstance(drafter.config, DFlashConfig) else drafter.config.layer
    remedy = "; take the drafter that was trained for this model"
    for what, mine, its in (
        ("width", own.hidden_size, text.hidden_size),
        ("vocabulary", own.vocab_size, text.vocab_size),
    ):
        if mine != its:
            raise InputError(f"the drafter's {what} is {mine:,}, the model's {its:,}{remedy}")
    stated = getattr(drafter.config, "num_target_layers", None)
    if stated not in (None, text.num_layers):
        raise InputError(f"the drafter reads a model of {stated} layers, this one has {text.num_layers}{remedy}")
    taps = drafter.taps(text.num_layers)
    if min(taps) < 0 or max(taps) > text.num_layers or len(set(taps)) < len(taps):
        raise InputError(
            f"the drafter reads the hidden states {list(taps)}, this model has {text.num_layers} after its input; "
            "correct the layer ids in the drafter's config.json, or take the drafter that was trained for this model"
        )
    if isinstance(drafter.config, DFlashConfig):
        _check_mask(drafter.config.mask_token_id, config)


def _check_mask(mask: int, config: OmniConfig) -> None:
    """A mask token that means something to the model would be drafted with that meaning, or collide with media."""
    thinker = config.thinker
    if not 0 <= mask < thinker.text.vocab_size:
        raise InputError(f"the drafter's mask_token_id {mask} is outside the vocabulary of {thinker.text.vocab_size:,}")
    taken = {name.removesuffix("_token_id"): value for name, value in config.token_ids.items()}
    # The marks that close a medium are stated nowhere; in the vocabulary they follow those that open it.
    taken |= {f"{name}_end": taken[f"{name}_start"] + 1 for name in ("vision", "audio")}
    for name, value in taken.items():
        if mask == value:
            raise InputError(
                f"the drafter's mask_token_id {mask} is this model's {name} token; the drafter was made for a text "
                "model with other tokens: take one that was trained for this model"
            )


def table(config: Config, own_embedding: bool = False) -> list[Row]:
    """Every weight of the public layout and its place in our parameters; `d2t` and `t2d` are handled beside it."""
    if isinstance(config, DFlashConfig):
        c, features = config.layers, len(config.target_layer_ids)
        rows = [Row("hidden_norm.weight", (c.hidden_size,), "hidden_norm/weight")]
        for l in range(c.num_layers):
            rows += _layer_rows(c, c.hidden_size, f"layers.{l}.", "layers/", (l,), (l,))
            s = f"layers.{l}."
            rows.append(Row(f"{s}input_layernorm.weight", (c.hidden_size,), "layers/attention_norm/weight", (l,)))
            for name in ("q_norm", "k_norm"):
                rows.append(Row(f"{s}self_attn.{name}.weight", (c.head_dim,), f"layers/{name}/weight", (l,)))
    else:
        c, features, V = config.layer, config.features, config.draft_vocab_size
        rows = [Row("lm_head.weight", (V, c.hidden_size), "lm_head")]
        rows += _layer_rows(c, 2 * c.hidden_size, LAYER, "midlayer/", (), (0,))
        for name, path in (("input_layernorm", "input_norm"), ("hidden_norm", "hidden_norm")):
            rows.append(Row(f"{LAYER}{name}.weight", (c.hidden_size,), f"midlayer/{path}/weight"))
        if own_embedding:
            rows.append(Row(EMBED, (c.vocab_size, c.hidden_size), "embed"))
    fused = (c.hidden_size, features * c.hidden_size)
    return [*rows, Row("fc.weight", fused, "fc/weight"), Row("norm.weight", (c.hidden_size,), "norm/weight")]


def _layer_rows(c: DecoderConfig, width: int, name: str, path: str, at: Index, mlp_at: Index) -> Iterator[Row]:
    """What both kinds of layer have: attention on inputs of `width`, the MLP and its norm."""
    D, N, K, H, F = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size
    G = N // K
    for letter, rows, place in (("q", N * H, slice(0, G)), ("k", K * H, G), ("v", K * H, G + 1)):
        yield Row(f"{name}self_attn.{letter}_proj.weight", (rows, width), f"{path}qkv", (*at, slice(None), place))
    yield Row(f"{name}self_attn.o_proj.weight", (D, N * H), f"{path}out", at)
    yield Row(f"{name}post_attention_layernorm.weight", (D,), f"{path}mlp_norm/weight", at)
    for i, part in enumerate(("gate", "up")):
        yield Row(f"{name}mlp.{part}_proj.weight", (F, D), f"{path}mlp/gate_up", (*mlp_at, i))
    yield Row(f"{name}mlp.down_proj.weight", (D, F), f"{path}mlp/down", mlp_at)


def _canonical(directory: Path, found: Tensors, config: Config) -> tuple[Tensors, dict[str, Stored]]:
    """The tensors under the layout's own names, and how they were found."""
    tensors: Tensors = {}
    stored: dict[str, Stored] = {}
    for name, tensor in found.items():
        own = name.removeprefix(PREFIX)
        if isinstance(config, Eagle3Config) and own.startswith(LAYER_ALIAS):
            own = LAYER + own.removeprefix(LAYER_ALIAS)
        if own in tensors:
            raise CheckpointError(f"{directory}: {stored[own].name!r} and {name!r} are two names of one tensor")
        tensors[own], stored[own] = tensor, Stored(name, tensor.dtype)
    return tensors, stored


def _take_vocabulary(directory: Path, tensors: Tensors, config: Eagle3Config) -> np.ndarray:
    """Take `d2t` and `t2d` out, check them, and return offsets int32 [Vd]: zeros for all of the vocabulary."""
    V, Vd = config.layer.vocab_size, config.draft_vocab_size
    known, offsets = tensors.pop(IN_DRAFT, None), tensors.pop(TO_TARGET, None)
    if offsets is None:
        if Vd < V:
            raise CheckpointError(
                f"{directory}: {TO_TARGET!r} is missing, but the drafter knows only {Vd:,} of {V:,} tokens; without it "
                "its drafts cannot be told apart: download the drafter completely"
            )
        offsets = np.zeros((Vd,), np.int64)
    if offsets.shape != (Vd,) or offsets.dtype.kind != "i":
        raise CheckpointError(f"{directory}: {TO_TARGET!r} is {offsets.dtype}{list(offsets.shape)}, not integer [{Vd}]")
    targets = np.arange(Vd) + offsets
    if targets.min() < 0 or targets.max() >= V or len(np.unique(targets)) < Vd:
        raise CheckpointError(f"{directory}: {TO_TARGET!r} does not lead to {Vd:,} different tokens of {V:,}")
    if known is not None and not np.array_equal(known, known_tokens(targets, V)):
        raise CheckpointError(f"{directory}: {TO_TARGET!r} and {IN_DRAFT!r} name different tokens; download them again")
    return offsets.astype(np.int32)


def known_tokens(targets: np.ndarray, vocab_size: int) -> np.ndarray:
    """`t2d`: bool [V], the tokens that a draft vocabulary of these token ids knows."""
    known = np.zeros((vocab_size,), bool)
    known[targets] = True
    return known


def _check_rows(directory: Path, tensors: Tensors, rows: list[Row]) -> None:
    """Every weight has its place, every place its weight, and shapes and dtypes are as they must be."""
    shapes = {row.name: row.shape for row in rows}
    extra = [name for name in tensors if name not in shapes]
    wrong = [f"{n} {list(tensors[n].shape)}, expected {list(s)}" for n, s in shapes.items() if _differs(tensors, n, s)]
    odd = [f"{n} {tensors[n].dtype}" for n in shapes if n in tensors and tensors[n].dtype not in WEIGHTS]
    problems = [
        f"{what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for what, names in (
            ("missing tensors", [name for name in shapes if name not in tensors]),
            ("tensors without a place, perhaps of an option that is not implemented", extra),
            ("tensors of another shape", wrong),
            ("tensors of a dtype that is no weight's", odd),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{directory}: does not fit its config.json; " + "; ".join(problems))


def _differs(tensors: Tensors, name: str, shape: tuple[int, ...]) -> bool:
    return name in tensors and tensors[name].shape != shape


def _fill(
    directory: Path, tensors: Tensors, rows: list[Row], declaration: Declaration, dtype: np.dtype | None
) -> Tensors:
    """The arrays by path: each in `dtype`, or in that of the tensors it is made of."""
    arrays: Tensors = {}
    shapes = flatten(declaration.shapes)
    for row in rows:
        tensor = tensors[row.name]
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{directory}: {row.name} holds NaN or infinite values; download it again")
        array = arrays.setdefault(row.path, np.empty(shapes[row.path].shape, dtype or tensor.dtype))
        if dtype is None and array.dtype != tensor.dtype:
            raise CheckpointError(f"{directory}: {row.path} would mix dtypes at {row.name}; choose one with dtype=")
        place = array[row.at]
        place[...] = tensor.reshape(place.shape)
    return arrays


def _read_tensors(directory: Path) -> Tensors:
    """All tensors of a directory by name; CheckpointError naming the file that is missing or damaged."""
    weight_map = _weight_map(directory)
    tensors: Tensors = {}
    for file in sorted(set(weight_map.values())):
        for name, tensor in _read_file(directory / file).items():
            if name in tensors:
                raise CheckpointError(f"{directory}: tensor {name!r} is in two files")
            tensors[name] = tensor
    lost = [name for name in weight_map if name and name not in tensors]
    if lost:
        raise CheckpointError(f"{directory}: {INDEX} promises {lost[0]!r} in {weight_map[lost[0]]}, which lacks it")
    return tensors


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> file name; for weights in one file, its name under ''."""
    if (directory / INDEX).is_file():
        weight_map = read_object(directory / INDEX, remedy="download it again").get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        if not all(isinstance(n, str) and n.endswith(".safetensors") and n == Path(n).name for n in names):
            raise CheckpointError(f"{directory / INDEX}: 'weight_map' must name safetensors files of this directory")
        return dict(weight_map or {})
    try:
        files = sorted(path.name for path in directory.iterdir())
    except OSError as failure:
        raise CheckpointError(f"{directory}: cannot be listed ({reason_of(failure)})") from None
    weights = [name for name in files if name.endswith(".safetensors")]
    if len(weights) == 1:
        return {"": weights[0]}
    if weights:
        raise CheckpointError(f"{directory}: {len(weights)} safetensors files but no {INDEX}; add the index")
    if any(name.endswith(PICKLES) for name in files):
        raise CheckpointError(f"{directory}: only pickle files, which can run code; save them with safetensors")
    raise CheckpointError(f"{directory}: no .safetensors file is here; download the drafter completely")


def _read_file(path: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):  # which, unlike a path's own, takes a name that is too long
        raise CheckpointError(f"{path} is missing; download the drafter completely")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: damaged or no safetensors file ({reason_of(error)}); download it again"
        ) from None
