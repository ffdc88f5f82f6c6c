"""What each subcommand of the benchmark is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omni_jax.errors import InputError

Shape = Literal["tiny", "medium", "large", "full"]
Dtype = Literal["float32", "bfloat16"]


def check_least(options: Any, least: dict[str, int]) -> None:
    """Raise InputError for an option below its minimum: it would give no figures."""
    for name, minimum in least.items():
        if (value := getattr(options, name)) < minimum:
            raise InputError(f"{name} is {value}; give at least {minimum}")


def check_server(url: str | None, model: Path | None) -> None:
    """InputError unless a server is either named or to be started."""
    if (url is None) == (model is None):
        raise InputError("give either the --url of a server that runs, or a --model to start one of")


def check_folder(path: Path | None) -> None:
    """Raise InputError for a file that could not be written after all measurements."""
    if path and not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist; make it first")


@dataclass(frozen=True)
class Run:
    """The model, how often it is measured, and what is measured beside it."""

    shape: Shape = "tiny"
    """Sizes of the model; full is the public 30B-A3B."""
    dtype: Dtype = "float32"
    repetitions: int = 5
    against: Literal["hf"] | None = None
    """Measure transformers too."""
    beside: Path | None = None
    """Measure another checkout of this project too: its folder."""
    threads: int | None = None
    """Threads of transformers on CPU; by default one per core."""
    quantize: Literal["int8"] | None = None
    """Our routed experts in eight bits."""
    json: Path | None = None
    """Write the figures here too."""

    def __post_init__(self) -> None:
        check_least(self, {"repetitions": 1})
        check_folder(self.json)
        if self.beside and not (self.beside / "omni_jax").is_dir():
            raise InputError(f"{self.beside}: no checkout of this project; give the folder that holds omni_jax")


@dataclass(frozen=True)
class Rounding:
    """Experts that are rounded, and the rows that pass through them."""

    shape: Shape = "full"
    """Whose widths they have."""
    experts: int = 32
    """Experts of the layer; how many there are changes no error."""
    rows: int = 64
    json: Path | None = None
    """Write the figures here too."""

    def __post_init__(self) -> None:
        check_least(self, {"experts": 1, "rows": 5})
        check_folder(self.json)


@dataclass(frozen=True)
class Text:
    """Prompts and replies of text."""

    prompt: int = 128
    """Prompt tokens per row."""
    new: int = 64
    """New tokens per row."""
    batch: int = 1
    """Rows."""
    run: Run = Run()

    def __post_init__(self) -> None:
        check_least(self, {"prompt": 8, "new": 2, "batch": 1})


@dataclass(frozen=True)
class Speech:
    """Prompts and spoken replies."""

    prompt: int = 128
    """Prompt tokens per row."""
    new: int = 64
    """New tokens per row."""
    frames: int = 64
    """Frames of speech per row, 80 ms each in the public model."""
    batch: int = 1
    """Rows."""
    greedy: bool = False
    """Take the likeliest codes instead of sampling them; text is always greedy."""
    run: Run = Run()

    def __post_init__(self) -> None:
        check_least(self, {"prompt": 8, "new": 2, "frames": 2, "batch": 1})


@dataclass(frozen=True)
class Train:
    """Steps of training."""

    tokens: int = 256
    """Tokens per row."""
    batch: int = 4
    """Rows."""
    run: Run = Run()

    def __post_init__(self) -> None:
        check_least(self, {"tokens": 8, "batch": 1})


@dataclass(frozen=True)
class Drafters:
    """Drafters, and the prompts on which they are compared."""

    model: Path
    """The checkpoint that the drafters were made for, converted or in Hugging Face format."""
    prompts: Path
    """A JSONL file of prompts, such as MT-Bench's questions."""
    drafter: tuple[str, ...]
    """A drafter's directory, or oracle:0.3 for an oracle drafter with a 30 % error rate; repeat the flag to compare."""
    count: int = 80
    """Number of prompts, from the first on."""
    new: int = 64
    """New tokens per row."""
    batch: int = 1
    """Rows."""
    dtype: Dtype = "float32"
    plot: Path | None = None
    """Draw the acceptance curve by position to this PNG."""
    json: Path | None = None
    """Write the figures here too."""

    def __post_init__(self) -> None:
        check_least(self, {"count": 1, "new": 2, "batch": 1})
        check_folder(self.json)
        check_folder(self.plot)
        if not self.drafter:
            raise InputError("no drafter to compare; give one with --drafter, its directory or oracle:0.3")


@dataclass(frozen=True)
class Spoken:
    """Prompts whose replies are spoken and recognised."""

    model: Path
    """A checkpoint, converted or in Hugging Face format."""
    slots: int = 8
    """Replies at once, beside one at a time."""
    count: int = 16
    """Number of prompts."""
    new: int = 24
    """Most tokens per reply."""
    frames: int = 48
    """Most frames of speech per reply."""
    repetitions: int = 5
    json: Path | None = None
    """Write the figures here too."""

    def __post_init__(self) -> None:
        check_least(self, {"slots": 2, "count": 1, "new": 2, "frames": 1, "repetitions": 1})
        check_folder(self.json)


