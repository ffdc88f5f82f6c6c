"""From codes to sound on the host: whole code sequences, streams, and the reference's way of cutting them.

`vocode_chunk` is the one compiled step. Its callers cut codes into chunks, so that memory is bounded and a stream is
heard early. Where a chunk ends depends on how many frames came before it alone, so that a stream gives the very samples
that whole codes give: programs of other sizes round differently. The last chunk may end in padding, which leaves
nothing in the state.

Replies that begin and end at different times have a `Vocoder` each, or go through `vocode` one by one when they end:
both run the programs of one row, whatever the number of replies.

Codes are NumPy integers [B, Q, F]: rows, quantizers, frames. Sound is float32 in [-1, 1] at
`models.code2wav.SAMPLES_PER_SECOND`; F frames give `samples_of(config, F)` samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from omni_jax.config import Code2WavConfig
from omni_jax.decode.compiling import LOOP_OPTIONS
from omni_jax.errors import InputError
from omni_jax.inputs.memory import check_memory
from omni_jax.models.code2wav import VocoderState
from omni_jax.models.param import Declaration, bind
from omni_jax.sharding import replicate

# Frames of a chunk at first, and of those from some frame on, which come late enough to be played without a gap, at 80
# ms a frame; and the most that a program takes over all rows: in the public model its widest array takes 0.74 MB per
# frame in float32.
SHORT, LONG, LONG_FROM = 4, 16, 64
MAX_FRAMES = 256
# The forms of codes, and their numbers of axes.
ONE_ROW, ROWS = "[Q, F]", "[B, Q, F]"
RANKS = {ONE_ROW: 2, ROWS: 3}


@dataclass(frozen=True)
class PaddedCodes:
    """What one step takes: codes int32 [B, Q, F], of which the first `count` frames are real, the others padding."""

    codes: np.ndarray
    count: int


@partial(jax.jit, static_argnames=("rows", "declaration"), keep_unused=True)
def start(params: dict, *, rows: int, declaration: Declaration) -> VocoderState:
    """The state of `rows` rows before their first frame, bound to the devices of the parameters.

    So it is once a chunk has run; `vocode_chunk` would compile twice for one that is not. Hence `keep_unused`.
    """
    return bind(declaration, params).start(rows).laid_over(declaration.mesh)


@partial(jax.jit, static_argnames="declaration", donate_argnames="state", compiler_options=LOOP_OPTIONS)
def vocode_chunk(
    params: dict, codes: jax.Array, state: VocoderState, count: jax.Array | int, *, declaration: Declaration
) -> tuple[jax.Array, VocoderState]:
    """Codes int32 [B, Q, F], of which the first `count` frames are real -> float32 [B, F * total_upsample], next state.

    The samples lag by `lost_samples`: the first ones of a row, this number of them, lie before its beginning.
    """
    sound = bind(declaration, params)(codes, state, count)
    return replicate(sound.wave, declaration.mesh), sound.state.laid_over(declaration.mesh)


def compile_first(params: dict, declaration: Declaration, config: Code2WavConfig, rows: int) -> None:
    """Compile the program of the first chunks of `rows` rows, and run none of it."""
    codes = np.zeros((rows, config.num_quantizers, SHORT), np.int32)
    state = start(params, rows=rows, declaration=declaration)
    vocode_chunk.lower(params, codes, state, np.int32(SHORT), declaration=declaration).compile()


def samples_of(config: Code2WavConfig, frames: int) -> int:
    """Samples that `frames` frames give."""
    return max(frames * config.total_upsample - config.lost_samples, 0)


def vocode(
    params: dict,
    declaration: Declaration,
    config: Code2WavConfig,
    codes: np.ndarray,
    lengths: Sequence[int] | np.ndarray | None = None,
) -> list[np.ndarray]:
    """The sound of each row of codes [B, Q, F], float32 [samples].

    params, declaration: those of Code2Wav. lengths: frames of each row, all F by default; what follows them is not
    heard and may be any code. A row of zero frames gives no samples. InputError for codes out of range or of a wrong
    shape.
    """
    codes, lengths = _check_rows(codes, lengths, config)
    if not lengths.any():
        return [np.zeros(0, np.float32) for _ in lengths]
    state = start(params, rows=codes.shape[0], declaration=declaration)
    waves = []
    for chunk in _chunks(codes[:, :, : lengths.max()]):
        wave, state = vocode_chunk(params, chunk.codes, state, np.int32(chunk.count), declaration=declaration)
        waves.append(wave)
    # Read only now: the device has all chunks to do before the host waits for one.
    sound = np.concatenate(waves, axis=1)[:, config.lost_samples :]
    return [row[: samples_of(config, n)] for row, n in zip(sound, lengths.tolist(), strict=True)]


def vocode_like_reference(
    params: dict,
    declaration: Declaration,
    config: Code2WavConfig,
    codes: np.ndarray,
    lengths: Sequence[int] | np.ndarray | None = None,
    piece: int = 300,
    context: int = 25,
) -> list[np.ndarray]:
    """As `vocode`, but the way that the reference does it: every `piece` frames afresh, after `context` frames.

    Each piece, the first one too, is `lost_samples` short, and hears no more of what went before than its context. For
    comparisons with the reference; `vocode` has neither flaw. Float32 [samples] for each row of codes [B, Q, F].
    """
    codes, lengths = _check_rows(codes, lengths, config)
    if piece < 1 or context < 0:
        raise InputError(f"pieces of {piece} frames with a context of {context}; give at least 1 and at least 0")
    rows: list[list[np.ndarray]] = [[] for _ in codes]
    for begin in range(0, lengths.max(initial=0), piece):
        early = min(context, begin)
        part = codes[:, :, begin - early : begin + piece]
        inside = np.clip(lengths - (begin - early), 0, part.shape[2])
        for row, wave in zip(rows, vocode(params, declaration, config, part, inside), strict=True):
            row.append(wave[early * config.total_upsample :])
    return [np.concatenate([np.zeros(0, np.float32), *row]) for row in rows]


class Vocoder:
    """Sound from a stream of codes, given in pieces of any length: together, with the end, it is what `vocode` gives.

    Frames are heard once their chunk is full, those of the first chunk at once; `finish` gives what is left at the end.
    rows: the number of rows side by side, which have equally many frames in each piece; None for one without that axis.
    """

    def __init__(self, params: dict, declaration: Declaration, config: Code2WavConfig, rows: int | None = None):
        """params, declaration: those of Code2Wav."""
        if rows is not None and rows < 1:
            raise InputError(f"a vocoder of {rows} rows; give at least 1, or None")
        self.params, self.declaration, self.config, self.rows = params, declaration, config, rows
        self.state = self._start()
        # Of the samples that the next chunk gives: those before the beginning, and what was heard already.
        self.to_drop = config.lost_samples
        self._frames, self._left = 0, np.zeros((rows or 1, config.num_quantizers, 0), np.int32)

    def add(self, codes: np.ndarray) -> np.ndarray:
        """The new samples to be heard with the next frames of codes [Q, n], float32 [samples]; with rows, [B, ...].

        The first frames give `lost_samples` fewer. Raises InputError for codes out of range or of a wrong shape, which
        leaves the stream as it was.
        """
        self._take(codes)
        return self._heard(whole=True)

    def finish(self) -> np.ndarray:
        """The samples of the frames that are left, float32 as from `add`; no frames may come afterwards."""
        return self._heard(whole=False)

    def follow(self, codes: np.ndarray, ended: bool) -> np.ndarray:
        """The next samples, float32 [samples], of the codes [Q, F] of all frames so far; ended: all there are."""
        self._take(codes[:, self._frames + self._left.shape[2] :])
        return self._heard(whole=not ended)

    def _take(self, codes: np.ndarray) -> None:
        """Take in the next frames, as `add` does."""
        codes = check_codes(_check_shape(codes, self.config, ONE_ROW if self.rows is None else ROWS), self.config)
        codes = codes[None] if self.rows is None else codes
        if len(codes) != (self.rows or 1):
            raise InputError(f"codes have shape {list(codes.shape)}; this stream takes B = {self.rows} rows")
        self._left = np.concatenate([self._left, codes], axis=2)

    def _heard(self, whole: bool) -> np.ndarray:
        """The samples of the frames that are there, but for a last chunk that is not whole, if `whole`."""
        waves: list[np.ndarray | jax.Array] = [np.zeros((len(self._left), 0), np.float32)]
        begin, used = self._frames, 0
        for chunk in _chunks(self._left, begin):
            if whole and chunk.count < chunk.codes.shape[2]:
                if begin + used == 0:
                    return self._heard_early(chunk)
                break
            wave, self.state = self._run(chunk, self.state)
            waves.append(wave)
            used += chunk.count
        self._frames, self._left = begin + used, self._left[:, :, used:]
        return self._new(np.concatenate(waves, axis=1)[:, : used * self.config.total_upsample])

    def _heard_early(self, chunk: PaddedCodes) -> np.ndarray:
        """The samples of the first chunk as far as it goes; it runs again, and whole, when there is more of it.

        The same program gives the same samples. A next chunk that began inside it would round later ones otherwise.
        """
        end = chunk.count * self.config.total_upsample
        if end <= self.to_drop:
            return self._new(np.zeros((len(self._left), 0), np.float32))
        sound = self._new(np.asarray(self._run(chunk, self._start())[0])[:, :end])
        self.to_drop = end
        return sound

    def _new(self, sound: np.ndarray) -> np.ndarray:
        """What is new of samples [B, n] that follow those of all chunks that have run whole."""
        dropped = min(self.to_drop, sound.shape[1])
        self.to_drop -= dropped
        return sound[0, dropped:] if self.rows is None else sound[:, dropped:]

    def _start(self) -> VocoderState:
        return start(self.params, rows=self.rows or 1, declaration=self.declaration)

    def _run(self, chunk: PaddedCodes, state: VocoderState) -> tuple[jax.Array, VocoderState]:
        """The samples of a chunk after `state`, which must not be used afterwards, and the next state."""
        given = (self.params, chunk.codes, state, np.int32(chunk.count))
        return vocode_chunk(*given, declaration=self.declaration)


def as_codes(codes: Any, config: Code2WavConfig) -> np.ndarray:
    """Codes as int32 [Q, F] or [B, Q, F], whichever is given; InputError unless they are one of the two."""
    try:
        codes = np.asarray(codes)
    except ValueError as error:
        raise InputError("codes are not an array: give each row as many frames, or vocode rows one by one") from error
    rows = None if codes.ndim == 2 else len(codes) if codes.ndim else 1
    if rows == 0:
        raise InputError("codes hold no row; give [Q, F] or [B, Q, F] with at least one")
    codes = _check_shape(codes, config, ONE_ROW if rows is None else ROWS)
    frames = (rows or 1) * codes.shape[-1]
    needed = 4 * frames * (config.num_quantizers + config.total_upsample)
    check_memory(needed, f"the sound of {frames:,} frames", "vocode fewer at a time")
    return check_codes(codes, config)


def check_codes(codes: np.ndarray, config: Code2WavConfig) -> np.ndarray:
    """Codes [..., Q, F] as int32, or InputError unless they are whole numbers that the model's codebooks have."""
    if not np.issubdtype(codes.dtype, np.integer):
        raise InputError(f"codes are of type {codes.dtype}; give whole numbers")
    wrong = (codes < 0) | (codes >= config.codebook_size)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise InputError(
            f"codes{list(place)} is {codes[place]}, not one of the model's 0 to {config.codebook_size - 1}; "
            "leave out frames that are padding or hold special ids"
        )
    return codes.astype(np.int32)


