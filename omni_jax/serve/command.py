"""`omni-jax serve`: from flags to a server that runs until it is told to end.

SIGTERM, or the first interrupt, ends it in order: no request is taken any more, which /health says, what runs has
--drain-seconds, and then the process leaves, with status 0 after SIGTERM. A second interrupt ends it at once.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes, Suppress, UseAppendAction

from omni_jax import process
from omni_jax.distributed import is_primary
from omni_jax.errors import InputError
from omni_jax.flags import (
    DeviceFlags,
    EndingFlags,
    MediaFlags,
    PreparationFlags,
    SamplingFlags,
    VoiceFlags,
    keywords_of,
)
from omni_jax.inputs.values import whole
from omni_jax.loading import default_dtype
from omni_jax.omni import Omni
from omni_jax.serve.asked import Defaults
from omni_jax.serve.doors import Doors
from omni_jax.serve.engine import Service
from omni_jax.serve.fetch import Reach
from omni_jax.serve.guard import Bounds
from omni_jax.serve.media import Media, Policy
from omni_jax.serve.metrics import Metrics
from omni_jax.serve.running import Running
from omni_jax.serve.serving import TRANSCRIBE, Serving
from omni_jax.serve.warming import warm
from omni_jax.serve.workers import WorkerLimits, Workers
from omni_jax.settings import Drafting, Settings
from omni_jax.weights.drafters import Drafter, load_drafter

MIB = 1 << 20
LEAVE_SECONDS = 5  # that answers have to be read by their clients, once they are complete
NEEDED = ("starlette", "uvicorn", "python_multipart", "prometheus_client")  # of the extra `serve`
# Loads the model with these parts, all by default.
Load = Callable[[tuple[str, ...] | None], Omni]


@dataclass(frozen=True)
class ListenFlags:
    """Where the server listens, and to whom."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of the machine's, which needs --api-key."""
    port: int = 8000
    """Port to listen on; 0 for a free one."""
    api_key: str | None = None
    """Key that clients must send, but for /health and the page at /; by default OMNI_JAX_API_KEY of the environment."""
    served_model_name: str | None = None
    """Name of the model for clients; by default that of its directory."""
    allowed_hosts: UseAppendAction[tuple[str, ...]] = ()
    """Name by which clients or a proxy call the server, *.example.com for those below it; repeat the flag for more."""
    allowed_origins: UseAppendAction[tuple[str, ...]] = ()
    """Origin of pages that may use the server, such as https://example.com, or * for all; repeat the flag for more."""
    drain_seconds: float = 60.0
    """Time that replies under way have when the server is told to end."""


@dataclass(frozen=True)
class AdmissionFlags:
    """What is taken, and how much at once."""

    slots: int | None = None
    """Replies that run at once; by default 12, or what memory holds."""
    prefill_tokens: int = 512
    """A longer prompt is run in pieces of this many tokens, so that other replies go on between them."""
    keep_mib: float = 1024.0
    """Memory for what later turns of conversations begin with, in MiB: caches, and features of media."""
    waiting: int = 64
    """Replies that may wait for a slot; more are refused with status 429."""
    warmup: int = 0
    """Before requests are taken, compile the programs that prompts of up to this many tokens need; 0 for none."""
    allowed_local_media_path: Path | None = None
    """Folder whose files clients may name as media; by default none."""
    allowed_media_domains: UseAppendAction[tuple[str, ...]] = ()
    """Host that media may be fetched from, *.example.com for those below it; repeat the flag for more."""
    max_body_mib: float = 64.0
    """Largest body of a request, in MiB."""
    body_seconds: float = 60.0
    """Time until all of a body must be there."""
    max_media: int = 256
    """Most pictures, sounds, videos and frames of one request."""
    fetch_seconds: float = 30.0
    """Time to fetch one medium."""
    media_workers: int = 2
    """Processes that decode media."""
    media_seconds: float = 60.0
    """Time to prepare one request."""
    media_memory_mib: float = 4096.0
    """Memory to prepare one request, in MiB."""


