"""What a compiled program moves, against programs whose bytes are known by hand."""

import pytest

from scripts.aot.hlo import Module
from scripts.aot.kernels import costliest, named_parts
from scripts.aot.traffic import (
    BANDWIDTH,
    GRAPH_LAUNCH,
    HOST_LAUNCH,
    OPERATIONS,
    Judge,
    Traffic,
    expected_share,
)

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
    total, scopes = judge.total(), judge.by_scope()
    moved, seconds = scopes["attention"]
    assert moved.launches == 16 and seconds == pytest.approx(judge.seconds() / 2, rel=0.01)
    assert sum((moved for moved, _ in scopes.values()), Traffic()) == total
    assert sum(seconds for _, seconds in scopes.values()) == pytest.approx(judge.seconds())
    assert total == sum((one for _, _, one in judge.kernels()), Traffic())
    # Each launch waits for its own bytes: at least for all of them together, and for each launch.
    assert judge.seconds() == pytest.approx(total.launches * GRAPH_LAUNCH + total.moved / BANDWIDTH, rel=0.01)
    assert Traffic(1, 1, 1, int(OPERATIONS)).seconds(0) == pytest.approx(1)
    # A launch that the host makes costs more, for every turn of a loop.
    assert judge.seconds(HOST_LAUNCH) - judge.seconds() == pytest.approx(total.launches * (HOST_LAUNCH - GRAPH_LAUNCH))


@pytest.mark.parametrize(
    "name, part",
    [
        ("jit(f)/while/body/eval_jaxpr/attention/checkpoint/dot", "attention"),
        ("jit(f)/experts/branch_12_fun/while/body/mul", "experts"),
        ("jit(f)/attention/rematted_computation/ri,oi->ro/dot_general", "attention"),
        ("jit(f)/block_1/unit/add", "unit"),
        ("jit(f)/experts/shard_map/add", "experts"),
        ("jit(f)/while/body/add", "loop"),
    ],
)
def test_a_part_is_what_the_model_names(name: str, part: str) -> None:
    judge = Judge(Module(LOOP.replace("jit(f)/attention/dot", name)))
    assert judge.scope(next(op for op, *_ in judge.kernels() if op.name == "y")) == part


def test_a_kernel_without_a_name_belongs_to_what_it_ends_with() -> None:
    text = LOOP.replace(', metadata={op_name="jit(f)/attention/dot"}', "").replace(
        "%weight = bf16[64,128]{1,0} bitcast(%layer)",
        '%weight = bf16[64,128]{1,0} bitcast(%layer), metadata={op_name="jit(f)/mlp/eval_jaxpr/slice"}',
    )
    judge = Judge(Module(text))
    assert judge.scope(next(op for op, *_ in judge.kernels() if op.name == "y")) == "mlp"


def test_the_slowest_kernels_and_the_named_parts() -> None:
    judge = Judge(Module(LOOP))
    slowest = costliest(judge, 2)
    assert [(work.name, work.opcode, work.runs, work.part) for work in slowest] == [
        ("y", "fusion", 8, "attention"),
        ("d", "fusion", 8, "attention"),
    ]
    # A row of float32 twice, and the number of the layer.
    assert (slowest[1].read, slowest[1].written) == (8 * (64 * 4 + 4), 8 * 64 * 4)
    assert slowest[0].operations == 8 * 2 * 64 * 128
    assert slowest[1].microseconds == pytest.approx(8e6 * (GRAPH_LAUNCH + (2 * 64 * 4 + 4) / BANDWIDTH))
    assert costliest(judge, 0) == [] and len(costliest(judge, 99)) == 4
    parts = named_parts(judge)
    assert [(part.name, part.runs) for part in parts] == [("attention", 16), ("loop", 16)]
    assert sum(part.microseconds for part in parts) == pytest.approx(1e6 * judge.seconds())


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


# A product of rows bf16[8, 64] with the second of four layers of weights bf16[4, 128, 64], by a library that is given
# the place of that layer; beside its result a library has a workspace.
LIBRARY = """HloModule library

%dynamic-slice-fusion (p0: bf16[4,128,64], p1: bf16[8,64]) -> (f32[8,128], s8[4096]) {
  %p1 = bf16[8,64]{1,0} parameter(1)
  %p0 = bf16[4,128,64]{2,1,0} parameter(0)
  %layer = bf16[1,128,64]{2,1,0} slice(%p0), slice={[1:2], [0:128], [0:64]}
  %weight = bf16[128,64]{1,0} bitcast(%layer)
  ROOT %call = (f32[8,128]{1,0}, s8[4096]{0}) custom-call(%p1, %weight), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
}

ENTRY %main (w: bf16[4,128,64], x: bf16[8,64]) -> f32[8,128] {
  %w = bf16[4,128,64]{2,1,0} parameter(0)
  %x = bf16[8,64]{1,0} parameter(1)
  %y = (f32[8,128]{1,0}, s8[4096]{0}) fusion(%w, %x), kind=kCustom, calls=%dynamic-slice-fusion
  ROOT %r = f32[8,128]{1,0} get-tuple-element(%y), index=0
}
"""


@pytest.mark.parametrize("target", ["__cublas$lt$matmul", "__cublas$gemm", "__cublas$lt$matmul$f8", "__triton$gemm"])
def test_a_library_s_product_of_a_slice(target: str) -> None:
    ((_, _, moved),) = Judge(Module(LIBRARY.replace("__cublas$lt$matmul", target))).kernels()
    assert moved == Traffic(1, 2 * (128 * 64 + 8 * 64), 4 * 8 * 128, 2 * 8 * 128 * 64)


