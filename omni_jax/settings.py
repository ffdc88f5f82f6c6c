"""Settings of a request, said once: the name of each, its type, default, meaning and check.

The keywords of `Omni.generate` have these names, and so have flags and the settings of an evaluation, which lack some:
`stop_ids` and `tools` have no flag, `media` has one for each option, `evaluate.settings.FIXED` lists what an evaluation
fixes. All are checked when the dataclasses are made; what only a model can decide is checked with it: whether it has
the speaker, whether a text can end a reply, whether the drafter supports these settings.

    keywords -> Settings.read -> Settings(sampling, voice, drafting, ending, preparation, seed) -> keywords()
"""

import ast
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypedDict, get_type_hints

import numpy as np

from omni_jax.errors import InputError
from omni_jax.inputs.options import read_defaults
from omni_jax.inputs.values import flag, listed, number_of, shown, whole

# Smallest temperature and top_p: below this, float32 logits of scale 10 cannot tell them apart.
MIN_TEMPERATURE = 1e-6
# The most alternatives to a token whose log-probabilities can be asked for.
MAX_LOGPROBS = 20


class Plan(NamedTuple):
    """What the compiled program contains: no draw at all, the penalty, and how many candidates are sorted (0: none).

    The candidates are a power of two or the whole vocabulary; which of them count is decided by traced values.
    top_logprobs: how many of the likeliest tokens are reported with their log-probabilities beside the token's own;
    None if not even the token's is. some_greedy: whether rows that draw from the whole vocabulary have greedy ones
    beside them.
    """

    greedy: bool
    penalised: bool
    candidates: int
    top_logprobs: int | None = None
    some_greedy: bool = False


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 0.0
    """0 is greedy: always the likeliest token. Above 0, logits are divided by it and a token is drawn."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this probability together; 1 is off."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the likeliest one's probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Make tokens that have occurred, in prompt or reply, less likely by this factor, also when greedy; 1 is off."""
    logprobs: int | None = None
    """Report the log-probabilities of the reply's tokens, and of this many alternatives to each, 0 to 20."""

    def __post_init__(self) -> None:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        for name in names:
            object.__setattr__(self, name, number_of(name, getattr(self, name)))
        low, high = MIN_TEMPERATURE, 1 / MIN_TEMPERATURE
        checks = (
            (self.temperature == 0 or low <= self.temperature <= high, f"0 (greedy) or from {low:g} to {high:g}"),
            (0 <= self.top_k < 2**31 and self.top_k % 1 == 0, "0 (off) or a positive count"),
            (low <= self.top_p <= 1, f"from {low:g} to 1 (off)"),
            (0 <= self.min_p <= 1, "from 0 (off) to 1"),
            (1e-3 <= self.repetition_penalty <= 1e3, "from 0.001 to 1000, 1 is off"),
        )
        for name, (valid, expected) in zip(names, checks, strict=True):
            if not valid:
                raise InputError(f"{name} is {shown(getattr(self, name))}; it must be {expected}")
        if self.logprobs is not None:
            remedy = f"give the number of alternatives to report with each token, 0 to {MAX_LOGPROBS}, or None"
            object.__setattr__(self, "logprobs", whole("logprobs", self.logprobs, remedy, least=0, most=MAX_LOGPROBS))

    def plan(self, vocab_size: int) -> Plan:
        """The static part for a vocabulary of `vocab_size`."""
        greedy = self.temperature == 0.0
        filtered = self.top_p < 1.0 or self.min_p > 0.0
        candidates = vocab_size if filtered else 0
        if self.top_k:
            candidates = min(1 << (int(self.top_k) - 1).bit_length(), vocab_size)
        # One program for any number of alternatives.
        top_logprobs = self.logprobs and min(MAX_LOGPROBS, vocab_size)
        return Plan(greedy, self.repetition_penalty != 1.0, 0 if greedy else candidates, top_logprobs)

    def values(self) -> dict[str, np.number]:
        """The traced part: scalars by name, top_k int32 and the others float32."""
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        top_k = np.int32(self.top_k or np.iinfo(np.int32).max)
        return {"top_k": top_k, **{name: np.float32(getattr(self, name)) for name in names}}


@dataclass(frozen=True)
class Voice:
    """How replies are spoken."""

    speaker: str | Sequence[str] = "ethan"
    """Whose voice; `omni-jax inspect` lists the checkpoint's. In Python also one for each conversation."""
    speech_temperature: float = 0.9
    """As temperature, for codes of speech; 0 is greedy."""
    speech_top_k: int = 50
    """As top_k, for codes of speech."""
    speech_top_p: float = 1.0
    """As top_p, for codes of speech."""
    speech_repetition_penalty: float = 1.05
    """As repetition_penalty, on earlier codes of the speech, also when greedy."""
    max_frames: int = 4096
    """Longest speech, in frames of 80 ms."""

    def __post_init__(self) -> None:
        for name, value in vars(self.sampling).items():
            if f"speech_{name}" in vars(self):
                object.__setattr__(self, f"speech_{name}", value)
        frames = whole("max_frames", self.max_frames, "it must be a whole number of at least 1")
        object.__setattr__(self, "max_frames", frames)
        if not isinstance(self.speaker, str):
            listed("speaker", self.speaker, "give a name, or one for each conversation")

    @property
    def sampling(self) -> Sampling:
        """How the first code of each frame is drawn."""
        penalty = self.speech_repetition_penalty
        try:
            return Sampling(self.speech_temperature, self.speech_top_k, self.speech_top_p, repetition_penalty=penalty)
        except InputError as error:
            raise InputError(f"speech_{error}") from error


