"""Sound: samples equal to transformers' loader, log-mel within 1e-4 of both of its paths, and named errors."""

import io
import json
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from omni_jax.errors import ConfigError, InputError
from omni_jax.inputs.audio import MIN_SAMPLES, load_audio, log_mel, token_count
from omni_jax.inputs.settings import AudioSettings
from tests.helpers.sounds import RATE, encode, in_container, noise


@pytest.fixture(scope="module")
def public(data_dir: Path) -> dict:
    return json.loads((data_dir / "public_preprocessor_config.json").read_text())


@pytest.fixture(scope="module")
def speech(data_dir: Path) -> np.ndarray:
    return load_audio(data_dir / "debian_universal_os.flac")


@pytest.mark.parametrize("changes", [{}, {"feature_size": 80}], ids=["128 bins", "80 bins"])
@pytest.mark.parametrize("seconds", [MIN_SAMPLES / RATE, 0.05, 0.5, 3.0, 5.407, 31.3])
def test_log_mel_is_that_of_both_reference_paths(public, speech, seconds, changes):
    module = pytest.importorskip("transformers.models.whisper.feature_extraction_whisper")
    values = public | changes
    reference = module.WhisperFeatureExtractor(**values)
    clip = np.tile(speech, 6)[: round(seconds * RATE)]
    clip[len(clip) // 2 :] *= 1e-3  # quiet enough to reach the floor
    mel = log_mel(clip, AudioSettings.from_hf(values))
    assert mel.dtype == np.float32 and mel.shape == (values["feature_size"], len(clip) // 160)
    out = reference(clip, sampling_rate=RATE, padding=True, truncation=False, return_attention_mask=True)
    assert out["attention_mask"].sum() == mel.shape[1]
    np.testing.assert_allclose(mel, out["input_features"][0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(mel, reference._np_extract_fbank_features([clip], "cpu")[0], atol=1e-4, rtol=0)


def test_the_floor_follows_from_the_frames_that_are_kept(public):
    module = pytest.importorskip("transformers.models.whisper.feature_extraction_whisper")
    clip = np.zeros(3200, np.float32)
    clip[-60:] = 5 * noise(60 / RATE)  # loudest in the frame that is dropped
    mel = log_mel(clip, AudioSettings.from_hf(public))
    expected = module.WhisperFeatureExtractor(**public)(clip, sampling_rate=RATE, padding=True, truncation=False)
    np.testing.assert_allclose(mel, expected["input_features"][0], atol=1e-4, rtol=0)
    assert mel.min() == pytest.approx(mel.max() - 2, abs=1e-6)  # 8 decades, divided by 4


@pytest.mark.parametrize("samples, frames, change", [(32_000, 200, 0.01), (32_100, 201, 0.0)])
def test_in_a_batch_the_reference_hears_zeros_at_the_end_of_a_shorter_clip(public, speech, samples, frames, change):
    """The deliberate difference: ours is the reference's spectrogram of the clip alone."""
    module = pytest.importorskip("transformers.models.whisper.feature_extraction_whisper")
    clip = speech[:samples]
    out = module.WhisperFeatureExtractor(**public)(
        [speech, clip], sampling_rate=RATE, padding=True, truncation=False, return_attention_mask=True
    )
    mel = log_mel(clip, AudioSettings.from_hf(public))
    difference = np.abs(out["input_features"][1][:, : mel.shape[1]] - mel)
    assert out["attention_mask"][1].sum() == frames and mel.shape[1] == 200
    assert difference[:, :-1].max() < 1e-4 and difference[:, -1].max() >= change


def test_silence_has_a_log_mel(public):
    mel = log_mel(np.zeros(1600, np.float32), AudioSettings.from_hf(public))
    np.testing.assert_allclose(mel, -1.5, rtol=1e-6)


def test_token_counts_equal_the_reference():
    module = pytest.importorskip("transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe")
    for n_window in (49, 50, 51, 52):
        lengths = np.arange(1, 1000)
        expected = module._get_feat_extract_output_lengths(lengths, n_window)
        assert [token_count(int(n), 2 * n_window) for n in lengths] == expected.tolist()
    assert token_count(3100, 100) == 403 and token_count(6200, 100) == 806  # 31 s and 62 s


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_equal_the_reference(tmp_path, kind, rate, channels):
    load = pytest.importorskip("transformers.audio_utils").load_audio
    path = tmp_path / "clip"
    sound = np.stack([noise(0.7, rate), np.sin(np.arange(round(0.7 * rate)) / 9) / 3], 1)[:, :channels]
    path.write_bytes(encode(sound, rate, kind))
    expected = load(str(path), RATE, backend="soundfile")
    for source in (path, str(path), path.read_bytes()):
        samples = load_audio(source)
        assert samples.dtype == np.float32 and samples.shape == (11_200,)
        np.testing.assert_allclose(samples, expected, atol=1e-6, rtol=0)


def test_an_mp3_without_a_length_is_read_to_its_end():
    sound = np.sin(np.arange(5 * 44_100) / 20) * np.linspace(0, 0.9, 5 * 44_100)
    data = io.BytesIO()
    soundfile.write(data, sound, 44_100, format="MP3", bitrate_mode="VARIABLE", compression_level=0.9)
    tagged = data.getvalue()
    np.testing.assert_allclose(
        load_audio(tagged), load_audio(soundfile.read(io.BytesIO(tagged))[0], 44_100), atol=1e-4, rtol=0
    )
    untagged = tagged[tagged.index(b"\xff\xfb", 10) :]  # the first frame holds nothing but the length
    assert load_audio(untagged).size / RATE == pytest.approx(5, abs=0.1)


def test_a_container_is_read_like_a_file(data_dir, speech):
    samples = load_audio(data_dir / "hello_with_speech.mp4")  # the same recording, through AAC
    assert abs(len(samples) - len(speech)) < 0.1 * RATE
    n = 2 ** int(np.ceil(np.log2(len(samples) + len(speech))))
    likeness = np.fft.irfft(np.fft.rfft(samples, n) * np.conj(np.fft.rfft(speech, n)))
    assert likeness.argmax() == 0  # AAC's priming samples are dropped
    assert likeness[0] > 0.9 * np.linalg.norm(samples) * np.linalg.norm(speech)


@pytest.mark.parametrize(
    "dtype, scale", [(np.int8, 128), (np.int16, 32768), (np.int32, 2**31), (np.float64, 1), (np.float16, 1)]
)
def test_arrays_of_every_sample_type(dtype, scale):
    wave = np.clip(noise(0.1), -0.9, 0.9)
    samples = load_audio((wave * scale).astype(dtype), RATE)
    np.testing.assert_allclose(samples, wave, atol=1.01 / min(scale, 2000) if scale > 1 else 1e-3)
    unsigned = load_audio(np.round(wave * 128 + 128).astype(np.uint8), RATE)
    np.testing.assert_allclose(unsigned, wave, atol=1 / 128)


@pytest.mark.parametrize("dtype", [">i2", ">i4", ">f4", ">f8", "<i2"])
@pytest.mark.parametrize("rate", [np.int64(RATE), np.float32(RATE), np.uint16(RATE), float(RATE)], ids=repr)
def test_numbers_of_numpy_are_numbers_in_either_byte_order(dtype, rate):
    wave = np.clip(noise(0.1), -0.9, 0.9)
    scale = 1 if "f" in dtype else -float(np.iinfo(dtype).min)
    samples = load_audio((wave * scale).astype(dtype), rate)
    assert samples.dtype == np.float32 and samples.dtype.isnative
    np.testing.assert_allclose(samples, wave, atol=2**-15)


def test_the_channels_of_an_array_are_mixed_whichever_axis_they_are_on():
    left, right = noise(0.2, 8000), noise(0.4, 8000)[1600:]
    expected = load_audio((left + right) / 2, 8000)
    np.testing.assert_allclose(load_audio(np.stack([left, right]), 8000), expected, atol=1e-6)
    np.testing.assert_allclose(load_audio(np.stack([left, right], 1), 8000), expected, atol=1e-6)


def test_long_sound_is_not_cut(public):
    mel = log_mel(load_audio(noise(70.0, 8000), 8000), AudioSettings.from_hf(public))
    assert mel.shape == (128, 7000)


def test_a_wav_written_to_a_pipe_and_a_flac_without_a_length_are_read():
    wav = bytearray(encode(noise(0.5)))
    wav[4:8] = wav[40:44] = b"\xff" * 4
    assert load_audio(bytes(wav)).size == 8000
    flac = bytearray(encode(noise(0.5), kind="FLAC"))
    flac[21] &= 0xF0  # the low bits of 36 that hold the number of samples
    flac[22:26] = bytes(4)
    assert load_audio(bytes(flac)).size == 8000


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "FLAC", "OGG"])
def test_a_second_recording_is_not_dropped_without_a_word(kind):
    one = encode(noise(0.5), kind=kind)
    with pytest.raises(InputError, match="several recordings"):
        load_audio(one + one)


def test_a_cover_picture_is_no_obstacle():
    flac = encode(noise(0.5), kind="FLAC")
    picture = b"\0\0\0\3" + b"\0\0\0\x09image/png" + bytes(20) + b"\0\0\0\0"
    block = bytes([6]) + len(picture).to_bytes(3, "big") + picture
    assert load_audio(flac[:42] + block + flac[42:]).size == 8000


def wav_with(offset: int, value: int, size: int) -> bytes:
    """A WAV whose header lies."""
    data = bytearray(encode(noise(0.5)))
    data[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(data)


def cut(kind: str, keep: float) -> bytes:
    data = encode(noise(2.0), kind=kind)
    return data[: round(len(data) * keep)]


def spoilt(kind: str) -> bytes:
    data = bytearray(encode(noise(2.0), kind=kind))
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    return bytes(data)


BAD = {
    "url": ("http://example.com/a.wav", "is a URL"),
    "concat": ("concat:a.wav|b.wav", "is a URL"),
    "missing": ("no/such/sound.wav", "no such file"),
    "base64": ("UklGRiQAAABXQVZF" * 1000, "cannot be opened .File name too long.$"),
    "directory": (Path(__file__).parent, "not a regular file"),
    "empty": (b"", "is empty"),
    "text": (b"this is not sound at all" * 20, "not a media file"),
    "hls": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "playlist"),
    "ffconcat": (b"ffconcat version 1.0\nfile a.wav\n", "playlist"),
    "indented playlist": (b"\xef\xbb\xbf\n#EXTM3U\nhttp://example.com/a.ts", "playlist"),
    "none": (None, "pass a path"),
    "list": ([0.0, 0.1], "pass a path"),
    "header only": (encode(np.zeros(0)), "holds no samples"),
    "rate of 1 Hz": (wav_with(24, 1, 4), "a rate of 1 "),
    "rate of 2 GHz": (wav_with(24, 2**31 - 1, 4), "a rate of 2147483647"),
    "1000 channels": (wav_with(22, 1000, 2), "1000 channels"),
    "200 samples": (encode(noise(200 / RATE)), "at least 201"),
    "too short once resampled": (encode(noise(0.012, 48_000), 48_000), "at least 201"),
    "NaN": (encode(np.full(5000, np.nan), subtype="FLOAT"), "NaN"),
    "infinite": (encode(np.full(5000, np.inf), subtype="FLOAT"), "infinite"),
    "cut FLAC": (cut("FLAC", 0.6), "cut short or damaged"),
    "FLAC without its last bytes": (cut("FLAC", 0.995), "cut short or damaged"),
    "spoilt FLAC": (spoilt("FLAC"), "cut short or damaged"),
    "cut WAV": (cut("WAV", 0.6), "cut short"),
    "cut AIFF": (cut("AIFF", 0.6), "cut short"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_have_named_errors(case):
    source, message = BAD[case]
    with pytest.raises(InputError, match=message):
        load_audio(source)


@pytest.mark.parametrize(
    "array, rate, message",
    [
        (noise(1), None, "sampling_rate"),
        (noise(1), "16000", "sampling_rate"),
        (noise(1), 1, "a rate of 1 "),
        (noise(1), float("nan"), "a rate of nan"),
        (noise(1)[:200], RATE, "at least 201"),
        (np.zeros(0, np.float32), RATE, "no samples"),
        (np.zeros((2, 0), np.float32), RATE, "shape"),
        (np.full(1000, np.nan), RATE, "NaN"),
        (noise(1) * 32768, RATE, "full scale 1"),
        (np.zeros(1000, np.int64), RATE, "dtype int64"),
        (np.zeros(1000, bool), RATE, "dtype bool"),
        (np.zeros(1000, complex), RATE, "dtype complex128"),
        (np.zeros((100, 100)), RATE, "shape"),
        (np.zeros((1, 2, 1000)), RATE, "shape"),
        (np.float32(0.0) * np.zeros(()), RATE, "shape"),
        (noise(1), True, "sampling_rate"),
        (noise(1), np.complex64(RATE), "sampling_rate"),
        (noise(1), 10**400, "a rate of more than 1e12"),
        (np.full(1000, 1e300), RATE, "infinite"),
        (np.array([0.5] * 1000, object), RATE, "dtype object"),
        (np.zeros(1000, [("left", "f4"), ("right", "f4")]), RATE, "dtype .*left"),
        (np.lib.stride_tricks.as_strided(noise(1), (10**11,), (0,)), RATE, "longer than 3600 s"),
        (np.lib.stride_tricks.as_strided(noise(1), (32, 10**10), (0, 0)), RATE, "longer than 3600 s"),
    ],
)
def test_bad_arrays_have_named_errors(array, rate, message):
    with pytest.raises(InputError, match=message):
        load_audio(np.asarray(array), rate)


def test_a_file_states_its_own_rate(data_dir):
    with pytest.raises(InputError, match="leave out sampling_rate"):
        load_audio(data_dir / "flite_slt_fox.flac", RATE)


def test_the_longest_clip_can_be_set(data_dir):
    for load in (
        partial(load_audio, data_dir / "flite_slt_fox.flac"),
        partial(load_audio, data_dir / "hello_with_speech.mp4"),
        partial(load_audio, noise(3), RATE),
    ):
        assert load(max_seconds=6.0).size > 2 * RATE
        with pytest.raises(InputError, match="longer than 1 s"):
            load(max_seconds=1.0)


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "GSM", "mov", "array", "channels", "channels first"])
def test_a_span_of_a_sound_is_read_without_the_rest(form):
    """The limit is of the span, and is looked at before what is outside is held."""
    whole = np.random.default_rng(0).integers(-9000, 9000, (3 * RATE, 2), np.int16)
    if form in ("WAV", "FLAC", "OGG"):
        source, rate = encode(whole, kind=form), None
    elif form == "GSM":  # whose codec cannot seek
        source, rate = encode(whole[:, 0], kind="WAV", subtype="GSM610"), None
    elif form == "mov":
        source, rate = in_container("mov", "pcm_s16le", whole), None
    else:
        source, rate = {"array": whole[:, 0], "channels": whole, "channels first": whole.T}[form], RATE
    full = load_audio(source, rate)
    for start, end in ((0.5, 1.25), (0.0, 1.0), (2.9, None), (2.5, 9.0), (1.0001, 1.9999)):
        first, last = int(start * RATE), 3 * RATE if end is None else min(int(end * RATE), 3 * RATE)
        span = load_audio(source, rate, max_seconds=1.0, start=start, end=end)
        assert abs(span.size - (last - first)) <= 1
        np.testing.assert_allclose(span[: last - first], full[first : first + span.size], atol=1e-6, rtol=0)
    for start, end in ((0.0, None), (1.5, None), (1.0, 2.5)):
        with pytest.raises(InputError, match="longer than 1 s"):
            load_audio(source, rate, max_seconds=1.0, start=start, end=end)
    with pytest.raises(InputError, match="no sound from 3 s on; it lasts 3 s"):
        load_audio(source, rate, start=3.0)


@pytest.mark.filterwarnings("error")
def test_infinite_samples_of_a_file_are_one_sentence():
    samples = np.stack([np.full(8000, np.inf), np.full(8000, -np.inf)], axis=1)
    with pytest.raises(InputError, match="NaN or infinite samples"):
        load_audio(encode(samples, subtype="FLOAT"))


def test_what_precedes_a_span_is_not_decoded(monkeypatch):
    seen = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, n, **o: seen.append((self.tell(), n)) or read(self, n, **o)
    )
    load_audio(encode(noise(3.0)), start=1.0, end=1.5)
    assert seen[0] == (RATE, RATE // 2) and sum(n for _, n in seen) == RATE // 2


def test_a_claimed_length_is_refused_before_it_is_allocated():
    flac = bytearray(encode(noise(0.5), kind="FLAC"))
    flac[21] |= 0x0F
    flac[22:26] = b"\xff" * 4
    with pytest.raises(InputError, match="longer than 3600 s"):
        load_audio(bytes(flac))


def test_sound_that_ends_early_without_a_complaint_is_refused(monkeypatch):
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, frames, **options: read(self, 1000, **options)[:999])
    with pytest.raises(InputError, match="cut short or damaged, 7992 of 8000 samples"):
        load_audio(encode(noise(0.5)))


def test_a_container_that_lacks_its_last_bytes_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mov"), "w", options={"movflags": "faststart"}) as out:
        track = out.add_stream("pcm_s16le", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.arange(RATE).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        out.mux(track.encode(frame))
        out.mux(track.encode(None))
    whole = (tmp_path / "a.mov").read_bytes()
    assert load_audio(whole).size == RATE
    with pytest.raises(InputError, match="cut short or damaged"):
        load_audio(whole[:-20])


@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_f32le"])
@pytest.mark.parametrize("channels", [1, 2, 8, 9, 16, 32])
def test_all_channels_of_a_container_are_mixed(channels, codec):
    """PyAV reads beyond a frame's memory where it has more than eight planes."""
    samples = np.random.default_rng(0).integers(-9000, 9000, (RATE, channels), np.int16)
    sound = load_audio(in_container("mov", codec, samples))
    np.testing.assert_allclose(sound, (samples / 32768).mean(axis=1), atol=1e-7, rtol=0)


def test_a_video_without_sound_is_refused(data_dir):
    with pytest.raises(InputError, match="holds no sound"):
        load_audio(data_dir / "hello_silent.mp4")


def test_a_spectrogram_needs_more_than_half_a_fourier_window(public):
    with pytest.raises(InputError, match="more than 200 samples"):
        log_mel(np.zeros(200, np.float32), AudioSettings.from_hf(public))


@pytest.mark.parametrize("change", [{"sampling_rate": 24_000}, {"dither": 0.1}, {"n_fft": "400"}, {"hop_length": 0}])
def test_unusable_settings_are_refused(public, change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        AudioSettings.from_hf(public | change)
