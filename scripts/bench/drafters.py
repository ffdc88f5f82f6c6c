"""Compare drafters on the prompts of a file: how many drafts are accepted, what they cost, and what they gain.

Every prompt is answered by the plain loop and by each drafter, in turn and twice: the first run compiles, the second
is measured. A DFlash drafter drafts its block, an EAGLE-3 drafter a chain and a tree. "oracle:0.3" is an oracle
drafter with a 30 % error rate: it drafts the reply of the plain loop, three tokens in ten replaced by wrong ones. Of
"turns" only the first one is asked; "messages" are asked as they are, with their media. Replies are compared with
those of the plain loop: in float32 none may differ, in bfloat16 near-ties may.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

import omni_jax
from omni_jax.decode.draft.acceptance import Rounds
from omni_jax.decode.draft.engine import SpeculativeEngine
from omni_jax.decode.draft.plan import DraftPlan, KnownDrafters
from omni_jax.decode.limits import Limits
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch
from omni_jax.omni import Omni
from omni_jax.rows.media import located
from omni_jax.weights.drafters import load_drafter
from scripts.bench.compare import write_json
from scripts.bench.drafter_tables import figures, finite, plot, table
from scripts.bench.experts import count_experts
from scripts.bench.options import Drafters
from scripts.bench.thinker import Decoded, OurThinker
from scripts.small.oracle import oracle

# The ways in which each kind of drafter drafts, with their trees; this one is EAGLE's own.
FORMS: dict[str, tuple[tuple[str, tuple[int, int] | None], ...]] = {
    "dflash": (("block", None),),
    "eagle3": (("chain", None), ("tree", (7, 10))),
}
# Tokens that a round of the oracle verifies.
ORACLE_TOKENS = 8


@dataclass
class Way:
    """One way to decode, and its results.

    error_rate: of an oracle; None for others. replies: the rounds of each reply. experts: distinct experts per layer in
    each counted round, int [layers]. differing: replies unlike those of the plain loop.
    """

    name: str
    error_rate: float | None = None
    drafts: DraftPlan | None = None
    seconds: float = 0.0
    tokens: int = 0
    drafted: int = 0
    verified: int = 0
    differing: int = 0
    replies: list[Rounds] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)

    def record(self, decoded: Decoded, plain: Decoded) -> None:
        """Add a decoded batch; `plain` is the same by the plain loop."""
        self.seconds += decoded.decode_seconds
        self.tokens += sum(len(ids) - 1 for ids in decoded.token_ids)
        pairs = zip(decoded.token_ids, plain.token_ids, strict=True)
        self.differing += sum(ids != expected for ids, expected in pairs)
        self.replies += decoded.rounds
        self.verified += sum(decoded.verified)
        self.drafted += sum(decoded.verified) - sum(len(rounds.given) for rounds in decoded.rounds)


def compare(options: Drafters) -> list[Way]:
    """The plain loop, and every drafter of the options, on their prompts."""
    questions = read_prompts(options.prompts)[: options.count]
    rates = {name: read_error_rate(name) for name in options.drafter if name.startswith("oracle:")}
    omni = open_model(options.model, options.dtype)
    ways = [Way("plain")]
    for name in options.drafter:
        ways += [Way(name, error_rate=rates[name])] if name in rates else ways_of(name, omni, options.dtype)
    for start in range(0, len(questions), options.batch):
        batch = omni.prepare(questions[start : start + options.batch])
        answer(omni, batch, options.new, ways, count=start == 0)
    return ways


def answer(omni: Omni, batch: Batch, new: int, ways: list[Way], count: bool) -> None:
    """Answer a batch in every way, the plain loop first; `count` the experts of its first rounds too."""
    model = OurThinker(omni.params["thinker"], omni.declarations["thinker"], omni.config.thinker.text)
    stop_ids, plain = (omni.config.im_end_token_id,), None
    for way in ways:
        if way.error_rate is not None and plain is not None:
            way.drafts = oracle(plain.source, ORACLE_TOKENS, way.error_rate)
        # The first run compiles.
        decoded = [model.decode(batch, new, way.drafts, stop_ids) for _ in range(2)][-1]
        plain = plain or decoded
        way.record(decoded, plain)
        if count and way.drafts is not None:
            way.experts = count_experts(
                SpeculativeEngine(model.engine(stop_ids), way.drafts), batch, Limits(new, stop_ids)
            )


def open_model(path: Path, dtype: str) -> Omni:
    """The Thinker of a checkpoint."""
    return omni_jax.load(path, dtype=dtype, parts=("thinker",))


def read_error_rate(name: str) -> float:
    """The error rate of "oracle:0.3"; InputError for any other form."""
    try:
        rate = float(name.removeprefix("oracle:"))
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise InputError(f"{name!r}: an oracle's error rate is a number from 0 to 1, as in oracle:0.3")
    return rate


def ways_of(directory: str, omni: Omni, dtype: str) -> list[Way]:
    """The ways to decode with the drafter of a directory."""
    drafter, plans = load_drafter(directory, dtype=dtype), KnownDrafters(omni.config)
    folder, ways = Path(directory).resolve().name, []
    label = folder if drafter.kind in folder else f"{drafter.kind} {folder}"
    for form, tree in FORMS[drafter.kind]:
        drafts = plans.resolve_draft_plan(drafter, None, tree, drawn=False)
        assert drafts is not None
        ways.append(Way(f"{label}, {form} of {drafts.verify_tokens[0] - 1}", drafts=drafts))
    return ways


def read_prompts(path: Path) -> list[list[dict[str, Any]]]:
    """A conversation for each line of a JSONL file: "messages", the first of "turns", "prompt" or "question".

    Paths of media are relative to the file. InputError naming a line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    prompts = [_asked(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts


def _asked(line: str, path: Path, number: int) -> list[dict[str, Any]]:
    where = f"{path}, line {number}"
    try:
        values = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    values = values if isinstance(values, dict) else {}
    if isinstance(messages := values.get("messages"), list) and messages:
        return located(messages, path.parent)
    found = [values[key] for key in ("turns", "prompt", "question") if values.get(key)]
    text = found[0] if found else None
    text = text[0] if isinstance(text, list) else text
    if not isinstance(text, str):
        raise InputError(f"{where}: neither messages nor turns nor prompt nor question with a text")
    return [{"role": "user", "content": text}]


def report(options: Drafters) -> None:
    """Compare the drafters, print the table, and write the JSON and the plot if asked for."""
    ways = compare(options)
    found = {way.name: figures(way, ways[0]) for way in ways}
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {options.model}")
    print(table(options, found))
    write_json(options.json, options, finite(found))
    if options.plot:
        plot(found, options.plot)