def test_a_library_s_product_over_two_axes_and_batches() -> None:
    text = """HloModule batches

ENTRY %main (x: bf16[3,8,4,16], w: bf16[3,4,16,32]) -> f32[3,8,32] {
  %x = bf16[3,8,4,16]{3,2,1,0} parameter(0)
  %w = bf16[3,4,16,32]{3,2,1,0} parameter(1)
  ROOT %y = f32[3,8,32]{2,1,0} custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={\
"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2","3"]}}}
}
"""
    assert Judge(Module(text)).total().operations == 2 * (3 * 8 * 32) * (4 * 16)


def convolved(call: str, first: str, second: str, result: str) -> int:
    """Operations of a program that is one convolution."""
    text = f"""HloModule convolution

ENTRY %main (a: {first}, b: {second}) -> {result} {{
  %a = {first} parameter(0)
  %b = {second} parameter(1)
  ROOT %y = {result} {call}
}}
"""
    return Judge(Module(text)).total().operations


# A convolution over 20 steps with a kernel of 7: 24 input channels in two groups, 10 output channels.
INPUT, WEIGHTS, OUTPUT = "bf16[2,26,24]", "bf16[10,7,12]", "bf16[2,20,10]"
LABELS = "window={size=7}, dim_labels=b0f_o0i->b0f, feature_group_count=2"
EXPECTED = 2 * (2 * 20 * 10) * 7 * 12


def test_a_convolution() -> None:
    assert convolved(f"convolution(%a, %b), {LABELS}", INPUT, WEIGHTS, OUTPUT) == EXPECTED
    for kind in ("Forward", "BiasActivationForward"):
        call = f'custom-call(%a, %b), {LABELS}, custom_call_target="__cudnn$conv{kind}"'
        assert convolved(call, INPUT, WEIGHTS, f"({OUTPUT}, u8[4096])") == EXPECTED


def test_derivatives_of_a_convolution() -> None:
    of_input = f'custom-call(%a, %b), {LABELS}, custom_call_target="__cudnn$convBackwardInput"'
    assert convolved(of_input, OUTPUT, WEIGHTS, f"({INPUT}, u8[64])") == EXPECTED
    of_kernel = f'custom-call(%a, %b), {LABELS}, custom_call_target="__cudnn$convBackwardFilter"'
    assert convolved(of_kernel, INPUT, OUTPUT, f"({WEIGHTS}, u8[64])") == EXPECTED


def test_a_convolution_over_two_axes_whose_input_is_spread() -> None:
    call = "convolution(%a, %b), window={size=3x4 pad=2_2x3_3 lhs_dilate=2x2}, dim_labels=b01f_01io->b01f"
    # Of the kernel's twelve elements three meet an element of the input, the others zeros between.
    assert convolved(call, "f32[1,9,9,5]", "f32[3,4,5,6]", "f32[1,19,20,6]") == 2 * (19 * 20 * 6) * 12 * 5 // 4


# What leaves a kernel in another type, order or shape: alone, or as one of several results.
LEAVES = """HloModule leaves

%fused (p0: bf16[64,128]) -> f32[64,128] {
  %p0 = bf16[64,128]{1,0} parameter(0)
  ROOT %out = f32[64,128]{1,0} convert(%p0)
}

ENTRY %main (x: bf16[64,128]) -> f32[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  ROOT %y = f32[64,128]{1,0} fusion(%x), kind=kLoop, calls=%fused
}
"""


@pytest.mark.parametrize(
    "root",
    [
        "ROOT %out = f32[64,128]{1,0} convert(%p0)",
        "%out = f32[64,128]{1,0} convert(%p0)\n  ROOT %both = (f32[64,128]{1,0}, f32[64,128]{1,0}) tuple(%out, %out)",
        "%out = f32[64,128]{1,0} convert(%p0)\n  ROOT %flat = f32[8192]{0} bitcast(%out)",
        "%out = bf16[128,64]{1,0} transpose(%p0), dimensions={1,0}\n  ROOT %both = (bf16[128,64]{1,0}) tuple(%out)",
        "%a = bf16[8192]{0} bitcast(%p0)\n  %out = bf16[8192]{0} copy(%a)\n  ROOT %r = (bf16[8192]{0}) tuple(%out)",
    ],
)
def test_what_leaves_a_kernel_was_read_whole(root: str) -> None:
    text = LEAVES.replace("ROOT %out = f32[64,128]{1,0} convert(%p0)", root)
    assert Judge(Module(text)).total().read == 64 * 128 * 2


def test_a_cache_that_is_updated_among_several_results_is_not_read() -> None:
    text = LOOP.replace("ROOT %update = ", "%update = ").replace(
        "dynamic-update-slice(%p0, %slot, %p2, %zero, %zero)\n",
        "dynamic-update-slice(%p0, %slot, %p2, %zero, %zero)\n"
        "  ROOT %both = (f32[8,16,64]{2,1,0}, f32[1,1,64]{2,1,0}) tuple(%update, %slot)\n",
    )
    moved = {op.name: one for op, _, one in Judge(Module(text)).kernels()}
    assert (moved["d"].read, moved["d"].written) == (8 * (64 * 4 + 4), 8 * 2 * 64 * 4)
