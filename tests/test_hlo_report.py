"""What a compiled program sends between devices, against costs that are known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from scripts.aot import hlo as hlo_report

# Two groups of four devices: collectives over "inner" stay within a group.
DEVICES = (2, 4)
FLOATS, TURNS = 64 * 16, 3


def run(kind: str, x: jax.Array) -> jax.Array:
    """One collective of a kind over the inner axis; x [64, 16] is whole on each device."""
    if kind == "all-reduce":
        return jax.lax.psum(x, "inner")
    if kind == "all-gather":
        return jax.lax.all_gather(x, "inner").sum(axis=0)
    if kind == "reduce-scatter":
        return jnp.tile(jax.lax.psum_scatter(x, "inner", tiled=True), (4, 1))
    if kind == "all-to-all":
        return jax.lax.all_to_all(x.reshape(4, 16, 16), "inner", 0, 0).reshape(64, 16)
    return jax.lax.ppermute(x, "inner", [(i, (i + 1) % 4) for i in range(4)])


# Bytes that a device sends in a ring of four: chunks of a quarter, forwarded three times, or twice that.
SENT = {
    "all-reduce": 2 * 3 * FLOATS * 4 // 4,
    "all-gather": 3 * FLOATS * 4,
    "reduce-scatter": 3 * FLOATS * 4 // 4,
    "all-to-all": 3 * FLOATS * 4 // 4,
    "collective-permute": FLOATS * 4,
}


@pytest.mark.parametrize("kind", SENT)
def test_bytes_that_a_device_sends(kind: str) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(DEVICES), ("outer", "inner"))

    def local(x: jax.Array) -> jax.Array:
        # Not the same in every turn, so that nothing is moved out of the loop.
        return jax.lax.fori_loop(0, TURNS, lambda i, x: run(kind, x * (i + 2)), x)

    whole = NamedSharding(mesh, P())
    program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    text = program.lower(jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=whole)).compile().as_text()
    assert hlo_report.Module(text).collectives() == {kind: (TURNS, TURNS * SENT[kind])}


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=1,'expert'=4,'tensor'=1] {'expert'}", 4),
        ("replica_groups=mesh['data'=2,'expert'=2,'tensor'=2] {'expert','tensor'}", 4),
        ("replica_groups={}", 8),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", 1),
    ],
)
def test_groups_are_read_in_every_form(groups: str, size: int) -> None:
    text = f"f32[4,8]{{1,0}} all-gather(%x), channel_id=1, {groups}, dimensions={{0}}"
    op = hlo_report.Op("g", "all-gather", "f32[4,8]{1,0} ", text, False)
    assert op.group(8) == size
    assert op.sent(8) == 4 * 8 * 4 * (size - 1) // size


@pytest.mark.parametrize(
    "opcode, result, sent",
    [
        ("all-gather-start", "(f32[2,8]{1,0}, f32[8,8]{1,0})", 3 * 64),
        ("all-gather-start", "((f32[2,8], bf16[2,4]), (f32[8,8], bf16[8,4]))", 3 * 64 + 3 * 16),
        ("all-reduce-start", "(f32[8,8], f32[2,8])", 2 * 3 * (64 + 16)),
        ("all-reduce-start", "((f32[8,8]{1,0}), f32[8,8]{1,0})", 2 * 3 * 64),
        ("all-reduce-start", "f32[8,8]{1,0}", 2 * 3 * 64),
        ("reduce-scatter-start", "((f32[8,8]{1,0}), f32[2,8]{1,0})", 3 * 64),
        ("collective-permute-start", "(f32[8,8]{1,0}, f32[8,8]{1,0}, u32[], u32[])", 4 * 64),
        ("all-to-all-start", "((f32[8,8]), f32[8,8]{1,0}, u32[])", 3 * 64),
        ("all-to-all", "(f32[2,8], f32[2,8], f32[2,8], f32[2,8])", 3 * 64),
    ],
)
def test_only_results_of_what_starts_count(opcode: str, result: str, sent: int) -> None:
    op = hlo_report.Op("c", opcode, result, f"{result} {opcode}(%x), replica_groups=[2,4]<=[8]", False)
    assert op.sent(8) == sent
