"""Sound: from a file to the log-mel spectrogram of the audio encoder.

Data flow: `load_audio` returns mono samples at 16 kHz, `log_mel` their spectrogram, one clip at a time, and
`token_count` the number of tokens that the encoder will make of it. `batch.pack_audio` arranges spectrograms in
windows.

Source: transformers `load_audio` (soundfile, the mean of the channels, soxr_hq) and `WhisperFeatureExtractor`.
Deliberate differences: each clip is transformed alone, where the reference's batch padding alters the last frame of the
shorter clips; clips longer than 30 s are never truncated; damaged, truncated or empty files are errors, where the
reference continues with what it could read; MP3 is decoded by PyAV, because libsndfile drops most of a file whose
header has no length (where it has one, the samples are equal). A truncated Ogg or MP3 file cannot be distinguished from
a shorter one.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.inputs.lengths import complete_length
from omni_jax.inputs.settings import SAMPLING_RATE, AudioSettings
from omni_jax.inputs.source import Source, container_in, demux, is_source, name_of, open_source, reading

if TYPE_CHECKING:
    from av import AudioFrame, Packet
    from av.audio.stream import AudioStream
    from av.container import InputContainer

MAX_SECONDS = 3600.0
MAX_SAMPLES = 3600 * 48_000  # per channel of the source: 0.7 GB as float32
MIN_SAMPLES = 201  # at 16 kHz: the Fourier window reflects 200 samples at either end
MIN_RATE, MAX_RATE = 2_000, 768_000  # samples per second; a header outside is damaged or malicious
MAX_CHANNELS = 32
UNKNOWN_LENGTH = 1 << 62  # libsndfile reports more than this for a FLAC stream that does not state its length
_TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")  # the first bytes of an MP3's tags
MAX_LEVEL = 64.0  # full scale is 1; values far above it were meant as integers

TOKENS_PER_CHUNK = 13  # a full chunk of 97 to 104 mel frames after three halving convolutions
MAX_FREQUENCY = 8000.0  # Hz; a constant of WhisperFeatureExtractor, stated in no file


def token_count(frames: int, chunk_frames: int) -> int:
    """The number of audio tokens of a clip of `frames` mel frames, convolved in chunks of `chunk_frames`."""
    rest = frames % chunk_frames
    for _ in range(3):
        rest = (rest + 1) // 2
    return frames // chunk_frames * TOKENS_PER_CHUNK + rest


def load_audio(
    source: Source | np.ndarray,
    sampling_rate: float | np.number | None = None,
    max_seconds: float = MAX_SECONDS,
    start: float = 0.0,
    end: float | None = None,
) -> np.ndarray:
    """Load sound as float32 [samples], mono at 16 kHz: from a path, bytes, or an array and its `sampling_rate`.

    An array is [samples], [channels, samples] or [samples, channels]; full scale is 1 for floats, and the range of the
    dtype for integers. max_seconds: longer sound is refused. start, end: seconds of the span that is kept, cut before
    resampling as the official utilities do. Raises InputError for sound that cannot be read, is damaged, states no
    rate, or is too short or too long.
    """
    if isinstance(source, np.ndarray):
        if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, int | float | np.integer | np.floating):
            raise InputError("audio array without a rate; give its sampling_rate in samples per second, a number")
        samples = _from_array(np.asarray(source), sampling_rate, max_seconds, start, end)
        rate = float(sampling_rate)
    elif not is_source(source):
        raise InputError(f"audio {name_of(source)}: pass a path, bytes, or a NumPy array with its sampling_rate")
    elif sampling_rate is not None:
        raise InputError(f"audio {name_of(source)}: a file states its own rate; leave out sampling_rate")
    else:
        samples, rate = read_file(source, max_seconds, start, end)
    what = f"audio {'array' if isinstance(source, np.ndarray) else name_of(source)}"
    check_samples(what, samples)
    samples = resample(samples, rate)
    if samples.size < MIN_SAMPLES:
        raise InputError(f"{what}: {samples.size} samples at 16 kHz; at least {MIN_SAMPLES} are needed")
    return samples


def _span(size: int, rate: float, start: float, end: float | None) -> tuple[int, int]:
    """The first and last sample of a span in seconds; its length is rounded as the official utilities do."""
    first = min(int(start * rate), size)
    return first, size if end is None else min(first + int((end - start) * rate), size)


def _check_start(what: str, start: float, rate: float, size: int) -> None:
    if start and start * rate >= size:
        raise InputError(f"{what}: no sound from {start:g} s on; it lasts {size / rate:g} s")


def check_header(what: str, rate: float | np.number, channels: int, samples: int, max_seconds: float) -> None:
    """Raise InputError for a rate (per second), channel count or length out of bounds, before memory is allocated."""
    if not MIN_RATE <= rate <= MAX_RATE:
        shown = f"{rate:.12g}" if abs(rate) < 1e12 or rate != rate else "more than 1e12"
        raise InputError(f"{what}: a rate of {shown} samples per second; {MIN_RATE} to {MAX_RATE} can be right")
    if not 1 <= channels <= MAX_CHANNELS:
        raise InputError(f"{what}: {channels} channels; 1 to {MAX_CHANNELS} can be mixed")
    if samples > max_seconds * rate:
        raise InputError(f"{what}: {samples / rate:.0f} s is longer than {max_seconds:.0f} s; cut it into parts")
    if samples > MAX_SAMPLES:
        raise InputError(f"{what}: {samples} samples are more than {MAX_SAMPLES}; resample it to 16 kHz first")


def check_samples(what: str, samples: np.ndarray) -> None:
    """Raise InputError if samples [samples] are empty, NaN or infinite, or have a level that only integers have."""
    if not samples.size:
        raise InputError(f"{what}: it holds no samples")
    level = float(max(np.max(samples), -np.min(samples)))
    if not np.isfinite(level):
        raise InputError(f"{what}: NaN or infinite samples; repair or cut them")
    if level > MAX_LEVEL:
        raise InputError(
            f"{what}: samples reach {level:.0f}; float samples have full scale 1: divide, or pass integers"
        )


def _from_array(
    array: np.ndarray, rate: float | np.number, max_seconds: float, start: float, end: float | None
) -> np.ndarray:
    """A span of any accepted array as mono float32 [samples]; its size is checked before anything is copied."""
    shape, dtype = array.shape, array.dtype.newbyteorder("=")
    if dtype.kind != "f" and dtype not in (np.int8, np.int16, np.int32, np.uint8):
        raise InputError(f"audio array of dtype {str(dtype)[:80]}; pass float, int16, int32 or uint8")
    if not (array.ndim == 1 or array.ndim == 2 and 1 <= min(shape) <= MAX_CHANNELS):
        raise InputError(f"audio array of shape {shape}; pass [samples], [channels, samples] or [samples, channels]")
    check_header("audio array", rate, 1, 0, max_seconds)
    rate = float(rate)
    size, axis = max(shape), int(array.ndim == 2 and shape[1] < shape[0])  # of two axes, channels are the shorter
    first, last = int(start * rate), size if end is None else min(int(end * rate), size)
    _check_start("audio array", start, rate, size)
    check_header("audio array", rate, 1, last - first, max_seconds)
    array = array[first:last] if array.ndim == 1 or axis else array[:, first:last]
    with np.errstate(over="ignore", invalid="ignore"):  # values too large for float32 become infinite and are refused
        if array.ndim == 2:
            array = array.mean(axis, dtype=np.result_type(dtype, np.float32))
        array = array.astype(np.float32)
    if dtype.kind == "f":
        return array
    return (array - 128) / 128 if dtype == np.uint8 else array / -float(np.iinfo(dtype).min)


def read_file(
    source: Source, max_seconds: float = MAX_SECONDS, start: float = 0.0, end: float | None = None
) -> tuple[np.ndarray, int]:
    """Mono float32 [samples] and their rate, read by libsndfile or, for formats unknown to it, by FFmpeg.

    Limits and errors as in `load_audio`, which checks the samples too.
    """
    import soundfile

    what = f"audio {name_of(source)}"
    with open_source(source, "audio") as file, reading(source, "audio"):
        complete_length(file, what)
        try:
            with soundfile.SoundFile(file) as sound:
                # libsndfile estimates the length of an MP3 without a length tag, and drops the rest.
                if sound.frames < UNKNOWN_LENGTH and not sound.subtype.startswith("MPEG"):
                    return _read_sound(sound, what, max_seconds, start, end), sound.samplerate
        except soundfile.LibsndfileError:
            pass  # a format unknown to libsndfile; errors while reading a known one are InputErrors already
        file.seek(0)
        with container_in(file) as container:
            samples, rate, _ = read_track(container, what, max_seconds, start, end)
    return samples, rate


def _skip(sound: Any, samples: int) -> None:
    """Skip `samples` in an open soundfile.SoundFile by reading, for codecs of telephony, which cannot seek."""
    while samples > 0 and (read := len(sound.read(min(samples, 1 << 20), dtype="float32"))):
        samples -= read


def _read_sound(sound: Any, what: str, max_seconds: float, start: float, end: float | None) -> np.ndarray:
    """A span of an open soundfile.SoundFile as mono float32 [samples]."""
    import soundfile

    first, last = _span(sound.frames, sound.samplerate, start, end)
    check_header(what, sound.samplerate, sound.channels, last - first, max_seconds)
    _check_start(what, start, sound.samplerate, sound.frames)
    samples, filled = np.empty(last - first, np.float32), 0
    try:
        if sound.seekable():
            sound.seek(first)
        else:
            _skip(sound, first)
        # Not sound.blocks: where a file ends early, it returns stale values of its buffer.
        while (block := sound.read(min(last - first - filled, 1 << 20), dtype="float32", always_2d=True)).size:
            with np.errstate(invalid="ignore", over="ignore"):  # infinite samples are refused later, with a clear error
                samples[filled : filled + len(block)] = block.mean(axis=1)
            filled += len(block)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{what}: cut short or damaged ({error})") from None
    if filled < samples.size:
        raise InputError(f"{what}: cut short or damaged, {filled} of {samples.size} samples could be read")
    return samples


def read_track(
    container: "InputContainer", what: str, max_seconds: float, start: float = 0.0, end: float | None = None
) -> tuple[np.ndarray, int, float]:
    """Decode the first sound track of a container, or a span of it.

    start, end: of the span, in seconds from the first sample. Returns mono float32 [samples], their rate per second,
    and the time in seconds at which the track starts. Raises InputError for a track that is damaged or out of bounds.
    """
    stream = _sound_stream(container, what)
    rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
    check_header(what, rate, channels, 0, max_seconds)
    first, last = _span(UNKNOWN_LENGTH, rate, start, end)
    blocks, at, count, begin = [], 0, 0, 0.0
    for block, seconds in _decode_track(container, stream, what, rate):
        begin = begin if at else seconds
        blocks.append(block[max(first - at, 0) : max(last - at, 0)])
        at, count = at + block.size, count + blocks[-1].size
        check_header(what, rate, channels, count, max_seconds)
        if at >= last:
            break
    _check_start(what, start, rate, at)
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), rate, begin


def _sound_stream(container: "InputContainer", what: str) -> "AudioStream":
    """The first sound track whose codec FFmpeg knows."""
    tracks = container.streams.audio
    if not tracks:
        raise InputError(f"{what}: it holds no sound")
    known = [track for track in tracks if track.codec_context is not None]
    if not known:
        raise InputError(f"{what}: its sound is of a codec that FFmpeg does not know; convert it to FLAC")
    return known[0]


def _decode_track(
    container: "InputContainer", stream: "AudioStream", what: str, rate: int
) -> Iterator[tuple[np.ndarray, float]]:
    """Mono float32 blocks of a sound track, and the time of each in seconds."""
    from av import AudioResampler

    # Changes the sample format only, to packed samples: PyAV reads at most eight planes of a frame.
    packed = AudioResampler(format="flt")
    for packet in demux(container, stream, what):
        for frame in _decode(stream, packet, container.size):
            if frame.sample_rate != rate:
                raise InputError(f"{what}: its rate changes from {rate} to {frame.sample_rate}; convert it to FLAC")
            for part in packed.resample(frame):
                samples = part.to_ndarray().reshape(-1, part.layout.nb_channels)
                yield np.ascontiguousarray(samples.T).mean(axis=0), frame.time or 0.0


def _decode(stream: "AudioStream", packet: "Packet", file_bytes: int) -> "list[AudioFrame]":
    """The frames of a packet; none for parts of an MP3 that are not sound: tags anywhere, and padding at its end."""
    from av.error import InvalidDataError

    try:
        return stream.codec_context.decode(packet)
    except InvalidDataError:
        data = bytes(packet)
        padding = len(set(data)) == 1 and (packet.pos or 0) + len(data) >= file_bytes
        if stream.codec_context.codec.canonical_name == "mp3" and (data.startswith(_TAGS) or padding):
            return []
        raise


def resample(samples: np.ndarray, rate: float) -> np.ndarray:
    """Resample float32 [samples] from `rate` to 16 kHz, by soxr at high quality."""
    if rate == SAMPLING_RATE:
        return samples
    import librosa

    return librosa.resample(samples, orig_sr=rate, target_sr=SAMPLING_RATE, res_type="soxr_hq").astype(np.float32)


@lru_cache(maxsize=4)
def _mel_filters(settings: AudioSettings) -> np.ndarray:
    import librosa

    bins, n_fft = settings.mel_bins, settings.n_fft
    return librosa.filters.mel(sr=SAMPLING_RATE, n_fft=n_fft, n_mels=bins, fmax=MAX_FREQUENCY, norm="slaney")


def log_mel(samples: np.ndarray, settings: AudioSettings) -> np.ndarray:
    """The log-mel spectrogram float32 [M, frames] of one clip, float32 [samples] at 16 kHz; frames = samples // hop.

    Values are at least those 8 decades below the loudest bin of the clip.
    """
    import librosa

    if samples.ndim != 1 or samples.size <= settings.n_fft // 2:
        raise InputError(
            f"audio of shape {samples.shape}; more than {settings.n_fft // 2} samples [samples] are needed"
        )
    # Reflected here, exactly as librosa would, because librosa warns about clips shorter than the window.
    padded = np.pad(samples, settings.n_fft // 2, mode="reflect")
    spectrum = librosa.stft(padded, n_fft=settings.n_fft, hop_length=settings.hop_samples, window="hann", center=False)
    power = np.square(np.abs(spectrum[:, :-1]))  # the reference drops the last frame
    mel = np.log10(np.maximum(_mel_filters(settings) @ power, 1e-10))
    return (np.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0
