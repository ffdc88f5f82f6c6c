"""The voices of spoken digits, who is trained on and who only tested, and the clips of each.

    synthesis.make_voices -> voices/<voice>/<digits>-<take>.wav, at the voice's own rate -> Bank -> [samples] at 16 kHz

| kind | trained on | only tested |
|---|---|---|
| recorded | fsdd: george, jackson; the packages spokennumbers and captcha | fsdd: nicolas, lucas; asterisk: allison |
| kokoro (Kokoro-82M) | 50 voices of women and men, of several languages | sky, liam, lily, lewis |
| flite | awb, slt, kal, kal16 | rms |
| festival | slt (HTS), kal and ked (diphones) | |
| espeak | 38 accents and variants | en-us+f3, en+m5 |

The strings of digits are split as well: `is_held`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from omni_jax.inputs.audio import load_audio
from scripts.nano.rows import Split, pick

Kind = Literal["recorded", "kokoro", "flite", "festival", "espeak"]
# Of a hundred rows, whose voice is of which kind.
SHARES: dict[Kind, int] = {"recorded": 30, "kokoro": 35, "flite": 10, "festival": 5, "espeak": 20}
RATE = 16_000
# A clip is trimmed where its 10 ms RMS is below this share of its loudest.
QUIET = 0.01
MARGIN_SECONDS, FADE_SECONDS = 0.03, 0.01


@dataclass(frozen=True)
class Voice:
    """Who speaks: `name` is also a folder's, `own` what its source calls it."""

    kind: Kind
    own: str
    split: Split

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.own}"


def _voices(kind: Kind, train: str, test: str) -> tuple[Voice, ...]:
    return (*(Voice(kind, own, "train") for own in train.split()), *(Voice(kind, own, "test") for own in test.split()))


VOICES: tuple[Voice, ...] = (
    *_voices("recorded", "george jackson spokennumbers captcha", "nicolas lucas allison"),
    *_voices("flite", "awb slt kal kal16", "rms"),
    *_voices("festival", "cmu_us_slt_arctic_hts kal_diphone ked_diphone", ""),
    *_voices(
        "espeak",
        "en-us en-gb en-gb-scotland en-gb-x-rp en-gb-x-gbclan en-gb-x-gbcwmd en-029 en-us+m1 en+m2 "
        "en-us+m3 en-gb-scotland+m4 en-029+m6 en-us-nyc+m7 en-us+m8 en-us+f1 en+f2 en-gb-x-rp+f4 "
        "en-gb-x-gbclan+f5 en-us+klatt en+klatt2 en-us+klatt3 en-029+klatt4 en-us+whisper en+whisperf "
        "en-us+croak en+grandma en-us-nyc+grandpa en-us+belinda en+steph en-us+linda en-us+anika en+aunty "
        "en-us+iven en+edward en-us+gustave en-us+quincy en-gb-scotland+max en-us+travis",
        "en-us+f3 en+m5",
    ),
    *_voices(
        "kokoro",
        "af_alloy af_aoede af_bella af_heart af_jessica af_kore af_nicole af_nova af_river af_sarah am_adam am_echo "
        "am_eric am_fenrir am_michael am_onyx am_puck am_santa bf_alice bf_emma bf_isabella bm_daniel bm_fable "
        "bm_george ef_dora em_alex em_santa ff_siwis hf_alpha hf_beta hm_omega hm_psi if_sara im_nicola jf_alpha "
        "jf_gongitsune jf_nezumi jf_tebukuro jm_kumo pf_dora pm_alex pm_santa zf_xiaobei zf_xiaoni zf_xiaoxiao "
        "zf_xiaoyi zm_yunjian zm_yunxi zm_yunxia zm_yunyang",
        "af_sky am_liam bf_lily bm_lewis",
    ),
)


def is_held(digits: Sequence[int]) -> bool:
    """Whether a string of several digits is only tested."""
    return sum((i + 1) * digit for i, digit in enumerate(digits)) % 7 == 0


def draw_string(draw: np.random.Generator, split: Split) -> tuple[int, ...]:
    """Two to five digits of a split."""
    while True:
        digits = tuple(int(digit) for digit in draw.integers(0, 10, int(draw.integers(2, 6))))
        if is_held(digits) == (split == "test"):
            return digits


@dataclass(frozen=True)
class Bank:
    """The clips of the voices in a directory."""

    directory: Path

    def voice(self, draw: np.random.Generator, split: Split) -> Voice:
        """A voice of a split: its kind by `SHARES`, and all voices of a kind as often as each other."""
        present = [voice for voice in VOICES if voice.split == split and voice.name in _listing(self.directory)]
        kinds: list[Kind] = [kind for kind in SHARES if any(voice.kind == kind for voice in present)]
        shares = np.array([SHARES[kind] for kind in kinds], float)
        kind = kinds[int(draw.choice(len(kinds), p=shares / shares.sum()))]
        return pick(draw, [voice for voice in present if voice.kind == kind])

    def strings(self, voice: Voice) -> list[tuple[int, ...]]:
        """The strings of several digits that a voice says in one breath."""
        return [digits for digits in _listing(self.directory)[voice.name] if len(digits) > 1]

    def clip(self, draw: np.random.Generator, voice: Voice, digits: Sequence[int]) -> np.ndarray:
        """One of the takes of one digit, or of a string of `strings`: float32 [samples], without the silence around."""
        return _clip(self.directory / voice.name / pick(draw, _listing(self.directory)[voice.name][tuple(digits)]))


@lru_cache
def _listing(directory: Path) -> dict[str, dict[tuple[int, ...], list[str]]]:
    """The names of files by voice and digits."""
    found: dict[str, dict[tuple[int, ...], list[str]]] = {}
    for path in sorted(directory.glob("*-*/*-*.wav")):
        digits = tuple(int(digit) for digit in path.stem.partition("-")[0])
        found.setdefault(path.parent.name, {}).setdefault(digits, []).append(path.name)
    return found


@lru_cache(maxsize=4096)
def _clip(path: Path) -> np.ndarray:
    """A clip at 16 kHz, cut to what is heard, with soft ends and a peak of one."""
    sound = load_audio(path)
    step = RATE // 100
    levels = np.sqrt(np.mean(np.square(sound[: len(sound) // step * step].reshape(-1, step)), axis=1))
    heard = np.flatnonzero(levels > QUIET * levels.max())
    margin = int(MARGIN_SECONDS * RATE)
    sound = sound[max(0, heard[0] * step - margin) : (heard[-1] + 1) * step + margin]
    ramp = np.minimum(1, np.arange(len(sound)) / (FADE_SECONDS * RATE))
    return sound * ramp * ramp[::-1] / np.abs(sound).max()
