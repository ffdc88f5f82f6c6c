"""Prove on two cores that trained drafters draft: a small target, its replies, two drafters, and what is accepted.

    python -m scripts.drafted DIR --text gsm8k_train.jsonl.gz --held gsm8k_test.jsonl.gz --seconds 600

Every stage leaves its result in DIR; started again, the run goes on where it ended. The texts are JSON Lines of
`question` and `answer`. Accepted tokens per round are measured in this project's loop, on questions that nobody was
trained on, for drafters as they were trained and as they are read back from their public files.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time
from typing import Annotated, Any

import numpy as np
import tyro

import omni_jax
from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.draft.acceptance import acceptance_curve, interval, mean_accepted
from omni_jax.decode.draft.engine import SpeculativeEngine, rounds_of
from omni_jax.decode.draft.plan import DraftPlan, KnownDrafters
from omni_jax.decode.engine import PlainEngine
from omni_jax.decode.limits import Limits
from omni_jax.decode.request import requests_for
from omni_jax.omni import Omni
from omni_jax.settings import Sampling, Settings
from omni_jax.train.batch import IGNORED, TextBatch
from omni_jax.train.drafters.batch import DraftBatch
from omni_jax.train.drafters.check import check_target
from omni_jax.train.drafters.new import Sizes
from omni_jax.train.drafters.objective import BlockSettings, ChainSettings, dflash_objective, eagle3_objective
from omni_jax.train.drafters.vocabulary import count_learned
from omni_jax.train.objective import Objective
from omni_jax.train.regenerate import Conversation, regenerate
from omni_jax.weights.drafters import load_drafter
from scripts.drafted.bigram import bigram
from scripts.drafted.fit import fit
from scripts.drafted.target import make_target, read_pairs

NEW_TOKENS, LONGEST_QUESTION = 96, 300
ROWS, LENGTH, BLOCK = 8, 256, 8
# Questions that are answered together where acceptance is measured.
TOGETHER = 16


@dataclass(frozen=True)
class Options:
    """What to prove on what.

    directory: of all results. text, held: questions for training, and others. seconds: of training each drafter, and
    target_seconds: of the target. steps: at most, which also ends the schedule. replies, held_out: how many.
    """

    directory: Annotated[Path, tyro.conf.Positional]
    text: Path
    held: Path
    seconds: float = 600
    target_seconds: float = 1400
    steps: int = 1500
    replies: int = 1000
    held_out: int = 48


def main(options: Options) -> None:
    """Run the stages that have not ended, and print a table."""
    directory = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "target").exists():
        make_target(directory / "target", read_pairs(options.text), options.target_seconds, 2500)
    omni = omni_jax.load(directory / "target", parts=("thinker",))
    lines = answered(omni, options)
    rows = pack(omni, lines)
    batches = [text_batch(rows[i : i + ROWS]) for i in range(0, len(rows) - ROWS + 1, ROWS)]
    print(f"{len(lines)} replies, {len(batches)} batches; the target finds {check_target(omni, batches[:4]):.1%} right")
    counts, config = count_learned(batches, omni.config.thinker.text.vocab_size), omni.config
    block = BlockSettings(layers=2, features=3, block_size=BLOCK, anchors=24)
    recipes: dict[str, Callable[[], Objective]] = {
        "dflash": lambda: dflash_objective(block, Sizes(), omni, remat=False),
        "eagle3": lambda: eagle3_objective(ChainSettings(draft_vocab_size=400), Sizes(), omni, counts, remat=False),
    }
    ways = {"bigram": bigram((ids for line in lines for ids in line["token_ids"]), len(counts), BLOCK)}
    for name, recipe in recipes.items():
        for kind, where in trained(name, recipe(), batches, options).items():
            plan = KnownDrafters(config).resolve_draft_plan(load_drafter(where), BLOCK - 1, None, drawn=False)
            assert plan is not None
            ways[f"{name}, {kind}"] = plan
    report(omni, ways, read_pairs(options.held)[: options.held_out], directory / "report.json")


def answered(omni: Omni, options: Options) -> list[dict[str, Any]]:
    """The target's own replies to the questions."""
    pairs = [pair for pair in read_pairs(options.text) if len(pair[0]) < LONGEST_QUESTION][: options.replies]
    asked = [Conversation(f"{options.text.name}:{i + 1}", user(question)) for i, (question, _) in enumerate(pairs)]
    settings, output = Settings.read({"max_new_tokens": NEW_TOKENS}), options.directory / "replies.jsonl"
    regenerate(omni, asked, output, settings, about={"target": str(options.directory)}, slots=TOGETHER)
    return [json.loads(line) for line in output.read_text().splitlines()]