@dataclass(frozen=True)
class ServedDraftingFlags(Drafting):
    """How replies are drafted: the same answer in fewer steps."""

    drafter: Path | None = None
    """Directory of a DFlash or EAGLE-3 drafter for this model; nano/dflash and nano/eagle3 are for nano."""


@dataclass(frozen=True)
class ServedSamplingFlags(SamplingFlags):
    """How tokens are drawn; a request without a seed gets one that nobody can foresee."""

    seed: Suppress[int] = 0


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP as OpenAI's API; settings are those of requests that state none."""

    model: Path
    """Model id, Hugging Face directory, converted checkpoint (python -m convert SRC DST), or nano."""
    adapter: Path | None = None
    """Directory of a LoRA adapter for this model, as PEFT saves it; it is merged into the weights."""
    text_only: bool = False
    """Load the Thinker alone: no speech."""
    transcription_prompt: str = TRANSCRIBE
    """What the model is asked for a transcript; {language} is replaced by the name of a language and a space."""
    listen: OmitArgPrefixes[ListenFlags] = field(default_factory=ListenFlags)
    admission: OmitArgPrefixes[AdmissionFlags] = field(default_factory=AdmissionFlags)
    prompt: OmitArgPrefixes[PreparationFlags] = field(default_factory=PreparationFlags)
    media: OmitArgPrefixes[MediaFlags] = field(default_factory=MediaFlags)
    reply: OmitArgPrefixes[EndingFlags] = field(default_factory=EndingFlags)
    sampling: OmitArgPrefixes[ServedSamplingFlags] = field(default_factory=ServedSamplingFlags)
    speech: OmitArgPrefixes[VoiceFlags] = field(default_factory=VoiceFlags)
    drafting: OmitArgPrefixes[ServedDraftingFlags] = field(default_factory=ServedDraftingFlags)
    devices: OmitArgPrefixes[DeviceFlags] = field(default_factory=DeviceFlags)

    def named(self) -> "Serve":
        """The same with a name for clients: that of the directory, or the model id."""
        name = self.listen.served_model_name or (self.model.resolve().name if self.model.exists() else str(self.model))
        return replace(self, listen=replace(self.listen, served_model_name=name))

    def settings(self) -> dict[str, Any]:
        """What requests may leave open, by name; InputError for a value that cannot be."""
        made = keywords_of(self.media, self.prompt, self.reply, self.sampling, self.speech)
        del made["seed"]
        made["stop"] = made["stop"] or None
        Settings.read(made)
        return made