def _check_shape(codes: np.ndarray, config: Code2WavConfig, form: str) -> np.ndarray:
    """The codes as an array of the form "[Q, F]" or "[B, Q, F]"; InputError for other shapes."""
    codes, Q = np.asarray(codes), config.num_quantizers
    if codes.ndim != RANKS[form] or codes.shape[-2] != Q:
        raise InputError(f"codes have shape {list(codes.shape)}; give {form} with the model's Q = {Q} codebooks")
    return codes


def _check_rows(
    codes: np.ndarray, lengths: Sequence[int] | np.ndarray | None, config: Code2WavConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Codes int32 [B, Q, F] with zeros after each row's length, and the lengths [B], all F where none are given."""
    codes = _check_shape(codes, config, ROWS)
    B, _, F = codes.shape
    lengths = np.full(B, F) if lengths is None else np.asarray(lengths)
    if lengths.shape != (B,) or not np.issubdtype(lengths.dtype, np.integer) or ((lengths < 0) | (lengths > F)).any():
        raise InputError(f"lengths {lengths.tolist()} for {B} rows of {F} frames; give a number from 0 to {F} for each")
    inside = np.arange(F) < lengths[:, None, None]
    return check_codes(np.where(inside, codes, 0).astype(codes.dtype), config), lengths


def _chunks(codes: np.ndarray, begin: int = 0) -> Iterator[PaddedCodes]:
    """Cut codes int32 [B, Q, F], whose first frame has number `begin`, into chunks; the last one is padded."""
    B, _, F = codes.shape
    at = 0
    while at < F:
        size = LONG if begin + at >= LONG_FROM and LONG * B <= MAX_FRAMES else SHORT
        chunk = codes[:, :, at : at + size]
        count = chunk.shape[2]
        yield PaddedCodes(np.pad(chunk, ((0, 0), (0, 0), (0, size - count))), count)
        at += count