def user(question: str) -> list[dict[str, Any]]:
    """A conversation of one question."""
    return [{"role": "user", "content": question}]


def pack(omni: Omni, lines: list[dict[str, Any]]) -> list[list[tuple[list[int], int]]]:
    """Rows of samples, each its tokens and how many of them are the question, in the order of the lines."""
    rows: list[list[tuple[list[int], int]]] = [[]]
    for line in lines:
        question = omni.prepare(line["messages"][:1]).token_ids[0].tolist()
        ids = (question + line["token_ids"][0])[:LENGTH]
        if sum(len(sample) for sample, _ in rows[-1]) + len(ids) > LENGTH:
            rows.append([])
        rows[-1].append((ids, len(question)))
    return rows


def text_batch(rows: list[list[tuple[list[int], int]]]) -> TextBatch:
    """Rows of samples as a batch."""
    shape = (len(rows), LENGTH)
    ids, labels = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
    first = np.tile(np.arange(LENGTH, dtype=np.int32), (len(rows), 1))
    for b, row in enumerate(rows):
        start = 0
        for sample, question in row:
            stop = start + len(sample)
            ids[b, start:stop], first[b, start:stop] = sample, start
            labels[b, start + question : stop] = sample[question:]
            start = stop
    position = np.broadcast_to((np.arange(LENGTH) - first).astype(np.float32), (3, *shape))
    return TextBatch(ids, labels, position, first)


def trained(name: str, objective: Objective, batches: list[TextBatch], options: Options) -> dict[str, Path]:
    """The public files of a drafter as it begins and as it ends."""
    places = {kind: options.directory / f"{name}-{kind}" for kind in ("untrained", "trained")}
    if not places["untrained"].exists():
        objective.save(objective.params, places["untrained"])
    if not places["trained"].exists():

        def batch_of(step: int) -> DraftBatch:
            order = np.random.default_rng(step // len(batches)).permutation(len(batches))
            return DraftBatch(batches[order[step % len(batches)]], np.asarray(step, np.uint32))

        rate, clip = (6e-4, 1.0) if name == "dflash" else (3e-4, 0.5)
        file, began = options.directory / f"{name}.training.npz", process_time()
        fitted = partial(fit, objective.params, objective.frozen, objective.loss, batch_of)
        params = fitted(options.seconds, options.steps, rate, clip, file)
        print(f"{name}: {process_time() - began:.0f} seconds of processor time")
        objective.save(params, places["trained"])
    return places


def report(omni: Omni, ways: dict[str, DraftPlan], pairs: list[tuple[str, str]], file: Path) -> None:
    """Print accepted tokens per round of each way, with 95 % intervals, and write them to `file`."""
    found = {}
    for name, plan in ways.items():
        rounds = [rounds_of(request) for part in _parts(pairs) for request in _drafted(omni, part, plan)]
        low, high = interval(rounds, mean_accepted)
        curve = [round(float(x), 3) for x in acceptance_curve(rounds)]
        found[name] = {"tokens_per_round": mean_accepted(rounds), "interval": [float(low), float(high)], "curve": curve}
        print(f"{name:20} {mean_accepted(rounds):.2f} ({low:.2f} to {high:.2f}), all first drafts accepted {curve}")
    file.write_text(json.dumps(found, indent=2) + "\n")


def _parts(pairs: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    yield from (pairs[i : i + TOGETHER] for i in range(0, len(pairs), TOGETHER))


def _drafted(omni: Omni, pairs: list[tuple[str, str]], plan: DraftPlan) -> list[Any]:
    """The finished requests of greedy replies, in rounds of a plan."""
    batch = omni.prepare([user(question) for question, _ in pairs])
    stop = (omni.config.im_end_token_id,)
    parts = omni.params["thinker"], omni.declarations["thinker"], omni.config.thinker.text
    engine = SpeculativeEngine(PlainEngine(*parts, Sampling(), stop), plan)
    requests = requests_for(batch, Limits(NEW_TOKENS, stop), [0] * len(pairs))
    Batching(engine, len(requests), Admission(batch, requests)).finish()
    return requests


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.drafted", description=__doc__))
