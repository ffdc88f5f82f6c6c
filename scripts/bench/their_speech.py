"""Transformers' model as its speech is measured."""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

from scripts.bench.options import Speech
from scripts.bench.system import require, their_device, timed
from scripts.bench.voice import PENALTY, SPEAKER, TEMPERATURE, TOP_K, spoken_prompts
from scripts.small.configs import config_dict


class Theirs:
    """Their model and prompts."""

    def __init__(self, options: Speech, directory: Path | None):
        self.options, self.device = options, their_device(options.run.threads)
        model: Any = Qwen3OmniMoeForConditionalGeneration
        dtype = getattr(torch, options.run.dtype)
        if directory is None:
            torch.set_default_dtype(dtype)
            with torch.device(self.device):
                self.model = model(Qwen3OmniMoeConfig(**config_dict(options.run.shape))).eval()
        else:
            self.model = model.from_pretrained(directory, dtype=dtype).to(self.device).eval()
        self.ids = torch.tensor(spoken_prompts(options, self.model.config), device=self.device)
        self.speak, self.settings = self.model.talker.generate, {}
        self.model.talker.generate = self._recorded

    def _recorded(self, **settings: Any) -> Any:
        """The Talker as the whole model calls it; keeps the settings, to call the Talker alone with them."""
        self.settings = settings
        return self.speak(**settings)

    def repeat(self) -> dict[str, float]:
        """One repetition."""
        frames = self.options.frames
        with torch.no_grad():
            reply, sound = timed(self.reply, self.device)
            first, _ = timed(lambda: self.codes(1), self.device)
            talker, codes = timed(lambda: self.codes(frames), self.device)
            seconds, alone = timed(lambda: self.model.code2wav.chunked_decode(codes, 300, 25), self.device)
        require("samples of each row", [row.shape[-1] for row in sound], [alone.shape[-1]] * self.options.batch)
        return {
            "reply": reply,
            "first_audio": reply,
            "first_frame": first,
            "other_frames": talker - first,
            "code2wav": seconds,
        }

    def reply(self) -> list[Any]:
        """The sound of a whole reply, a row each, on the host."""
        options, vocabulary = self.options, self.model.config.talker_config.text_config.vocab_size
        tokens, sound = self.model.generate(
            input_ids=self.ids, attention_mask=torch.ones_like(self.ids), speaker=SPEAKER, thinker_do_sample=False,
            thinker_eos_token_id=-1, thinker_pad_token_id=0, thinker_max_new_tokens=options.new,
            talker_max_new_tokens=options.frames + 1, talker_do_sample=not options.greedy,
            talker_temperature=TEMPERATURE, talker_top_k=TOP_K, talker_repetition_penalty=PENALTY,
            # All marks, its end too; the default list leaves the end out.
            talker_suppress_tokens=list(range(vocabulary - 1024, vocabulary)),
        )  # fmt: skip
        require("tokens of the reply", tokens.shape[1] - options.prompt, options.new)
        return [row.cpu() for row in sound]

    def codes(self, frames: int) -> Any:
        """The codes [B, Q, frames] of the reply made last, by the Talker alone."""
        # A frame is made when the code after its first one is drawn.
        result = self.speak(**{**self.settings, "max_new_tokens": frames + 1})
        codes = torch.stack([codes for *_, codes in result.hidden_states if codes is not None], dim=2)
        require("frames", tuple(codes.shape[::2]), (self.options.batch, frames))
        return codes