@dataclass(frozen=True)
class Loading:
    """A checkpoint to load."""

    shape: Literal["tiny", "medium", "large"] = "tiny"
    """Sizes of the model; large has 2.3 GB."""
    dtype: Dtype = "float32"
    json: Path | None = None
    """Write the figures here too."""

    def __post_init__(self) -> None:
        check_folder(self.json)


@dataclass(frozen=True)
class Scaling:
    """Prompts and replies on meshes of 1, 2, 4, ... devices."""

    shape: Shape = "tiny"
    """Sizes of the model; full is the public 30B-A3B."""
    dtype: Dtype = "float32"
    prompt: int = 128
    """Prompt tokens per row."""
    new: int = 64
    """New tokens per row."""
    batch: int = 1
    """Rows per device; the fixed batch has this number times the most devices."""
    repetitions: int = 5
    json: Path | None = None
    """Write the figures here too."""

    def __post_init__(self) -> None:
        check_least(self, {"prompt": 8, "new": 2, "batch": 1, "repetitions": 1})
        check_folder(self.json)


@dataclass(frozen=True)
class Delays:
    """A server, and the prompts with which its delays are measured."""

    url: str | None = None
    """Address of a server that runs, such as http://127.0.0.1:8000; its key is OMNI_JAX_API_KEY of the environment."""
    model: Path | None = None
    """In place of a URL: the checkpoint, or nano, to start a server of on a free port of this machine."""
    flags: str = ""
    """Further flags of omni-jax serve for it, in one text."""
    streams: int = 11
    """Replies that are written while the long prompt comes."""
    words: int = 4000
    """Words of the long prompt, and of the conversation's first turn."""
    new: int = 4000
    """Most tokens of each stream."""
    repeats: int = 3
    """Repetitions that count."""
    warm_up: int = 2
    """Repetitions before, which compile."""
    json: Path | None = None
    """Write the figures here too."""

    def __post_init__(self) -> None:
        check_least(self, {"streams": 1, "words": 1, "new": 8, "repeats": 1, "warm_up": 0})
        check_folder(self.json)
        check_server(self.url, self.model)


@dataclass(frozen=True)
class Serve:
    """A server, and the requests that it is sent."""

    url: str | None = None
    """Address of a server that runs, such as http://127.0.0.1:8000."""
    api_key: str | None = None
    """Its key; by default OMNI_JAX_API_KEY of the environment."""
    model: Path | None = None
    """In place of a URL: the checkpoint, or nano, to start a server of on a free port of this machine."""
    drafter: Path | None = None
    """Drafter of the server that is started."""
    flags: str = ""
    """Further flags of omni-jax serve for it, in one text."""
    prompts: Path | None = None
    """A dataset, such as MT-Bench's question.jsonl, of which the first turns are asked; by default short questions."""
    mix: str = "text"
    """Kinds of requests and their weights: text, image, audio and video before the text, speech in the answer; as in
    text=4,image=1,speech=1."""
    count: int = 80
    """Number of requests; of a dataset, of its rows from the first on."""
    new: int = 1024
    """Most new tokens per reply."""
    frames: int | None = None
    """Most frames of speech per reply; omni_jax alone knows such a limit."""
    rate: float | None = 12.0
    """Requests per second, at random (Poisson); None for all at once."""
    concurrency: int | None = 12
    """Most requests in flight, and slots of a server that is started; None for no limit."""
    temperature: float = 0.0
    """Of the tokens; 0 is greedy."""
    ignore_eos: bool = False
    """Write up to the most tokens."""
    seed: int = 0
    """Of arrivals, of the mix and of the replies."""
    warm_up: int = 12
    """Requests that are answered before, and not counted; as many as are counted show the server all lengths."""
    timeout: float = 600.0
    """Seconds after which a request has failed."""
    compare_generate: bool = False
    """First answer the same prompts by `generate_many`, without a server; needs a model."""
    plot: Path | None = None
    """Draw latencies, and tokens over time, to this PNG."""
    json: Path | None = None
    """Write the figures here too."""

    def __post_init__(self) -> None:
        check_least(self, {"count": 1, "new": 1, "warm_up": 0, "temperature": 0})
        above_zero = {"rate": self.rate, "timeout": self.timeout, "concurrency": self.concurrency}
        for name, value in above_zero.items():
            # Also False for NaN.
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} is {value}; give a number above 0")
        check_folder(self.json)
        check_folder(self.plot)
        check_server(self.url, self.model)
        started = {"drafter": self.drafter, "flags": self.flags, "compare_generate": self.compare_generate}
        if self.model is None and (given := [name for name, value in started.items() if value]):
            raise InputError(f"{given[0]} is for a server that is started here; give its --model in place of --url")