@dataclass(frozen=True)
class Drafting:
    """How a drafter drafts. In float32 the tokens stay the same, unless drafts are drawn too."""

    draft_tokens: int | Literal["auto"] | None = None
    """Tokens drafted per round, of a tree nodes; by default as the drafter was trained. auto: whatever is fastest."""
    draft_tree: tuple[int, int] | None = None
    """Depth and width of the tree that an EAGLE-3 drafter proposes; EAGLE's own setting is 7 and 10."""
    draft_sampling: bool = False
    """Draw the drafts too: more are accepted at high temperatures; the reply keeps only its distribution."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "draft_sampling", flag("draft_sampling", self.draft_sampling))


@dataclass(frozen=True)
class Ending:
    """Where a reply ends."""

    max_new_tokens: int = 1024
    """Most tokens of the reply."""
    stop: str | Sequence[str] | None = None
    """A text, or several, that ends the reply, which does not show it."""
    stop_ids: Sequence[int] | None = None
    """Token ids that end the reply; by default the end of the assistant's turn."""

    def __post_init__(self) -> None:
        most = whole("max_new_tokens", self.max_new_tokens, "ask for a whole number, at least one token")
        object.__setattr__(self, "max_new_tokens", most)


@dataclass(frozen=True)
class Preparation:
    """How messages and their media become a prompt."""

    use_audio_in_video: bool = False
    """Listen to the sound tracks of the videos, in step with their frames."""
    tools: list[dict] | None = None
    """Functions that the model may call, as in OpenAI's API."""
    fps: float | None = None
    """Frames sampled per second of video."""
    media: Mapping[str, Any] | None = None
    """Options of pictures, sounds and videos by name, such as {"max_pixels": 401408}, for parts that state none."""
    thinking: bool | None = None
    """Let a model that can do both think first, or not; by default as its template has it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "use_audio_in_video", flag("use_audio_in_video", self.use_audio_in_video))
        if self.thinking is not None:
            object.__setattr__(self, "thinking", flag("thinking", self.thinking))
        read_defaults(self.media, self.fps, self.use_audio_in_video)


class Keywords(TypedDict, total=False):
    """The settings as keywords, for type checkers: names and types are those of the dataclasses."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    logprobs: int | None
    speaker: str | Sequence[str]
    speech_temperature: float
    speech_top_k: int
    speech_top_p: float
    speech_repetition_penalty: float
    max_frames: int
    draft_tokens: int | Literal["auto"] | None
    draft_tree: tuple[int, int] | None
    draft_sampling: bool
    max_new_tokens: int
    stop: str | Sequence[str] | None
    stop_ids: Sequence[int] | None
    use_audio_in_video: bool
    tools: list[dict] | None
    fps: float | None
    media: Mapping[str, Any] | None
    thinking: bool | None
    seed: int | Sequence[int]


@dataclass(frozen=True)
class Settings:
    """All settings of a request."""

    sampling: Sampling = field(default_factory=Sampling)
    voice: Voice = field(default_factory=Voice)
    drafting: Drafting = field(default_factory=Drafting)
    ending: Ending = field(default_factory=Ending)
    preparation: Preparation = field(default_factory=Preparation)
    seed: int | Sequence[int] = 0
    """A reply follows from its prompt, settings and seed alone. In Python also one for each conversation."""

    @classmethod
    def read(cls, keywords: Mapping[str, Any]) -> "Settings":
        """The settings that keywords state, checked; InputError for a value that cannot be, or an unknown name."""
        if unknown := [name for name in keywords if name not in NAMES]:
            raise InputError(f"there is no setting {unknown[0]!r}; there are {', '.join(NAMES)}")
        stated = {name: _of(kind, keywords) for name, kind in GROUPS.items()}
        # A server reads many requests that state little: what is not stated has been checked before.
        groups = {name: GROUPS[name](**values) if values else DEFAULTS[name] for name, values in stated.items()}
        return cls(**groups, **{name: keywords[name] for name in ("seed",) if name in keywords})

    def keywords(self) -> dict[str, Any]:
        """Every setting by its name; `read` makes the same settings of them."""
        groups = [vars(getattr(self, name)) for name in GROUPS]
        return {name: value for group in groups for name, value in group.items()} | {"seed": self.seed}


GROUPS: dict[str, type] = {
    "sampling": Sampling, "voice": Voice, "drafting": Drafting, "ending": Ending, "preparation": Preparation
}  # fmt: skip
DEFAULTS: dict[str, Any] = {name: kind() for name, kind in GROUPS.items()}
NAMES = tuple(get_type_hints(Keywords))


def parameters() -> list[inspect.Parameter]:
    """The settings as keyword-only parameters with types and defaults, for the signature of what takes them."""
    types, defaults = get_type_hints(Keywords), Settings().keywords()
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, kind, default=defaults[name], annotation=types[name]) for name in NAMES]


def meanings() -> dict[str, str]:
    """What each setting means, by name: the text under its field, in one line. Empty where there is no source code."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[__name__]))
    except OSError:
        return {}
    found = {}
    for node in (one for body in tree.body if isinstance(body, ast.ClassDef) for one in pairwise(body.body)):
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return {name: found[name] for name in NAMES}


def _of(kind: type, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that are fields of a group."""
    return {one.name: keywords[one.name] for one in fields(kind) if one.name in keywords}
