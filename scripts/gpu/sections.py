"""The sections of the GPU check, the most important ones first, and the steps of each for a shape, "full" or "tiny".

Nothing heavy is imported before a section is made, in a process of its own.
"""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.gpu.sizes import (
    decode_name,
    frame_name,
    piece_name,
    prefill_name,
    sizes_of,
    sound_name,
    speech_prompt_name,
)
from scripts.gpu.steps import Fact, Step, once, run_steps

KERNEL_ON = {"OMNI_JAX_DECODE_KERNEL": "on"}
KERNEL_OFF = {"OMNI_JAX_DECODE_KERNEL": "off"}
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", "tokamax", "qwix", "torch", "transformers",
            "nvidia-cudnn-cu13", "nvidia-cublas")  # fmt: skip
# Rows of one layer of experts.
EXPERT_ROWS = {"full": (1, 8, 32, 512, 8192), "tiny": (1, 8)}


@dataclass(frozen=True)
class Section:
    """What makes its steps, the environment of its process, and the seconds that it may take at most."""

    steps: Callable[[str], list[Step]]
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 200.0


def versions(shape: str) -> list[Step]:
    """What runs here."""
    return [Step("versions", read_versions, 5.0)]


def read_versions() -> list[Fact]:
    """Packages, device and memory."""
    import importlib.metadata

    import jax

    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    found["cores"] = os.cpu_count()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    found |= {"devices": len(jax.devices()), "device": device.device_kind, "cuDNN loaded": cudnn_version()}
    found |= {"memory GB": memory.get("bytes_limit", 0) / 1e9, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    return [Fact(name, str(value)) for name, value in found.items()]


def cudnn_version() -> str:
    """The cuDNN that JAX loads, or why there is none."""
    try:
        from jax._src.lib import cuda_versions
    except ImportError:
        return "none"
    try:
        return str(cuda_versions.cudnn_get_version()) if cuda_versions else "none"
    except RuntimeError as error:
        return str(error)


def correctness(shape: str) -> list[Step]:
    """Backends of experts, attention, positions, cache, a tiny Thinker, Talker and vocoder against NumPy and CPU."""
    from scripts.gpu import correct, correct_speech

    checks = (
        correct.check_moe, correct.check_moe_int8, correct.check_attention, correct.check_cache, correct.check_rope,
        correct.check_top_k,
        correct.check_thinker, correct_speech.check_talker, correct_speech.check_code2wav,
    )  # fmt: skip
    return [Step(check.__name__.removeprefix("check_"), check) for check in checks]


def kernel_correctness(shape: str) -> list[Step]:
    """One token's attention by the kernel, alone and within a tiny Thinker and Talker."""
    from scripts.gpu import correct, correct_speech

    checks = (correct.check_decode_kernel, correct.check_thinker, correct_speech.check_talker)
    return [Step(f"{check.__name__.removeprefix('check_')}, kernel on", check) for check in checks]


def text(shape: str) -> list[Step]:
    """The Thinker's steps, prompts and verified rounds, random weights."""
    from scripts.gpu import speed, speed_drafts

    sizes = sizes_of(shape)
    model = once(lambda: speed.make_model(shape, sizes.dtype))
    drafting = once(lambda: speed_drafts.make_drafting(model(), shape))
    decode = [Step(decode_name(*c), lambda c=c: speed.decodes(model(), *c)) for c in sizes.decode]
    prefill = [Step(prefill_name(n), lambda n=n: speed.prefills(model(), n)) for n in sizes.prefill]
    slots = sizes.decode[0][1]
    verify = [
        Step(f"verify 1 x {n}, {slots} slots", lambda n=n: speed_drafts.rounds(drafting(), n, slots))
        for n in sizes.verify
    ]
    piece = Step(piece_name(*sizes.piece), lambda: speed.pieces(model(), *sizes.piece))
    # The first of each kind, then the others.
    first, others = ((*decode[kind], *prefill[kind], *verify[kind]) for kind in (slice(1), slice(1, None)))
    return [*first, piece, *others]


def kernel_text(shape: str) -> list[Step]:
    """The Thinker's steps with the kernel of one token's attention."""
    from scripts.gpu import speed

    sizes = sizes_of(shape)
    model = once(lambda: speed.make_model(shape, sizes.dtype))
    return [Step(decode_name(*c), lambda c=c: speed.decodes(model(), *c)) for c in sizes.decode]


def speech(shape: str) -> list[Step]:
    """The Talker's frames and prompt, and the vocoder, random weights."""
    from scripts.gpu import speed_speech as speed

    sizes = sizes_of(shape)
    vocoder = once(lambda: speed.make_vocoder(shape, sizes.dtype))
    speaker = once(lambda: speed.make_speaker(shape, sizes.dtype))
    frames = [
        Step(frame_name(rows), lambda rows=rows: speed.frames(speaker(), rows, sizes.frame_slots))
        for rows in sizes.frames
    ]
    sounds = [Step(sound_name(*c), lambda c=c: speed.sounds(vocoder(), *c)) for c in sizes.sound]
    columns = sizes.speech_prompt
    prompt = Step(speech_prompt_name(columns), lambda: speed.prompts(speaker(), columns))
    return [frames[0], sounds[0], *frames[1:], prompt, *sounds[1:]]


def kernel_speech(shape: str) -> list[Step]:
    """The Talker's frames with the kernel of one token's attention."""
    from scripts.gpu import speed_speech as speed

    sizes = sizes_of(shape)
    speaker = once(lambda: speed.make_speaker(shape, sizes.dtype))
    return [
        Step(frame_name(rows), lambda rows=rows: speed.frames(speaker(), rows, sizes.frame_slots))
        for rows in sizes.frames
    ]


def reply(shape: str) -> list[Step]:
    """A whole spoken reply, streamed: first audio, seconds per second of sound."""
    from scripts.gpu.reply import our_reply

    return [Step("a spoken reply", lambda: our_reply(sizes_of(shape)), 30.0)]


def start(shape: str) -> list[Step]:
    """Cold start to the first token with programs in the cache."""
    from scripts.gpu.start import starts

    return [Step("cold start", lambda: starts(shape), 30.0)]


def theirs(shape: str) -> list[Step]:
    """Transformers' times of the same programs, where it is installed."""
    from scripts.gpu.theirs import their_steps

    return their_steps(sizes_of(shape))


def int8(shape: str) -> list[Step]:
    """The Thinker with its experts in eight bits: memory and steps."""
    from scripts.gpu import speed

    sizes = sizes_of(shape)
    model = once(lambda: speed.make_model(shape, sizes.dtype, "int8"))
    decode = [
        Step(f"{decode_name(*c)}, int8", lambda c=c: speed.decodes(model(), *c, mark=", int8 experts"))
        for c in sizes.decode[:2]
    ]
    return [Step("memory, int8", lambda: speed.weights_in_memory(model())), *decode]


def kernels(shape: str) -> list[Step]:
    """Copy bandwidth, products of one row, and one layer of experts by each backend."""
    from omni_jax.config import OmniConfig
    from scripts.gpu import speed
    from scripts.small.configs import config_dict

    config = OmniConfig.from_hf(config_dict(shape)).thinker
    experts = [
        Step(f"experts, {rows} rows", lambda rows=rows: speed.expert_backends(config, (rows,)))
        for rows in EXPERT_ROWS[shape]
    ]
    bandwidth = Step("bandwidth", lambda: speed.bandwidth(4.0 if shape == "full" else 0.01))
    return [bandwidth, Step("products of one row", lambda: speed.one_row_products(config)), *experts]


def profiles(shape: str) -> list[Step]:
    """Where the time of a step and of a frame goes."""
    from scripts.gpu import speed, speed_speech

    sizes = sizes_of(shape)
    rows, slots = sizes.profiled

    def step() -> list[Any]:
        return speed.decode_profile(speed.make_model(shape, sizes.dtype), rows, slots)

    def frame() -> list[Any]:
        return speed_speech.frame_profile(speed_speech.make_speaker(shape, sizes.dtype), rows, sizes.frame_slots)

    return [Step("profile of a frame", frame), Step("profile of a step", step)]


SECTIONS: dict[str, Section] = {
    "versions": Section(versions, seconds=40.0),
    "correctness": Section(correctness, KERNEL_OFF, 120.0),
    "text": Section(text, KERNEL_OFF),
    "speech": Section(speech, KERNEL_OFF),
    "kernel_correctness": Section(kernel_correctness, KERNEL_ON, 60.0),
    "kernel_text": Section(kernel_text, KERNEL_ON),
    "kernel_speech": Section(kernel_speech, KERNEL_ON),
    # As users run it, who have the kernel where it agrees.
    "reply": Section(reply),
    "start": Section(start),
    # Torch has the device to itself.
    "theirs": Section(theirs, {"JAX_PLATFORMS": "cpu"}),
    "int8": Section(int8),
    "kernels": Section(kernels),
    "profiles": Section(profiles),
}


def run_section(name: str, shape: str, file: str, deadline: str) -> None:
    """Run one section in this process until `deadline`, as of `time.time`, and write what it finds to `file`."""
    run_steps(SECTIONS[name].steps(shape), Path(file), float(deadline))
