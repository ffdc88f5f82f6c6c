"""What a compiled program moves, against programs whose bytes are known by hand."""

import pytest

from scripts.aot.hlo import Module
from scripts.aot.traffic import BANDWIDTH, GRAPH_LAUNCH, OPERATIONS, Judge, Traffic, expected_share

# Eight layers of weights bf16[64, 128], of which a loop takes one at each turn, in a kernel of its own: a product with
# a row, and an update of one slot of a cache in place.
LOOP = """HloModule loop, num_partitions=1

%product (p0: bf16[8,64,128], p1: s32[], p2: bf16[1,128]) -> f32[1,64] {
  %p0 = bf16[8,64,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %layer = bf16[1,64,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  %weight = bf16[64,128]{1,0} bitcast(%layer)
  %p2 = bf16[1,128]{1,0} parameter(2)
  ROOT %dot = f32[1,64]{1,0} dot(%p2, %weight), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%write (p0: f32[8,16,64], p1: f32[1,64], p2: s32[]) -> f32[8,16,64] {
  %p0 = f32[8,16,64]{2,1,0} parameter(0)
  %p1 = f32[1,64]{1,0} parameter(1)
  %slot = f32[1,1,64]{2,1,0} bitcast(%p1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[8,16,64]{2,1,0} dynamic-update-slice(%p0, %slot, %p2, %zero, %zero)
}

%condition (s: (s32[], bf16[8,64,128], bf16[1,128], f32[8,16,64])) -> pred[] {
  %s = (s32[], bf16[8,64,128]{2,1,0}, bf16[1,128]{1,0}, f32[8,16,64]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %end = s32[] constant(8)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%body (s: (s32[], bf16[8,64,128], bf16[1,128], f32[8,16,64])) -> (s32[], bf16[8,64,128], bf16[1,128], f32[8,16,64]) {
  %s = (s32[], bf16[8,64,128]{2,1,0}, bf16[1,128]{1,0}, f32[8,16,64]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %w = bf16[8,64,128]{2,1,0} get-tuple-element(%s), index=1
  %x = bf16[1,128]{1,0} get-tuple-element(%s), index=2
  %c = f32[8,16,64]{2,1,0} get-tuple-element(%s), index=3
  %y = f32[1,64]{1,0} fusion(%w, %i, %x), kind=kCustom, calls=%product, metadata={op_name="jit(f)/attention/dot"}
  %d = f32[8,16,64]{2,1,0} fusion(%c, %y, %i), kind=kLoop, calls=%write, metadata={op_name="jit(f)/attention/update"}
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  ROOT %t = (s32[], bf16[8,64,128]{2,1,0}, bf16[1,128]{1,0}, f32[8,16,64]{2,1,0}) tuple(%j, %w, %x, %d)
}

ENTRY %main (w: bf16[8,64,128], x: bf16[1,128], c: f32[8,16,64]) -> f32[8,16,64] {
  %w = bf16[8,64,128]{2,1,0} parameter(0)
  %x = bf16[1,128]{1,0} parameter(1)
  %c = f32[8,16,64]{2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[8,64,128]{2,1,0}, bf16[1,128]{1,0}, f32[8,16,64]{2,1,0}) tuple(%zero, %w, %x, %c)
  %loop = (s32[], bf16[8,64,128]{2,1,0}, bf16[1,128]{1,0}, f32[8,16,64]{2,1,0}) while(%t), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"8"}}
  ROOT %r = f32[8,16,64]{2,1,0} get-tuple-element(%loop), index=3
}
"""


def test_a_slice_counts_as_far_as_it_reaches_and_an_update_as_what_it_writes() -> None:
    moved = {op.name: (count, one) for op, count, one in Judge(Module(LOOP)).kernels()}
    weight, row, out = 64 * 128 * 2, 128 * 2, 64 * 4
    count, product = moved["y"]
    # Beside them the number of the layer, of four bytes.
    assert (count, product) == (8, Traffic(8, 8 * (weight + row + 4), 8 * out, 8 * 2 * 64 * 128))
    assert moved["d"] == (8, Traffic(8, 8 * (out + 4), 8 * out, 0))


