"""How many floating-point operations an instruction's products compute, from shapes alone.

XLA's own products and convolutions count, those of cuBLAS, cuDNN and Triton, the grouped products of experts and the
kernel of causal attention. Kernels whose mathematics no shape tells, such as that of one token's attention, count none.
"""

import re
from collections.abc import Mapping
from math import prod

from scripts.aot.hlo import ARRAY, Op

# Kernels that read only the experts which some row has chosen.
GROUPED = "ragged_dot"
# The kernel of causal attention within whole sequences.
ATTENTION = "flash_attention"
# A product or a convolution of a library: the targets of its calls.
LIBRARY_PRODUCT = re.compile(r'custom_call_target="__(?:cublas|triton)[^"]*(?:gemm|matmul)[^"]*"', re.IGNORECASE)
LIBRARY_CONVOLUTION = re.compile(r'custom_call_target="__cudnn\$conv(\w*)"')
# Dimensions that a product sums over: of an instruction, or in the configuration of a library's call.
CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]')
# A convolution's kernel, one letter or digit for each of its dimensions, and by how much zeros spread its input.
KERNEL, SPREAD = re.compile(r"dim_labels=\w+_(\w+)->"), re.compile(r"lhs_dilate=([\dx]+)")
# How cuDNN calls the derivatives of a convolution.
GRADIENT_OF_INPUT, GRADIENT_OF_KERNEL = "BackwardInput", "BackwardFilter"


def operations(op: Op, named: Mapping[str, Op]) -> int:
    """Floating-point operations of one instruction, whose operands are among `named`; a fusion's own are not seen."""
    if op.opcode not in ("dot", "convolution", "custom-call"):
        return 0
    given = [named.get(name) for name in op.operands[:2]]
    first, second = (shape_of(value.result) if value else () for value in (given + [None, None])[:2])
    if op.opcode == "dot" or LIBRARY_PRODUCT.search(op.text):
        return 2 * count_of(op.result) * _summed(op, first)
    library = LIBRARY_CONVOLUTION.search(op.text)
    if op.opcode == "convolution" or library:
        return _of_convolution(op, first, second, library[1] if library else "")
    if GROUPED in op.text and first:
        return 2 * count_of(op.result) * first[-1]
    # Queries [..., T, N, H] and keys [..., S, K, H]: two products, half of each, because no query sees later keys.
    return 2 * count_of(op.result) * second[-3] if ATTENTION in op.text and len(second) >= 3 else 0


def _summed(op: Op, left: tuple[int, ...]) -> int:
    """The length over which a product sums, from the shape of its left operand; 0 where that is not known."""
    found = CONTRACTED.search(op.text)
    dims = re.findall(r"\d+", found[1]) if found else []
    return prod(left[int(i)] for i in dims) if left else 0


def _of_convolution(op: Op, first: tuple[int, ...], second: tuple[int, ...], kind: str) -> int:
    """Of a convolution or, by cuDNN's `kind`, of one of its derivatives: the same products, summed otherwise.

    Each output element is a sum over the kernel's elements and the input channels of its group: over all dimensions of
    the kernel but that of output channels.
    """
    output, kernel = shape_of(op.result), second
    if kind == GRADIENT_OF_INPUT:
        output = first
    elif kind == GRADIENT_OF_KERNEL:
        output, kernel = second, output
    labels, spread = KERNEL.search(op.text), SPREAD.search(op.text)
    if not labels or not kernel:
        return 0
    terms = prod(kernel) // kernel[labels[1].index("o")]
    # Zeros between the input's elements, as in a transposed convolution, are multiplied with nothing.
    zeros = prod(map(int, spread[1].split("x"))) if spread else 1
    return 2 * prod(output) * terms // zeros


def shape_of(result: str) -> tuple[int, ...]:
    """The shape of the first array of a result's type."""
    found = ARRAY.search(result)
    return tuple(int(n) for n in found[2].split(",") if n) if found else ()


def count_of(result: str) -> int:
    """The elements of the first array of a result's type."""
    return prod(shape_of(result))
