"""How a module declares parameters: shape, logical axes and initial scale on one line.

Every module here states its arrays and its forward; nothing is allocated until someone asks. `declare` gives the
static declaration with the shapes and axes; the arrays travel as a plain nested dict, and `bind` puts them back into
the modules inside `jit`:

    >>> declaration = declare(Linear, (3, 2), ("mlp", "embed"))
    >>> params = init_params(Linear, (3, 2), ("mlp", "embed"))
    >>> jax.jit(lambda params, x: bind(declaration, params)(x))(params, jnp.ones((5, 2))).shape
    (5, 3)

Repeated layers are one set of parameters with a leading layer axis; their modules take the index `l` of the layer, a
number or int32 [], when they are called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from omni_jax.errors import InputError
from omni_jax.ops.kept import PRODUCTS
from omni_jax.ops.norm import rms_norm
from omni_jax.sharding import Axes, platform


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, scale: float | None = None, fill: float = 0.0
) -> nnx.Param:
    """A parameter of `shape` with logical `axes`: normal of standard deviation `scale`, or constant `fill`."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and axes {axes} differ in rank")
    if scale is None:
        return nnx.Param(jnp.full(shape, fill, jnp.float32), axes=axes)
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def int8_param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    """The values of an `ops.int8.Int8`, uniform over what eight bits hold; they keep their type in every model."""
    return nnx.Param(jax.random.randint(rngs.params(), shape, -127, 128, jnp.int8), axes=axes)


def is_float(dtype: Any) -> bool:
    """Whether an array of this type is held in the type of a model, rather than always in its own."""
    return jnp.issubdtype(dtype, jnp.floating)


def project(x: jax.Array, weight: jax.Array, contracted: int = 1) -> jax.Array:
    """Contract the last `contracted` axes of x [..., in] and of weight [*out, in]: float32 [..., *out].

    The weight is flattened to [out, in] first: with more output axes, XLA on CPU would transpose a copy of it. One row
    on GPU is a fused product and sum, which reads a layer of a stack in place. In half precision a backward pass
    multiplies in half precision too, and sums in float32; for `jax.jvp` take float32.
    """
    inner = x.shape[x.ndim - contracted :]
    rows, columns = x.reshape(-1, prod(inner)), weight.reshape(-1, prod(inner))
    if rows.shape[0] == 1 and platform() != "cpu":
        y = jnp.sum(rows.astype(jnp.float32) * columns.astype(jnp.float32), axis=-1)
    else:
        y: Any = (_product if rows.dtype == jnp.float32 else _half_product)(rows, columns)
    return y.reshape(*x.shape[: x.ndim - contracted], *weight.shape[: weight.ndim - contracted])


def _product(rows: jax.Array, columns: jax.Array) -> jax.Array:
    return jnp.einsum("ri,oi->ro", rows, columns, preferred_element_type=jnp.float32)


def _half_product_backward(factors: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Derived by JAX, these would be products of float32 with what is half as wide: both as float32."""
    rows, columns = factors
    dy = cotangent.astype(rows.dtype)
    d_rows = jnp.einsum("ro,oi->ri", dy, columns, preferred_element_type=jnp.float32)
    d_columns = jnp.einsum("ro,ri->oi", dy, rows, preferred_element_type=jnp.float32)
    return d_rows.astype(rows.dtype), d_columns.astype(columns.dtype)


_half_product = jax.custom_vjp(_product)
_half_product.defvjp(lambda *factors: (_product(*factors), factors), _half_product_backward)


class Module(nnx.Module):
    """A Flax NNX module that prints as one line: its name, how many parameters it has, and their types."""

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(nnx.state(self))
        if not all(hasattr(x, "size") and hasattr(x, "dtype") for x in leaves):
            return f"{type(self).__name__}({len(leaves)} leaves that are no arrays)"
        types = sorted({str(x.dtype) for x in leaves})
        return f"{type(self).__name__}({sum(x.size for x in leaves):,} parameters, {' and '.join(types)})"

    __str__ = __repr__


class Linear(Module):
    """y = x W^T + b with W as on disk, [out, in], or [layers, out, in] for a stack; accumulates in float32."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        out_in: tuple[int, int],
        axes: tuple[str | None, str | None],
        layers: int | None = None,
        bias: bool = True,
    ):
        stack, stack_axes = ((), ()) if layers is None else ((layers,), ("layers",))
        self.weight = param(rngs, (*stack, *out_in), (*stack_axes, *axes), scale=out_in[1] ** -0.5)
        self.bias = param(rngs, (*stack, out_in[0]), (*stack_axes, axes[0])) if bias else None

    def __call__(self, x: jax.Array, l: Any = None) -> jax.Array:
        """[..., in] -> [..., out] in x's dtype; `l` picks the layer of a stack."""
        weight = self.weight[...] if l is None else self.weight[...][l]
        y = project(x, weight)
        if self.bias is not None:
            y = y + (self.bias[...] if l is None else self.bias[...][l])
        return y.astype(x.dtype)


class LayerNorm(Module):
    """Layer normalisation with weight and bias over the last axis, computed in float32."""

    def __init__(self, rngs: nnx.Rngs, width: int, eps: float, layers: int | None = None):
        stack, axes = ((), ("embed",)) if layers is None else ((layers,), ("layers", "embed"))
        self.weight = param(rngs, (*stack, width), axes, fill=1.0)
        self.bias = param(rngs, (*stack, width), axes)
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array, l: Any = None) -> jax.Array:
        """[..., width] -> [..., width]; `l` picks the layer of a stack."""
        weight, bias = (p[...] if l is None else p[...][l] for p in (self.weight, self.bias))
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * weight + bias).astype(x.dtype)


