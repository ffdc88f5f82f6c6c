"""Whole numbers of four or eight bits out of the 32-bit words that quantised checkpoints pack them into, and scaled.

compressed-tensors packs along `in`, GPTQ along `in` of the transposed weight, both pack zero points along `out`; all
put the first number into the lowest bits of a word. NumPy only.

Sources: compressed-tensors `pack_to_int32`; AutoGPTQ `QuantLinear.pack`; GPTQModel
`convert_gptq_v1_to_v2_format_module`.
"""

import numpy as np

WORD_BITS = 32
# A one in every number of a word, by its bits: what a word of GPTQ's zero points lacks.
ONES = {4: 0x11111111, 8: 0x01010101}


def unpacked(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The numbers uint8 [R, count] that are packed along the rows of words int32 [R, W]; bits: 4 or 8."""
    numbers = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        pairs = np.empty((*numbers.shape, 2), np.uint8)
        np.bitwise_and(numbers, 15, out=pairs[..., 0])
        np.right_shift(numbers, 4, out=pairs[..., 1])
        numbers = pairs.reshape(len(numbers), 2 * numbers.shape[1])
    return numbers[:, :count]


def plus_one(words: np.ndarray, bits: int) -> np.ndarray:
    """Words of zero points int32 [G, W] as GPTQ's first version stores them, less one each, with that one added.

    Whole words are added to, as they were subtracted from: a zero point of 0 has borrowed from its neighbour.
    """
    return (words.view(np.uint32) + np.uint32(ONES[bits])).view(np.int32)


def rescaled(
    numbers: np.ndarray, zeros: np.ndarray | float, scales: np.ndarray, groups: np.ndarray | None
) -> np.ndarray:
    """(numbers - zeros) * scales, float32 [R, C].

    Args:
        numbers: [R, C], of any type.
        zeros: the zero points [R, G], or one for all.
        scales: [R, G], or [1, G] for all rows, of any type.
        groups: the group of each column, int [C]; None where groups are equal runs of columns.
    """
    result = numbers.astype(np.float32)
    view = result.reshape(len(result), scales.shape[1], -1) if groups is None else result

    def spread(held: np.ndarray) -> np.ndarray:
        held = held.astype(np.float32)
        return held[..., None] if groups is None else held[:, groups]

    if isinstance(zeros, np.ndarray):
        view -= spread(zeros)
    elif zeros:
        view -= np.float32(zeros)
    view *= spread(scales)
    return result
