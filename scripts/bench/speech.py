"""Measure speech: Talker with code predictor, Code2Wav, time to the first audio, a whole spoken reply.

Both systems answer the same prompts with the same number of tokens and say `frames` frames of it; end marks cannot be
drawn. Text is greedy; codes are drawn as users draw them (temperature 0.9, top-k 50, penalty 1.05; residual codes top-k
50, top-p 0.8), or greedily if asked. One repetition has four parts:

- The whole reply from a prepared batch, text and sound. Ours is streamed as `Omni.stream` does it, all rows side by
  side: the time to the first audio is that to the first samples on the host. Transformers does not stream: its first
  audio is there when all is, so that its figure grows with the reply.
- The Talker by itself, about a reply that is there, for one frame (its prompt and the first frame) and for all frames.
  Frames per second, of all rows, are those beyond the first.
- Code2Wav by itself, for the codes of all frames: ours by `vocode`, theirs by `chunked_decode(300, 25)`.

Real-time factors are seconds of computing for each second of sound, the sound of all rows together.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.bench.text import text_batch
from scripts.bench.worker import Bench, System, our_system, require, their_device, their_system, timed

# A line of the table: its label, the figure, what to multiply it by, how to write it.
ROWS = (
    ("talker, frames/s", "frames_per_second", 1.0, ".1f"),
    ("talker to first frame, ms", "time_to_first_frame", 1e3, ".1f"),
    ("talker, real-time factor", "talker_factor", 1.0, ".4f"),
    ("code2wav, s", "code2wav_seconds", 1.0, ".3f"),
    ("code2wav, real-time factor", "code2wav_factor", 1.0, ".4f"),
    ("both, real-time factor", "speech_factor", 1.0, ".4f"),
    ("time to first audio, s", "time_to_first_audio", 1.0, ".3f"),
    ("whole reply, s", "reply_seconds", 1.0, ".3f"),
)
SPEAKER = "ethan"
TEMPERATURE, TOP_K, PENALTY = 0.9, 50, 1.05


def title(bench: Bench) -> str:
    """What was measured, in a line."""
    drawn = "greedy" if bench.greedy else "sampled"
    sizes = f"batch {bench.batch}, prompt {bench.prompt}, new {bench.new}, frames {bench.frames}"
    return f"speech, {bench.shape}, {bench.dtype}, {sizes}, {drawn}"


def figures(bench: Bench, seconds: dict[str, float]) -> dict[str, float]:
    """Figures from the median seconds of the parts."""
    from omni_jax.config import OmniConfig
    from omni_jax.models.code2wav import SAMPLES_PER_SECOND
    from scripts.small.configs import config_dict

    code2wav: Any = OmniConfig.from_hf(config_dict(bench.shape)).code2wav
    sound = bench.batch * bench.frames * code2wav.total_upsample / SAMPLES_PER_SECOND
    talker = seconds["first_frame"] + seconds["other_frames"]
    return {
        "frames_per_second": bench.batch * (bench.frames - 1) / seconds["other_frames"],
        "time_to_first_frame": seconds["first_frame"],
        "talker_factor": talker / sound,
        "code2wav_seconds": seconds["code2wav"],
        "code2wav_factor": seconds["code2wav"] / sound,
        "speech_factor": (talker + seconds["code2wav"]) / sound,
        "time_to_first_audio": seconds["first_audio"],
        "reply_seconds": seconds["reply"],
    }


def ours(bench: Bench, directory: Path | None) -> System:
    """Our model, from the checkpoint or with random weights."""
    return our_system(Ours(bench, directory).repeat)


def theirs(bench: Bench, directory: Path | None) -> System:
    """Their model, from the checkpoint or with random weights."""
    model = Theirs(bench, directory)
    return their_system(model.repeat, model.device)


class Ours:
    """Our model, prompts and voice."""

    def __init__(self, bench: Bench, directory: Path | None):
        import numpy as np

        from omni_jax.decode.sampling import Sampling
        from omni_jax.decode.speech.session import Voice
        from omni_jax.models.param import declare
        from omni_jax.omni import PARTS

        self.bench = bench
        self.params, config = _our_weights(bench, directory)
        assert config.talker is not None and config.code2wav is not None
        # Draws may then give no mark at all, and no code is the end.
        self.config = replace(config, talker=replace(config.talker, codec_eos_id=-1))
        self.declarations = {part: declare(module, getattr(self.config, part)) for part, module in PARTS.items()}
        self.batch = text_batch(_prompts(bench, config).astype(np.int32))
        temperature, top_k = (0.0, 0) if bench.greedy else (TEMPERATURE, TOP_K)
        self.voice = Voice(SPEAKER, Sampling(temperature, top_k, repetition_penalty=PENALTY), bench.frames)

    def repeat(self) -> dict[str, float]:
        """One repetition."""
        from omni_jax.decode.speech.vocode import vocode

        reply, (first_audio, requests) = timed(self.stream)
        first, _ = timed(lambda: self.speak(requests, 1))
        talker, codes = timed(lambda: self.speak(requests, self.bench.frames))
        seconds, sound = timed(
            lambda: vocode(self.params["code2wav"], self.declarations["code2wav"], self.config.code2wav, codes)
        )
        for row in sound:
            self._require_samples(row.shape[0])
        return {
            "reply": reply,
            "first_audio": first_audio,
            "first_frame": first,
            "other_frames": talker - first,
            "code2wav": seconds,
        }

    def stream(self) -> tuple[float, Any]:
        """Say a whole reply while it is written: seconds to the first audio, and the requests, which are done."""
        import time

        import numpy as np

        from omni_jax.decode.answers import STREAM_FRAMES, STREAM_STEPS
        from omni_jax.decode.batching import Admission, Batching
        from omni_jax.decode.engine import PlainEngine
        from omni_jax.decode.limits import Limits
        from omni_jax.decode.request import requests_for
        from omni_jax.decode.sampling import Sampling
        from omni_jax.decode.speech.vocode import Vocoder

        assert self.config.talker is not None and self.config.code2wav is not None
        start, samples, first_audio = time.perf_counter(), 0, 0.0
        rows, new, said = self.bench.batch, self.bench.new, 0
        thinker = self.params["thinker"], self.declarations["thinker"], self.config.thinker.text
        requests = requests_for(self.batch, Limits(new), [0] * rows)
        speakers, speech = self._speakers(self.bench.frames)
        batching = Batching(
            PlainEngine(*thinker, Sampling()),
            rows,
            Admission(self.batch, requests, speech),
            speakers=speakers,
            steps=STREAM_STEPS,
            frames=STREAM_FRAMES,
        )
        vocoder = Vocoder(self.params["code2wav"], self.declarations["code2wav"], self.config.code2wav, rows)
        for _ in batching.run():
            rows_of_codes = [request.speaker.codes for request in requests if request.speaker is not None]
            if rows_of_codes and rows_of_codes[0].shape[1] > said:
                codes = np.stack(rows_of_codes)[:, :, said:]
                samples, said = samples + vocoder.add(codes).shape[1], said + codes.shape[2]
                first_audio = first_audio or (time.perf_counter() - start if samples else 0.0)
        require("tokens of the reply", [len(request.token_ids) for request in requests], [new] * rows)
        self._require_samples(samples)
        return first_audio, requests

    def speak(self, requests: Any, frames: int) -> Any:
        """Codes int32 [B, Q, frames] of what requests that are done have written."""
        import numpy as np

        speakers, speech = self._speakers(frames)
        rows = speakers.fill(speech, requests)
        while not speakers.done:
            speakers.advance()
        require("frames", [row.made for row in rows], [frames] * self.bench.batch)
        return np.stack([row.codes for row in rows])

    def _speakers(self, frames: int) -> tuple[Any, Any]:
        """What says `bench.batch` rows for `frames` frames, and the prompts of that speech."""
        from omni_jax.decode.speech.speakers import Speakers, SpeechRequest

        embed, voice = self.params["thinker"]["embed"], replace(self.voice, max_frames=frames)
        talker = self.params["talker"], self.declarations["talker"]
        speakers = Speakers(*talker, lambda: embed, self.config, voice, self.bench.batch)
        return speakers, SpeechRequest.read(self.batch, voice, self.config)

    def _require_samples(self, samples: int) -> None:
        from omni_jax.decode.speech.vocode import samples_of

        assert self.config.code2wav is not None
        require("samples", samples, samples_of(self.config.code2wav, self.bench.frames))


def _our_weights(bench: Bench, directory: Path | None) -> tuple[dict, Any]:
    """Parameters of the three parts, and the configuration."""
    import jax.numpy as jnp

    from omni_jax.config import OmniConfig
    from omni_jax.models.param import init_params
    from omni_jax.omni import PARTS
    from scripts.small.configs import config_dict

    if directory is None:
        config, dtype = OmniConfig.from_hf(config_dict(bench.shape)), jnp.dtype(bench.dtype)
        return {part: init_params(cls, getattr(config, part), dtype=dtype) for part, cls in PARTS.items()}, config
    from convert import load_hf

    return load_hf(directory, dtype=bench.dtype)


class Theirs:
    """Their model and prompts."""

    def __init__(self, bench: Bench, directory: Path | None):
        import torch
        from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

        from scripts.small.configs import config_dict

        self.bench, self.device = bench, their_device(bench)
        model: Any = Qwen3OmniMoeForConditionalGeneration
        dtype = getattr(torch, bench.dtype)
        if directory is None:
            torch.set_default_dtype(dtype)
            with torch.device(self.device):
                self.model = model(Qwen3OmniMoeConfig(**config_dict(bench.shape))).eval()
        else:
            self.model = model.from_pretrained(directory, dtype=dtype).to(self.device).eval()
        self.ids = torch.tensor(_prompts(bench, self.model.config), device=self.device)
        self.speak, self.asked = self.model.talker.generate, {}
        self.model.talker.generate = self._recorded

    def _recorded(self, **asked: Any) -> Any:
        """The Talker as the whole model's `generate` calls it; keeps what it asks, to ask the Talker alone for it."""
        self.asked = asked
        return self.speak(**asked)

    def repeat(self) -> dict[str, float]:
        """One repetition."""
        import torch

        frames = self.bench.frames
        with torch.no_grad():
            reply, sound = timed(self.reply, self.device)
            first, _ = timed(lambda: self.codes(1), self.device)
            talker, codes = timed(lambda: self.codes(frames), self.device)
            seconds, alone = timed(lambda: self.model.code2wav.chunked_decode(codes, 300, 25), self.device)
        require("samples of each row", [row.shape[-1] for row in sound], [alone.shape[-1]] * self.bench.batch)
        return {
            "reply": reply,
            "first_audio": reply,
            "first_frame": first,
            "other_frames": talker - first,
            "code2wav": seconds,
        }

    def reply(self) -> list[Any]:
        """The sound of a whole reply, a row each, on the host."""
        import torch

        bench, vocabulary = self.bench, self.model.config.talker_config.text_config.vocab_size
        tokens, sound = self.model.generate(
            input_ids=self.ids, attention_mask=torch.ones_like(self.ids), speaker=SPEAKER, thinker_do_sample=False,
            thinker_eos_token_id=-1, thinker_pad_token_id=0, thinker_max_new_tokens=bench.new,
            talker_max_new_tokens=bench.frames + 1, talker_do_sample=not bench.greedy,
            talker_temperature=TEMPERATURE, talker_top_k=TOP_K, talker_repetition_penalty=PENALTY,
            # All marks, its end too; the default list leaves the end out.
            talker_suppress_tokens=list(range(vocabulary - 1024, vocabulary)),
        )  # fmt: skip
        require("tokens of the reply", tokens.shape[1] - bench.prompt, bench.new)
        return [row.cpu() for row in sound]

    def codes(self, frames: int) -> Any:
        """The codes [B, Q, frames] of the reply made last, by the Talker alone."""
        import torch

        # A frame is made when the code after its first one is drawn.
        result = self.speak(**{**self.asked, "max_new_tokens": frames + 1})
        codes = torch.stack([codes for *_, codes in result.hidden_states if codes is not None], dim=2)
        require("frames", tuple(codes.shape[::2]), (self.bench.batch, frames))
        return codes


def _prompts(bench: Bench, config: Any) -> Any:
    """A user's turn of random ordinary tokens and the header of the answer, int64 [B, T]."""
    import numpy as np

    ids = np.random.default_rng(0).integers(0, 200, (bench.batch, bench.prompt))
    ids[:, :2] = config.im_start_token_id, config.user_token_id
    ids[:, -4:-1] = config.im_end_token_id, config.im_start_token_id, config.assistant_token_id
    return ids
