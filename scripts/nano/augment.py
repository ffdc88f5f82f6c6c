"""Change sounds as rooms, microphones, telephones and other speakers would, and make sounds that are no speech.

Sounds are float32 [samples] at 16 kHz with a peak of about one, until `leveled` says how loud the whole is. A pace, a
pitch or a tract is a factor, and 1 changes nothing: of the duration, of the frequency that is spoken at, and of the
frequencies of the formants.
"""

from collections.abc import Callable
from io import BytesIO

import numpy as np

from scripts.nano.voices import RATE

WINDOW, HOP = 512, 128
# Coefficients of the cepstrum that describe the vocal tract; with more, formants move less than they are told to.
TRACT_COEFFICIENTS = 12
LONGEST_SECONDS = 4.0
# A sound ends at least this long before the longest.
LEAST_SILENCE_SECONDS = 0.1


def varied(draw: np.random.Generator, sound: np.ndarray, crowd: Callable[[], np.ndarray]) -> np.ndarray:
    """Speech [samples] as it is trained on; crowd: makes other people's speech."""
    if draw.random() < 0.7:
        sound = other_voice(draw, sound)
    if draw.random() < 0.4:
        sound = in_room(draw, sound)
    if draw.random() < 0.4:
        sound = colored(draw, sound)
    sound = placed(draw, sound, 0.8)
    if draw.random() < 0.6:
        sound = mixed(sound, noise(draw, len(sound), crowd), float(draw.uniform(4, 35)))
    band = draw.random()
    if band < 0.25:
        sound = telephoned(draw, sound)
    elif band < 0.35:
        sound = compressed(draw, sound)
    return leveled(sound, float(draw.uniform(-30, 0)))


