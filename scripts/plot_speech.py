"""Draw a spoken reply to a PNG: its waveform, its mel spectrogram and its codes, on one axis of time.

    python -m scripts.plot_speech --model ckpt/ --text "Who are you?" --out speech.png

Without `--model`, `--sound FILE` draws the waveform and the spectrogram of any sound file.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import librosa
import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from omni_jax.errors import OmniError
from omni_jax.models.code2wav import SAMPLES_PER_SECOND

MEL_BINS, HOP_SAMPLES, LOUDEST_TO_QUIETEST_DB = 80, 240, 80.0


@dataclass(frozen=True)
class Plot:
    """Draw a spoken reply, or a sound file."""

    out: Path
    """The picture to write."""
    model: Path | None = None
    """Checkpoint that speaks, in any form that `omni_jax.load` takes."""
    text: str = "Who are you?"
    speaker: str = "ethan"
    max_new_tokens: int = 32
    max_frames: int = 100
    seed: int = 0
    sound: Path | None = None
    """A sound file to draw instead."""


def draw_wave(axes: Axes, samples: np.ndarray, rate: int) -> None:
    """Draw samples float [n] over seconds."""
    axes.plot(np.arange(len(samples)) / rate, samples, linewidth=0.4, color="#1f4e79")
    axes.set(ylabel="amplitude", ylim=(-1.02, 1.02))


def draw_mel(axes: Axes, samples: np.ndarray, rate: int) -> None:
    """Draw the mel spectrogram of samples float [n], in decibels below its loudest point."""
    power = librosa.feature.melspectrogram(y=samples, sr=rate, n_mels=MEL_BINS, hop_length=HOP_SAMPLES, n_fft=1024)
    decibels = librosa.power_to_db(power, ref=np.max, top_db=LOUDEST_TO_QUIETEST_DB)
    seconds = decibels.shape[1] * HOP_SAMPLES / rate
    picture = axes.imshow(
        decibels, origin="lower", aspect="auto", cmap="magma", interpolation="nearest", extent=(0, seconds, 0, MEL_BINS)
    )
    axes.set(ylabel="mel band")
    axes.figure.colorbar(picture, ax=axes, label="dB", pad=0.01)


def draw_codes(axes: Axes, codes: np.ndarray, seconds: float) -> None:
    """Draw codes int [Q, frames], one row per codebook, the first at the top."""
    picture = axes.imshow(
        codes, aspect="auto", cmap="viridis", interpolation="nearest", extent=(0, seconds, len(codes) - 0.5, -0.5)
    )
    axes.set(ylabel="codebook", yticks=range(0, len(codes), 3))
    axes.figure.colorbar(picture, ax=axes, label="code", pad=0.01)


def draw(samples: np.ndarray, rate: int, codes: np.ndarray | None, title: str, out: Path) -> None:
    """Write the picture of samples float32 [n] and, if given, of codes int [Q, frames]."""
    if len(samples) == 0:
        raise SystemExit("there is no sound to draw: the reply has no spoken token")
    rows, seconds = 2 if codes is None else 3, len(samples) / rate
    figure, axes = plt.subplots(rows, 1, figsize=(11, 2.6 * rows), sharex=True, layout="constrained")
    figure.suptitle(title, fontsize=11)
    draw_wave(axes[0], samples, rate)
    draw_mel(axes[1], samples, rate)
    if codes is not None:
        draw_codes(axes[2], codes, seconds)
    axes[-1].set(xlabel="seconds", xlim=(0, seconds))
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main() -> None:
    """Draw what the command line asks for."""
    options = tyro.cli(Plot, prog="python -m scripts.plot_speech", description=__doc__)
    if (options.model is None) == (options.sound is None):
        sys.exit("give either --model or --sound")
    if options.sound is not None:
        samples, rate = librosa.load(options.sound, sr=None, mono=True)
        draw(samples, int(rate), None, options.sound.name, options.out)
        return
    import omni_jax as oj

    try:
        reply = oj.load(str(options.model)).generate(
            [{"role": "user", "content": options.text}], max_new_tokens=options.max_new_tokens, seed=options.seed,
            speech=True, speaker=options.speaker, max_frames=options.max_frames,
        )  # fmt: skip
    except OmniError as error:
        sys.exit(str(error))
    assert not isinstance(reply, list) and reply.audio is not None
    title = f"{options.speaker}: {reply.text.strip()[:70]!a}, {reply.stats['frames']} frames"
    draw(reply.audio, SAMPLES_PER_SECOND, reply.codes, title, options.out)


if __name__ == "__main__":
    main()