def test_a_slice_of_what_is_converted_first() -> None:
    wide = LOOP.replace("%layer = bf16[1,64,128]{2,1,0} dynamic-slice(%p0,", (
        "%all = f32[8,64,128]{2,1,0} convert(%p0)\n  %layer = f32[1,64,128]{2,1,0} dynamic-slice(%all,"
    )).replace("%weight = bf16[64,128]", "%weight = f32[64,128]")  # fmt: skip
    (_, _, before), (_, _, after) = (next(Judge(Module(text)).kernels()) for text in (LOOP, wide))
    assert before.moved == after.moved


def test_a_copied_slice_is_read_and_written() -> None:
    text = LOOP.replace("%y = f32[1,64]{1,0} fusion(%w, %i, %x), kind=kCustom, calls=%product", (
        "%cut = bf16[1,64,128]{2,1,0} dynamic-slice(%w, %i, %i, %i), dynamic_slice_sizes={1,64,128}\n"
        "  %y = f32[1,64]{1,0} dot(%x, %cut), lhs_contracting_dims={1}, rhs_contracting_dims={2}"
    ))  # fmt: skip
    moved = {op.name: one for op, _, one in Judge(Module(text)).kernels()}
    weight = 8 * 64 * 128 * 2
    assert moved["cut"].written == weight and weight <= moved["cut"].read < 1.001 * weight
    assert moved["y"].read == weight + 8 * 128 * 2


def test_an_update_in_place_that_is_a_kernel_of_its_own() -> None:
    text = LOOP.replace("%d = f32[8,16,64]{2,1,0} fusion(%c, %y, %i), kind=kLoop, calls=%write", (
        "%row = f32[1,1,64]{2,1,0} bitcast(%y)\n"
        "  %d = f32[8,16,64]{2,1,0} dynamic-update-slice(%c, %row, %i, %i, %i)"
    ))  # fmt: skip
    moved = {op.name: one for op, _, one in Judge(Module(text)).kernels()}
    assert (moved["d"].read, moved["d"].written) == (8 * (64 * 4 + 3 * 4), 8 * 64 * 4)


def test_scopes_and_time() -> None:
    judge = Judge(Module(LOOP))
    assert judge.by_scope()["attention"].launches == 16
    total = judge.total()
    assert total == sum((one for _, _, one in judge.kernels()), Traffic())
    # Each launch waits for its own bytes: at least for all of them together, and for each launch.
    assert judge.seconds() == pytest.approx(total.launches * GRAPH_LAUNCH + total.moved / BANDWIDTH, rel=0.01)
    assert Traffic(1, 1, 1, int(OPERATIONS)).seconds(0) == pytest.approx(1)


def test_experts_that_rows_choose() -> None:
    assert expected_share(1, 128, 8) == pytest.approx(8 / 128)
    assert 128 * expected_share(32, 128, 8) == pytest.approx(111.8, abs=0.1)
    assert expected_share(100_000, 128, 8) == pytest.approx(1)


# One token's attention: of caches bf16[4, 2, 3, 64, 16] one layer is read, and a slot of each row and head written.
ONE_TOKEN = """HloModule one_token

ENTRY %main (l: s32[1], heads: bf16[2,3,4,16], k: bf16[4,2,3,64,16], v: bf16[4,2,3,64,16]) -> f32[2,3,2,4,16] {
  %l = s32[1]{0} parameter(0)
  %heads = bf16[2,3,4,16]{3,2,1,0} parameter(1)
  %k = bf16[4,2,3,64,16]{4,3,2,1,0} parameter(2)
  %v = bf16[4,2,3,64,16]{4,3,2,1,0} parameter(3)
  %call = (bf16[4,2,3,64,16]{4,3,2,1,0}, bf16[4,2,3,64,16]{4,3,2,1,0}, f32[2,3,2,4,16]{4,3,2,1,0}) custom-call(%l, \
%heads, %k, %v), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{0}: (2, {}), {1}: (3, {})}, \
metadata={op_name="jit(f)/attention/decode_attention/pallas_call"}
  ROOT %out = f32[2,3,2,4,16]{4,3,2,1,0} get-tuple-element(%call), index=2
}
"""


def test_one_token_reads_one_layer_of_a_cache_and_writes_one_slot() -> None:
    ((op, count, moved),) = Judge(Module(ONE_TOKEN)).kernels()
    layer, slot = 2 * 3 * 64 * 16 * 2, 2 * 3 * 16 * 2
    assert (op.name, count) == ("call", 1)
    assert moved.read == 4 + 2 * 3 * 4 * 16 * 2 + 2 * layer
    assert moved.written == 2 * slot + 2 * 3 * 2 * 4 * 16 * 4