def serve(command: Serve, load: Load) -> None:
    """Serve until the process is told to end; InputError for flags that cannot be used.

    Of several processes the first one listens, and ends the others.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(f"the server needs {' and '.join(missing)}; pip install 'omni_jax[serve]'")
    if not is_primary():
        return _follow(command, load)
    key = _checked_key(command)
    whole("--warmup", command.admission.warmup, "give a number of tokens, or 0", least=0)
    defaults, media = command.settings(), Media(_policy(command))
    with _listening(command.listen) as listener:
        running = _running(command, load)
        _run(command, _serving(command, running, defaults, media), key, listener)


def _follow(command: Serve, load: Load) -> None:
    """Run what the first process is asked, until it ends."""
    for number in (signal.SIGTERM, signal.SIGINT):  # A scheduler sends them to all, and the first one lets replies end.
        signal.signal(number, signal.SIG_IGN)
    Service(_running(command, load)).follow()


def _checked_key(command: Serve) -> str | None:
    """The key of the server; InputError for a server that all machines may use without one."""
    key = command.listen.api_key or os.environ.get("OMNI_JAX_API_KEY") or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError("--api-key holds characters that a header cannot; use letters, digits and signs")
    if key is None and command.listen.host not in ("127.0.0.1", "localhost", "::1"):
        raise InputError(f"--host {command.listen.host} is open to other machines; set --api-key, or OMNI_JAX_API_KEY")
    return key


def _doors(flags: ListenFlags, key: str | None) -> Doors:
    """Whose pages may use the server; one with a key, which such pages lack, may be called by any name."""
    hosts = tuple(host.lower() for host in flags.allowed_hosts)
    origins = tuple(origin.lower().rstrip("/") for origin in flags.allowed_origins)
    return Doors(flags.host.lower(), hosts, origins, any_host=key is not None and not hosts)


def _policy(command: Serve) -> Policy:
    flags = command.admission
    reach = Reach(flags.allowed_media_domains, flags.fetch_seconds)
    return Policy(flags.allowed_local_media_path, reach, int(flags.max_body_mib * MIB), flags.max_media)


@contextmanager
def _listening(flags: ListenFlags) -> Iterator[socket.socket]:
    """A socket at the address, taken before the model is read."""
    family = socket.AF_INET6 if ":" in flags.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((flags.host, flags.port))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"{flags.host}:{flags.port} cannot be listened on ({error}); choose another port"
            ) from None
        yield listener


def _running(command: Serve, load: Load) -> Running:
    """The model with its slots and its drafter."""
    omni = load(("thinker",) if command.text_only else None)
    flags, drafting = command.admission, command.drafting
    drafter: Drafter | None = None
    if drafting.drafter is not None:
        drafter = load_drafter(drafting.drafter, dtype=command.devices.dtype or default_dtype())
    settings = Drafting(drafting.draft_tokens, drafting.draft_tree, drafting.draft_sampling)
    piece = whole("--prefill-tokens", flags.prefill_tokens, "run at least one token at once")
    return Running(omni, flags.slots, drafter, settings, piece, int(flags.keep_mib * MIB))


def _serving(command: Serve, running: Running, defaults: dict[str, Any], media: Media) -> Serving:
    """The parts of the server."""
    flags, omni = command.admission, running.omni
    service = Service(running, flags.waiting)
    limits = WorkerLimits(flags.media_workers, flags.media_seconds, int(flags.media_memory_mib * MIB))
    return Serving(
        model=command.listen.served_model_name or command.model.name,
        created=int(time.time()),
        service=service,
        workers=Workers(omni.processor, limits),
        media=media,
        defaults=Defaults(defaults, omni.config.im_end_token_id, running.voices),
        metrics=Metrics(running.slots, lambda: service.active, lambda: service.accepted),
        instruction=command.transcription_prompt,
    )


def _run(command: Serve, serving: Serving, key: str | None, listener: socket.socket) -> None:
    """Answer requests until the process is told to end."""
    import uvicorn

    from omni_jax.serve.app import make_app
    from omni_jax.serve.connections import timely_protocol

    class Server(uvicorn.Server):
        """uvicorn's, that says where it listens; its own handlers would end the process by the signal."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self.handle_exit)
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            serving.service.start()
            if warmup and await warm(serving.service, warmup, voice, lambda: self.should_exit):
                print(f"compiled {serving.metrics.compiled} programs", file=sys.stderr, flush=True)
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"serving {serving.model} at http://{shown}:{port}", file=sys.stderr, flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # uvicorn's own takes no connection any more, so nobody could ask /health.
            await serving.service.drain(flags.drain_seconds, lambda: self.force_exit)
            await super().shutdown(sockets)

    warmup, voice = command.admission.warmup, Settings.read(dict(serving.defaults.settings)).voice
    flags, bounds = command.listen, Bounds(int(command.admission.max_body_mib * MIB), command.admission.body_seconds)
    app = make_app(serving, key, bounds, _doors(flags, key))
    config = uvicorn.Config(
        app, http=timely_protocol(), log_level="warning", timeout_graceful_shutdown=LEAVE_SECONDS, server_header=False
    )
    with process.finishing("finishing the replies under way"):
        Server(config).run([listener])