class RMSNorm(Module):
    """Root-mean-square normalisation over the last axis: computed in float32, cast back, then scaled by the weight."""

    def __init__(self, rngs: nnx.Rngs, width: int, eps: float, layers: int | None = None, axis: str = "embed"):
        stack, axes = ((), (axis,)) if layers is None else ((layers,), ("layers", axis))
        self.weight = param(rngs, (*stack, width), axes, fill=1.0)
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array, l: Any = None) -> jax.Array:
        """[..., width] -> [..., width]; `l` picks the layer of a stack."""
        weight = self.weight[...] if l is None else self.weight[...][l]
        return rms_norm(x, weight, self.eps)


@dataclass(frozen=True, eq=False)
class Declaration:
    """A declared module: its static structure, and its parameters' shapes and logical axes as nested dicts.

    mesh: the devices of its parameters, for modules that compute on their own shards; None for one device. Compared by
    identity, so that it can be a static argument of a compiled function: declare a module once.
    """

    graphdef: Any
    shapes: dict
    axes: dict
    mesh: Mesh | None = None

    def __repr__(self) -> str:
        sizes = [prod(p.shape) for p in jax.tree.leaves(self.shapes)]
        devices = 1 if self.mesh is None else self.mesh.size
        return f"Declaration({len(sizes)} arrays, {sum(sizes):,} parameters, {devices} device(s))"


def declare(module: Callable[..., nnx.Module], *args: Any, mesh: Mesh | None = None) -> Declaration:
    """Declare `module(rngs, *args)` on `mesh` without allocating anything."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(0), *args)))
    axes: dict = {}
    for path, variable in nnx.to_flat_state(state):
        node = axes
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = variable.get_metadata()["axes"]
    return Declaration(graphdef, nnx.to_pure_dict(state), axes, mesh)


def bind(declaration: Declaration, params: dict) -> Any:
    """The module with `params` in place; call it inside `jit`, where it costs nothing.

    declaration: what `declare` gives, or `Omni.declarations` holds.
    params: the arrays as a plain nested dict, of the declared shapes and any float type.

    Submodules that have an attribute `mesh` are given the declaration's. Raises InputError for arrays of other names or
    shapes.
    """
    _check(declaration.shapes, params)
    module = nnx.merge(declaration.graphdef, params)
    if declaration.mesh is not None:
        parts: list[Any] = [part for _, part in nnx.iter_modules(module) if hasattr(part, "mesh")]
        for part in parts:
            part.mesh = declaration.mesh
    return module


def _check(declared: dict, params: dict) -> None:
    """InputError, which names the first array that differs, unless params have the declared names and shapes."""
    wanted, given = _shapes(declared), _shapes(params)
    if wanted == given:
        return
    if declared.keys() != params.keys() and any(_shapes(part) == wanted for part in params.values()):
        part = next(name for name, part in params.items() if _shapes(part) == wanted)
        raise InputError(f'bind takes the parameters of one part, not those of {list(params)}; give params["{part}"]')
    name = min(path for path in wanted.keys() | given.keys() if wanted.get(path) != given.get(path))
    asked, found = (list(shapes[name]) if name in shapes else "none" for shapes in (wanted, given))
    raise InputError(f"the module declares {name} {asked}, the parameters hold {found}; give those of its own part")


def _shapes(tree: dict) -> dict[str, tuple[int, ...]]:
    """The shape of every array, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf) for path, leaf in leaves}


M = TypeVar("M", bound=nnx.Module)
Carry = TypeVar("Carry")
Y = TypeVar("Y")


def scan_layers(
    module: M, layer: Callable[[M, Carry, jax.Array], tuple[Carry, Y]], carry: Carry, layers: int, remat: bool
) -> tuple[Carry, Y]:
    """Run the layers of a module whose parameters are stacks of them: the last carry, and the layers' results, stacked.

    layer: called with the module that holds this layer's parameters alone, at index 0 of its stacks, the carry, and the
    layer's number int32 []. Stacks of another length stay whole. remat: whether a backward pass computes a layer anew;
    else it has the results of matrix products, and computes only what is between them.
    """
    graphdef, stacks, others = nnx.split(module, lambda _, stack: stack.shape[0] == layers, ...)

    def step(carry: Carry, at: tuple) -> tuple[Carry, Y]:
        l, own = at
        return layer(nnx.merge(graphdef, jax.tree.map(lambda p: p[None], own), others), carry, l)

    # Inside a loop nothing is computed twice by chance, so nothing has to be prevented.
    step = jax.checkpoint(step, prevent_cse=False, policy=None if remat else PRODUCTS)
    return jax.lax.scan(step, carry, (jnp.arange(layers), stacks))


def init_params(module: Callable[..., nnx.Module], *args: Any, seed: int = 0, dtype: Any = jnp.float32) -> dict:
    """Random parameters of `module(rngs, *args)` as a plain nested dict, made on the device by one compiled program."""

    @partial(jax.jit, static_argnums=1)
    def make(key: jax.Array, dtype: Any) -> dict:
        params = nnx.to_pure_dict(nnx.state(module(nnx.Rngs(params=key), *args)))
        return jax.tree.map(lambda p: p.astype(dtype) if is_float(p.dtype) else p, params)

    return make(jax.random.key(seed), jnp.dtype(dtype))
