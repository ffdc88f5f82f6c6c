"""Our model as its speech is measured."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert import load_hf
from omni_jax.config import OmniConfig
from omni_jax.decode.answers import FIRST_FRAMES, STREAM_FRAMES, STREAM_STEPS
from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.engine import PlainEngine
from omni_jax.decode.limits import Limits
from omni_jax.decode.request import requests_for
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.speech.speaker import SpeechRequest
from omni_jax.decode.speech.speakers import Speakers
from omni_jax.decode.speech.vocode import Vocoder, samples_of, vocode
from omni_jax.inputs.batch import Batch
from omni_jax.models.param import declare, init_params
from omni_jax.omni import PARTS
from omni_jax.quantization import stating
from omni_jax.settings import Voice
from scripts.bench.options import Run, Speech
from scripts.bench.system import require, timed
from scripts.bench.voice import PENALTY, SPEAKER, TEMPERATURE, TOP_K, spoken_prompts
from scripts.small.configs import config_dict


class Ours:
    """Our model, prompts and voice."""

    def __init__(self, options: Speech, directory: Path | None):
        self.options = options
        self.params, config = _our_weights(options.run, directory)
        assert config.talker is not None and config.code2wav is not None
        # So that no mark can be sampled, and no code ends the reply.
        self.config = replace(config, talker=replace(config.talker, codec_eos_id=-1))
        self.declarations = {part: declare(module, getattr(self.config, part)) for part, module in PARTS.items()}
        self.batch = Batch.of_text(spoken_prompts(options, config))
        temperature, top_k = (0.0, 0) if options.greedy else (TEMPERATURE, TOP_K)
        self.voice = Voice(SPEAKER, temperature, top_k, speech_repetition_penalty=PENALTY, max_frames=options.frames)

    def repeat(self) -> dict[str, float]:
        """One repetition."""
        reply, (first_audio, requests) = timed(self.stream)
        first, _ = timed(lambda: self.speak(requests, 1))
        talker, codes = timed(lambda: self.speak(requests, self.options.frames))
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
        """Speak a whole reply while it is written: seconds to the first audio, and the requests, which are done."""
        assert self.config.talker is not None and self.config.code2wav is not None
        start, samples, frames, first_audio = time.perf_counter(), 0, 0, 0.0
        rows, new = self.options.batch, self.options.new
        thinker = self.params["thinker"], self.declarations["thinker"], self.config.thinker.text
        requests = requests_for(self.batch, Limits(new), [0] * rows)
        speakers, speech = self._speakers(self.options.frames)
        engine, first = PlainEngine(*thinker, Sampling()), Admission(self.batch, requests, speech)
        steps = STREAM_STEPS, STREAM_FRAMES, FIRST_FRAMES
        batching = Batching(engine, rows, first, None, speakers, *steps)
        vocoder = Vocoder(self.params["code2wav"], self.declarations["code2wav"], self.config.code2wav, rows)
        for _ in batching.run():
            codes = [request.speaker.codes for request in requests if request.speaker is not None]
            if codes and codes[0].shape[1] > frames:
                samples += vocoder.add(np.stack(codes)[:, :, frames:]).shape[1]
                frames = codes[0].shape[1]
                first_audio = first_audio or (time.perf_counter() - start if samples else 0.0)
        samples += vocoder.finish().shape[1]
        require("tokens of the reply", [len(request.token_ids) for request in requests], [new] * rows)
        self._require_samples(samples)
        return first_audio, requests

    def speak(self, requests: Any, frames: int) -> Any:
        """Codes int32 [B, Q, frames] of what requests that are done have written."""
        speakers, speech = self._speakers(frames)
        rows = speakers.fill(speech, requests)
        while not speakers.done:
            speakers.advance()
        require("frames", [row.made for row in rows], [frames] * self.options.batch)
        return np.stack([row.codes for row in rows])

    def _speakers(self, frames: int) -> tuple[Speakers, SpeechRequest]:
        """What speaks all rows for `frames` frames, and the prompts of that speech."""
        embed, voice = self.params["thinker"]["embed"], replace(self.voice, max_frames=frames)
        talker = self.params["talker"], self.declarations["talker"]
        speakers = Speakers(*talker, lambda: embed, self.config, voice, self.options.batch)
        return speakers, SpeechRequest.read(self.batch, voice, self.config)

    def _require_samples(self, samples: int) -> None:
        assert self.config.code2wav is not None
        require("samples", samples, samples_of(self.config.code2wav, self.options.frames))


def _our_weights(run: Run, directory: Path | None) -> tuple[dict, Any]:
    """Parameters of the three parts, and the configuration."""
    if directory is None:
        config = OmniConfig.from_hf(stating(config_dict(run.shape), run.quantize))
        dtype = jnp.dtype(run.dtype)
        return {part: init_params(cls, getattr(config, part), dtype=dtype) for part, cls in PARTS.items()}, config
    return load_hf(directory, dtype=run.dtype, quantize=run.quantize)
