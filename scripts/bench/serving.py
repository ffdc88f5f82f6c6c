"""Measure a server as its clients see it: requests at a rate, a limited number in flight.

    python -m scripts.bench serve --model ckpt --drafter dflash --prompts question.jsonl     # start one, ask it
    python -m scripts.bench serve --url http://127.0.0.1:8000 --mix text=4,image=1,speech=1
    python -m scripts.bench serve --model ckpt --rate None --compare-generate

All requests are streamed from one process, whose clock times them. A request counts from when it is sent: one that
waits because too many are in flight has not been sent yet. Between tokens is, for each reply, the time from its first
tokens to its last, by the number of tokens that came after the first; between pieces of text are all gaps that a reader
sees. The real-time factor is the time until the last piece of speech per second of speech. Underruns are those of a
player that starts with the first piece. The accepted length is the number of tokens per draft round, the model's own
included.

`--compare-generate` answers the same prompts by `generate_many` first, with as many slots as requests in flight, in a
process that ends before the server starts. Its prompts are prepared in turn by the process that runs the model. A ratio
counts only if neither compiled a program meanwhile: `--warm-up` with the number of requests sees to that.
"""

import asyncio
import os
import platform
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from omni_jax.errors import InputError
from omni_jax.files import parse_json
from scripts.bench.compare import write_json
from scripts.bench.options import Serve
from scripts.bench.serving_client import Address, Answer, arrivals, ask_all, fetch
from scripts.bench.serving_prompts import Question, make_questions
from scripts.bench.serving_tables import figures, plot, request_figures, table
from scripts.served import served

SLOTS = 12  # of `generate_many` without a limit of requests in flight


def report(options: Serve) -> None:
    """Measure, print the table, and write the JSON and the plot if asked for."""
    warm_up, questions = make_questions(options)
    plain = None
    if options.compare_generate:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            plain = pool.submit(generate, options, warm_up, questions).result()
    with opened(options, questions) as address:
        model, answers, compiled = asyncio.run(measure(address, options, warm_up, questions))
    found = summary(answers)
    if compiled is not None:
        found["all"]["compiled"] = compiled
    if plain is not None:
        found["all"] |= plain
        if "tokens_per_second" in found["all"]:
            found["all"]["of_generate"] = found["all"]["tokens_per_second"] / plain["generate_tokens_per_second"]
    print(title(options, model, len(questions)))
    print(table(found))
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    rows = [request_figures(answer) for answer in answers]
    # The key is nobody's business.
    write_json(options.json, replace(options, api_key=None), {"model": model, **machine, **found, "rows": rows})
    if options.plot:
        plot(answers, options.plot)


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """The figures of all answers, and of each kind."""
    kinds = dict.fromkeys(answer.kind for answer in answers)
    by_kind = {kind: figures([answer for answer in answers if answer.kind == kind]) for kind in kinds}
    return {"all": figures(answers), "kinds": by_kind}


def title(options: Serve, model: str, count: int) -> str:
    """What was measured, in two lines."""
    rate = "all at once" if options.rate is None else f"{options.rate:g} per second"
    most = "any number" if options.concurrency is None else f"at most {options.concurrency}"
    draft = "" if options.drafter is None else f", drafter {options.drafter}"
    return (
        f"client: {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n"
        f"{model}{draft}: {count} requests ({options.mix}), {rate}, {most} in flight, at most {options.new} tokens, "
        f"temperature {options.temperature:g}, seed {options.seed}, after {options.warm_up} of warm-up"
    )