def mild(draw: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """Speech [samples] as it is tested: with silence around it, louder or quieter, half of it with a little noise."""
    sound = placed(draw, sound, 0.4)
    if draw.random() < 0.5:
        sound = mixed(sound, draw.standard_normal(len(sound)), float(draw.uniform(25, 40)))
    return leveled(sound, float(draw.uniform(-15, -1)))


def other_voice(draw: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """The same words [samples] of someone of another pace, pitch and tract, [other samples]."""
    tract = float(np.exp(draw.uniform(-0.18, 0.18)))
    pitch = tract * float(np.exp(draw.uniform(-0.2, 0.2)))
    return respoken(sound, float(np.exp(draw.uniform(-0.25, 0.25))), pitch, tract)


def respoken(sound: np.ndarray, pace: float = 1.0, pitch: float = 1.0, tract: float = 1.0) -> np.ndarray:
    """The same words of another voice, [other samples]: resampled for its pitch, stretched by a phase vocoder."""
    moved = np.interp(np.arange(0, len(sound) - 1, pitch), np.arange(len(sound)), sound)
    begins = np.arange(0, len(moved), HOP / (pace * pitch)).astype(int)
    padded = np.pad(moved, (WINDOW // 2 + HOP, WINDOW))
    window = np.hanning(WINDOW + 1)[:-1]
    places = begins[:, None] + np.arange(WINDOW)
    before, now = (np.fft.rfft(padded[places + shift] * window) for shift in (0, HOP))
    # Each frame's phases advance as they did within a hop of the sound.
    advance = now * np.conj(before)
    advance[0] = now[0]
    sizes = np.abs(now) * _moved_tract(np.abs(now), tract / pitch)
    frames = np.fft.irfft(sizes * np.exp(1j * np.cumsum(np.angle(advance), axis=0))) * window
    made = np.zeros(len(frames) * HOP + WINDOW)
    for i in range(WINDOW // HOP):
        # Frames that are a whole window apart do not overlap.
        part = frames[i :: WINDOW // HOP].reshape(-1)
        made[i * HOP : i * HOP + len(part)] += part
    made = made[WINDOW // 2 : WINDOW // 2 + len(frames) * HOP]
    return made / max(np.abs(made).max(), 1e-9)


def _moved_tract(sizes: np.ndarray, factor: float) -> np.ndarray:
    """What to multiply spectra [frames, bins] by, for their envelopes to move up by a factor."""
    cepstra = np.fft.irfft(np.log(sizes + 1e-5))
    cepstra[:, TRACT_COEFFICIENTS : WINDOW - TRACT_COEFFICIENTS + 1] = 0
    envelopes = np.fft.rfft(cepstra).real
    bins = envelopes.shape[1]
    source = np.clip(np.arange(bins) / factor, 0, bins - 1)
    low = np.minimum(source.astype(int), bins - 2)
    moved = envelopes[:, low] + (source - low) * (envelopes[:, low + 1] - envelopes[:, low])
    return np.exp(np.clip(moved - envelopes, -3, 3))


def in_room(draw: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """A sound [samples] in a room whose echoes fade within 0.1 to 0.6 seconds."""
    from scipy.signal import fftconvolve

    seconds = float(draw.uniform(0.1, 0.6))
    size = int(seconds * RATE)
    echoes = draw.standard_normal(size) * np.exp(-6.9 * np.arange(size) / size)
    # Walls swallow high frequencies first.
    echoes = np.convolve(echoes, np.exp(-np.arange(8) / draw.uniform(0.3, 3)), "same")
    echoes[: int(draw.uniform(0.001, 0.01) * RATE)] = 0
    echoes *= draw.uniform(0.1, 0.9) / np.sqrt(np.sum(np.square(echoes)))
    echoes[0] = 1
    return fftconvolve(sound, echoes)[: len(sound) + size // 3]


def colored(draw: np.random.Generator, sound: np.ndarray, decibels: float = 10) -> np.ndarray:
    """A sound [samples] through a microphone that favours some frequencies, by up to some decibels."""
    gains = draw.uniform(-decibels, decibels, 8)
    bins = len(sound) // 2 + 1
    gain = np.interp(np.linspace(0, 7, bins), np.arange(8), gains)
    return np.fft.irfft(np.fft.rfft(sound) * 10 ** (gain / 20), len(sound))


def fitted(sound: np.ndarray, seconds: float = LONGEST_SECONDS - 2 * LEAST_SILENCE_SECONDS) -> np.ndarray:
    """A sound [samples], faster where it would last longer than some seconds."""
    longest = seconds * RATE
    return sound if len(sound) <= longest else respoken(sound, longest / len(sound))


def placed(draw: np.random.Generator, sound: np.ndarray, seconds: float) -> np.ndarray:
    """A sound [samples] with up to some seconds of silence before and after it, half a second to four in all."""
    sound = fitted(sound)
    left = LONGEST_SECONDS * RATE - len(sound)
    before, after = (int(min(draw.uniform(0.05, seconds) * RATE, left / 2)) for _ in range(2))
    return np.pad(sound, (before, max(after, RATE // 2 - len(sound) - before)))


def noise(draw: np.random.Generator, size: int, crowd: Callable[[], np.ndarray]) -> np.ndarray:
    """What is heard behind speech: hiss, rumble, hum or other people, [size]."""
    kind = draw.random()
    if kind < 0.6:
        return hiss(draw, size)
    if kind < 0.75:
        return hum(draw, size)
    people = np.zeros(size)
    for _ in range(int(draw.integers(3, 7))):
        speech = crowd()[:size]
        begin = int(draw.integers(0, size - len(speech) + 1))
        people[begin : begin + len(speech)] += speech * draw.uniform(0.3, 1)
    return people + 0.05 * hiss(draw, size)


def hiss(draw: np.random.Generator, size: int, slope: float | None = None) -> np.ndarray:
    """Noise from white (slope 0) over pink to brown (1), [size]; by default of any slope."""
    slope = float(draw.uniform(0, 1)) if slope is None else slope
    spectrum = np.fft.rfft(draw.standard_normal(size))
    spectrum *= np.maximum(np.arange(len(spectrum)), size * 40 / RATE) ** -slope
    sound = np.fft.irfft(spectrum, size)
    return sound / np.sqrt(np.mean(np.square(sound)))


def hum(draw: np.random.Generator, size: int) -> np.ndarray:
    """The hum of the mains with its overtones, [size]."""
    base = float(draw.choice((50.0, 60.0)))
    times = np.arange(size) / RATE
    parts = [draw.uniform() / k * np.sin(2 * np.pi * (base * k * times + draw.random())) for k in range(1, 12)]
    sound = np.sum(parts, axis=0) + 0.02 * hiss(draw, size)
    return sound / np.sqrt(np.mean(np.square(sound)))


def mixed(sound: np.ndarray, other: np.ndarray, decibels: float) -> np.ndarray:
    """A sound [samples] with another of its length, quieter than its speech by some decibels."""
    loud = np.square(sound[np.abs(sound) > 0.05 * np.abs(sound).max()])
    level = np.sqrt(np.mean(loud) / max(np.mean(np.square(other)), 1e-12))
    return sound + other * level * 10 ** (-decibels / 20)


def telephoned(draw: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """A sound [samples] at 8 kHz, half the time within the band and with the codes of a telephone."""
    from scipy.signal import butter, resample_poly, sosfilt

    narrow = resample_poly(sound, 1, 2)
    if draw.random() < 0.5:
        edges = draw.uniform(150, 350), draw.uniform(3000, 3800)
        narrow = np.asarray(sosfilt(butter(3, edges, "bandpass", fs=RATE // 2, output="sos"), narrow))
        narrow = narrow / max(np.abs(narrow).max(), 1e-9)
        coded = np.round(np.sign(narrow) * np.log1p(255 * np.abs(narrow)) / np.log(256) * 127) / 127
        narrow = np.sign(coded) * (256 ** np.abs(coded) - 1) / 255
    return resample_poly(narrow, 2, 1)[: len(sound)]


def compressed(draw: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """A sound [samples] through MP3 of some bit rate."""
    import soundfile

    file = BytesIO()
    sound = sound / max(np.abs(sound).max(), 1e-9)
    level = float(draw.uniform(0.3, 0.99))
    soundfile.write(file, 0.9 * sound, RATE, format="MP3", compression_level=level, bitrate_mode="CONSTANT")
    file.seek(0)
    heard = soundfile.read(file, dtype="float32")[0]
    return np.pad(heard, (0, max(0, len(sound) - len(heard))))[: len(sound)]


def leveled(sound: np.ndarray, decibels: float) -> np.ndarray:
    """A sound [samples] with a peak of some decibels of full scale."""
    return (sound / max(np.abs(sound).max(), 1e-9) * 10 ** (decibels / 20)).astype(np.float32)


def beep(draw: np.random.Generator, hertz: float) -> np.ndarray:
    """One steady tone of 0.15 to 1 second, [samples]."""
    times = np.arange(int(draw.uniform(0.15, 1) * RATE)) / RATE
    return _tone(times, hertz, float(draw.uniform(0, 0.3)), 0)


def music(draw: np.random.Generator, base: float) -> np.ndarray:
    """Four to nine notes of a scale above `base` (hertz) one after another, some of them chords, [samples]."""
    scale = np.array([0, 2, 4, 5, 7, 9, 11, 12])
    beat, timbre, fade = float(draw.uniform(0.15, 0.4)), float(draw.uniform(0.2, 0.7)), float(draw.uniform(1, 8))
    times = np.arange(int(beat * RATE)) / RATE
    notes, last = [], -1
    for _ in range(int(draw.integers(4, 10))):
        last = int(draw.choice([step for step in range(8) if step != last]))
        steps = [scale[last], *(scale[last] + interval for interval in (4, 7) if draw.random() < 0.3)]
        notes.append(sum((_tone(times, base * 2 ** (step / 12), timbre, fade) for step in steps), np.zeros(len(times))))
    return fitted(np.concatenate(notes))


def _tone(times: np.ndarray, hertz: float, timbre: float, fade: float) -> np.ndarray:
    """A tone with overtones, each `timbre` times as loud as the one below it, that dies away."""
    sound = sum(
        (timbre**k * np.sin(2 * np.pi * hertz * (k + 1) * times) for k in range(6) if hertz * (k + 1) < RATE / 2),
        np.zeros(len(times)),
    )
    edges = np.minimum(1, np.minimum(np.arange(len(times)), np.arange(len(times))[::-1]) / (0.005 * RATE))
    return sound * edges * np.exp(-fade * times)