async def measure(
    address: Address, options: Serve, warm_up: Sequence[Question], questions: Sequence[Question]
) -> tuple[str, list[Answer], int | None]:
    """The name of the model, the answers, and how many programs were compiled meanwhile, None if nobody says."""
    model = await model_of(address)

    async def ask(asked: Sequence[Question], rate: float | None) -> list[Answer]:
        bodies = [(question.kind, question.body(options, model)) for question in asked]
        times = arrivals(len(bodies), rate, options.seed).tolist()
        return await ask_all(address, bodies, times, options.concurrency, options.timeout)

    warm = await ask(warm_up, None)
    if warm and all(answer.failure for answer in warm):
        raise InputError(f"no request of the warm-up was answered: {warm[0].failure} {warm[0].detail}".strip())
    before = await compiled_programs(address)
    answers = await ask(questions, options.rate)
    after = await compiled_programs(address)
    return model, answers, None if before is None or after is None else after - before


async def model_of(address: Address) -> str:
    """The name of the model that is served; InputError if nobody answers."""
    try:
        status, data = await fetch(address, "/v1/models")
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{address.host}:{address.port} does not answer ({error}); start the server first") from None
    if status != 200:
        raise InputError(
            f"/v1/models answers with status {status}; is --url that of the server, and --api-key its key?"
        )
    try:
        return str(parse_json(data, "the list of models", error=InputError)["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise InputError("/v1/models names no model; is --url that of an OpenAI-compatible server?") from None


async def compiled_programs(address: Address) -> int | None:
    """How many programs an omni_jax server has compiled; None for other servers."""
    status, data = await fetch(address, "/metrics")
    found = re.search(rb"^omni_jax_compiled_programs (\S+)", data, re.MULTILINE) if status == 200 else None
    return int(float(found[1])) if found else None


@contextmanager
def opened(options: Serve, questions: Sequence[Question]) -> Iterator[Address]:
    """The server of the options: the one that runs at the URL, or one of this checkout that runs meanwhile."""
    if options.url is not None:
        yield Address.read(options.url, options.api_key)
        return
    flags = [] if options.concurrency is None else ["--slots", str(options.concurrency)]
    flags += [] if options.drafter is None else ["--drafter", str(options.drafter)]
    flags += [] if _is_spoken(questions) else ["--text-only"]
    keys = {} if options.api_key is None else {"OMNI_JAX_API_KEY": options.api_key}
    assert options.model is not None
    with served(options.model, *flags, *shlex.split(options.flags), environment=keys) as found:
        yield Address.read(found.url, options.api_key)


def _is_spoken(questions: Sequence[Question]) -> bool:
    return any(question.kind == "speech" for question in questions)


def generate(options: Serve, warm_up: Sequence[Question], questions: Sequence[Question]) -> dict[str, float]:
    """Tokens per second of `generate_many` on the same prompts, after the same warm-up, and the programs compiled."""
    import omni_jax
    from omni_jax.decode.prompt import Prompt
    from omni_jax.decode.shares import compilations
    from omni_jax.loading import default_dtype
    from omni_jax.weights.drafters import load_drafter

    spoken = _is_spoken(questions)
    omni = omni_jax.load(str(options.model), parts=None if spoken else ("thinker",))
    drafter = None if options.drafter is None else load_drafter(options.drafter, dtype=default_dtype())
    settings: dict[str, Any] = {"temperature": options.temperature, "max_new_tokens": options.new}
    settings |= {"stop_ids": ()} if options.ignore_eos else {}
    settings |= {} if options.frames is None else {"max_frames": options.frames}

    def tokens(asked: Sequence[Question]) -> int:
        prompts = (
            Prompt(omni.prepare(one.messages), options.seed + one.number, options.new, speech=one.kind == "speech")
            for one in asked
        )
        slots = options.concurrency or SLOTS
        replies = omni.generate_many(prompts, slots=slots, speech=spoken, drafter=drafter, **settings)
        return sum(len(reply.token_ids) for _, reply in replies)

    tokens(warm_up)
    with compilations() as compiled:
        start = time.perf_counter()
        rate = tokens(questions) / (time.perf_counter() - start)
    return {"generate_tokens_per_second": rate, "generate_compiled": len(compiled)}
