"""Compare drafters on the prompts of a file: how long their drafts stand, what they cost, and what they gain.

Every prompt is answered by the plain loop and by each drafter, in turn and twice: the first time compiles, the second
is measured. A DFlash drafter drafts its block, an EAGLE-3 drafter a chain and a tree, "oracle:0.3" what the plain loop
said with three lies in ten. Only the first turn of a conversation is asked. Answers are compared with those of the
plain loop: in float32 none may differ, in bfloat16 near-ties may.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import omni_jax
from omni_jax.decode.draft.acceptance import (
    Rounds,
    acceptance_curve,
    conditional,
    interval,
    mean_accepted,
    mean_accepted_per_reply,
)
from omni_jax.decode.draft.loop import SpeculativeState
from omni_jax.decode.draft.plan import Drafting, Draftings
from omni_jax.decode.draft.session import DraftedSession
from omni_jax.decode.draft.tree import DraftSampler
from omni_jax.decode.sampling import Plan, Sampling
from omni_jax.decode.session import Session
from omni_jax.errors import InputError
from omni_jax.loading import default_dtype
from omni_jax.models.decoder import DecoderLayers
from omni_jax.models.param import Declaration, bind
from omni_jax.omni import Omni
from omni_jax.ops.attention import attend, tree_mask
from omni_jax.ops.moe import route
from omni_jax.weights.drafters import load_drafter
from scripts.bench.worker import Bench
from scripts.small.oracle import oracle

# EAGLE's own tree: levels and candidates.
TREE = (7, 10)
# Rounds of the first prompts in which experts are counted.
COUNTED_ROUNDS = 8
LINE = "{:<32}{:>10}{:>9}{:>9}{:>7}{:>15}{:>8}{:>9}{:>10}{:>9}{:>11}"


@dataclass
class Way:
    """A way to draft, and what it gave: a reply's rounds each, experts of the layers in each counted round."""

    name: str
    lies: float | None = None
    drafting: Drafting | None = None
    seconds: float = 0.0
    tokens: int = 0
    drafted: int = 0
    verified: int = 0
    differing: int = 0
    replies: list[Rounds] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)


def compare(bench: Bench) -> list[Way]:
    """The plain loop, and every drafter of `bench`, on its prompts."""
    assert bench.model is not None and bench.prompts is not None
    asked = read_prompts(bench.prompts)[: bench.count]
    lies = {name: read_lies(name) for name in bench.drafter if name.startswith("oracle:")}
    omni = open_model(bench.model, bench.dtype)
    ways = [Way("plain")]
    for name in bench.drafter:
        ways += [Way(name, lies=lies[name])] if name in lies else ways_of(name, omni, bench.dtype)
    for start in range(0, len(asked), bench.batch):
        batch = omni.prepare([[{"role": "user", "content": text}] for text in asked[start : start + bench.batch]])
        stop_ids = (omni.config.im_end_token_id,)
        settings = (omni.params["thinker"], omni.declarations["thinker"], omni.config.thinker.text, batch, Sampling())
        said = Session(*settings, bench.new, 0, stop_ids)
        for way in ways:
            session = said
            if way.lies is not None:
                way.drafting = oracle(said, 8, way.lies)
            if way.drafting is not None:
                session = DraftedSession(*settings, bench.new, 0, stop_ids, (), way.drafting)
            for _ in range(2):
                for _ in session.chunks():
                    pass
            book(way, session, said)
            if not start and isinstance(session, DraftedSession):
                way.experts = count_experts(session)
    return ways


def book(way: Way, session: Session, said: Session) -> None:
    """Add what a session gave to its way."""
    way.seconds += session.decode_seconds
    way.tokens += sum(len(ids) - 1 for ids in session.rows)
    way.differing += sum(ids != plain for ids, plain in zip(session.rows, said.rows, strict=True))
    if isinstance(session, DraftedSession):
        for row in range(len(session.rows)):
            stats = session.row_stats(row)
            way.replies.append(session.rounds_of(row))
            way.drafted, way.verified = way.drafted + stats["drafted"], way.verified + stats["verified"]


def open_model(path: Path, dtype: str) -> Omni:
    """The Thinker of a checkpoint."""
    return omni_jax.load(path, dtype=dtype, parts=("thinker",))


def read_lies(name: str) -> float:
    """The fraction of lies of "oracle:0.3"; InputError for another."""
    try:
        lies = float(name.removeprefix("oracle:"))
    except ValueError:
        lies = -1.0
    if not 0 <= lies <= 1:
        raise InputError(f"{name!r}: an oracle lies with a frequency from 0 to 1, as in oracle:0.3")
    return lies


def ways_of(directory: str, omni: Omni, dtype: str) -> list[Way]:
    """The ways to draft with the drafter of a directory."""
    drafter, known = load_drafter(directory, dtype=dtype or default_dtype()), Draftings(omni.config)
    folder, ways = Path(directory).resolve().name, []
    label = folder if drafter.kind in folder else f"{drafter.kind} {folder}"
    for what, tree in (("block", None),) if drafter.kind == "dflash" else (("chain", None), ("tree", TREE)):
        drafting = known.settle(drafter, None, tree, drawn=False)
        assert drafting is not None
        ways.append(Way(f"{label}, {what} of {drafting.widths[0] - 1}", drafting=drafting))
    return ways


def read_prompts(path: Path) -> list[str]:
    """The first turn of every line of a JSONL file: its "turns", "prompt" or "question"; InputError naming a line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    prompts = [_first_turn(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts


def _first_turn(line: str, where: str) -> str:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    found = (
        [values[key] for key in ("turns", "prompt", "question") if values.get(key)] if isinstance(values, dict) else []
    )
    text = found[0] if found else None
    text = text[0] if isinstance(text, list) else text
    if not isinstance(text, str):
        raise InputError(f"{where}: neither turns nor prompt nor question with a text")
    return text


def count_experts(session: DraftedSession) -> list[np.ndarray]:
    """Distinct experts of every layer that each of the first rounds' verifications used, all rows together: int [L]."""
    _, state = session.begin()
    counted = []
    for _ in range(COUNTED_ROUNDS):
        counted.append(
            np.asarray(
                experts_used(
                    (session.params, session.drafting.params),
                    state,
                    session.drafting.proposer,
                    session.declaration,
                    session.width,
                )
            )
        )
        _, state = session._run(state, session.stop_ids, 1)
        if bool(jnp.all(state.decode.rows.done)):
            break
    return counted


@partial(jax.jit, static_argnums=(2, 3, 4))
def experts_used(
    params: tuple[dict, Any], state: SpeculativeState, proposer: Any, declaration: Declaration, width: int
) -> jax.Array:
    """Distinct experts of every layer of experts, int32 [L], if `state` went on with a greedy round of `width`."""
    thinker, decode = bind(declaration, params[0]), state.decode
    choose = DraftSampler(decode.rows.keys, decode.cache.length + 1, {}, Plan(True, False, 0))
    drafts, _ = proposer.propose(params[1], thinker, state.memory, decode.rows.token, width, choose)
    ancestors = drafts.ancestors()
    mask = tree_mask(decode.cache.length, ancestors, decode.cache.slots)
    position = decode.positions(jnp.sum(ancestors, axis=2) - 1)
    layers: DecoderLayers = thinker.layers
    config = layers.config
    x = thinker.embed_tokens(drafts.token_ids)
    routed = [l for l in range(config.num_layers) if l not in config.dense_layers]
    _, cache, inputs = layers.extend(x, thinker._rope(position, x), decode.cache, taps=tuple(routed), mask=mask)
    # The same slots again: each layer's keys and values are already there.
    cache = type(cache)(cache.k, cache.v, decode.cache.length)

    def chosen(step: tuple) -> jax.Array:
        l, i, x = step

        def over(q: Any, k: Any, v: Any, cache: Any, l: Any) -> jax.Array:
            return attend(q, cache.k[l], cache.v[l], mask)

        x = x + layers._attention(x, l, thinker._rope(position, x), cache, over)[0]
        rows = layers.mlp_norm(x, l).reshape(-1, x.shape[-1])
        ids, _ = route(rows, layers.moe.router[...][i], config.experts_per_token, config.norm_topk_prob)
        return jnp.sum(jnp.zeros(config.num_experts, jnp.int32).at[ids.reshape(-1)].set(1))

    return jax.lax.map(chosen, (jnp.asarray(routed), jnp.arange(len(routed)), inputs))


def figures(way: Way, plain: Way) -> dict[str, Any]:
    """What there is to tell about a way."""
    rate = way.tokens / way.seconds
    told: dict[str, Any] = {"tokens_per_second": rate, "gain": rate * plain.seconds / plain.tokens}
    replies = [reply for reply in way.replies if len(reply.given)]
    if not replies:
        return told
    survived = acceptance_curve(replies)
    low, high = interval(replies, partial(acceptance_curve, positions=len(survived)))
    bounds = [float(bound) for bound in interval(replies, mean_accepted)]
    return told | {
        "micro": mean_accepted(replies),
        "micro_interval": bounds,
        "macro": mean_accepted_per_reply(replies),
        "survival": survived.tolist(),
        "survival_low": low.tolist(),
        "survival_high": high.tolist(),
        "conditional": conditional(survived).tolist(),
        "rounds": sum(len(r.given) for r in replies),
        "drafted": way.drafted,
        "verified": way.verified,
        "experts_per_verify": float(np.mean(way.experts)),
        "differing": way.differing,
    }


def table(bench: Bench, found: dict[str, dict]) -> str:
    """The figures for people."""
    lines = [
        f"{bench.prompts and bench.prompts.name}, first turns; at most {bench.new} new tokens, batch {bench.batch}, "
        f"{bench.dtype}; tokens a round hold the target's own",
        LINE.format(*", tokens/s,x plain,a round,mean,95 %,rounds,drafted,verified,experts,differing".split(",")),
    ]
    for name, told in found.items():
        cells = [f"{told['tokens_per_second']:.1f}", f"{told['gain']:.2f}"]
        if "micro" in told:
            low, high = told["micro_interval"]
            cells += [f"{told['micro']:.2f}", f"{told['macro']:.2f}", f"{low:.2f} to {high:.2f}"]
            cells += [str(told[key]) for key in ("rounds", "drafted", "verified")]
            cells += [f"{told['experts_per_verify']:.1f}", str(told["differing"])]
        lines.append(LINE.format(name, *cells, *[""] * (10 - len(cells))))
    for title, key in (("all drafts up to a position stood", "survival"), ("if those before it stood", "conditional")):
        lines += ["", title]
        for name, told in found.items():
            if key in told:
                lines.append(f"{name:<32}" + "".join(f"{value:>7.3f}" for value in told[key]))
    return "\n".join(lines)


def plot(found: dict[str, dict], path: Path) -> None:
    """Draw how often drafts stood up to each position, with 95 % intervals, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, told in found.items():
        if "survival" in told:
            position = np.arange(1, len(told["survival"]) + 1)
            (line,) = axes.plot(position, told["survival"], marker="o", label=f"{name}: {told['micro']:.2f} a round")
            axes.fill_between(position, told["survival_low"], told["survival_high"], alpha=0.2, color=line.get_color())
    axes.set(xlabel="position of a draft", ylabel="rounds in which all drafts up to it stood", ylim=(0, 1.02))
    axes.set_xticks(range(1, 1 + max(len(told.get("survival", ())) for told in found.values())))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(bench: Bench) -> None:
    """Compare the drafters, print the table, and write the JSON and the plot where asked for."""
    for path in (bench.json, bench.plot):
        if path and not path.parent.is_dir():
            raise InputError(f"{path}: its folder does not exist; make it first")
    ways = compare(bench)
    found = {way.name: figures(way, ways[0]) for way in ways}
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {bench.model}")
    print(table(bench, found))
    if bench.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(bench).items()}
        bench.json.write_text(json.dumps({"bench": settings, "figures": _finite(found)}, indent=1, allow_nan=False))
    if bench.plot:
        plot(found, bench.plot)


def _finite(value: Any) -> Any:
    """The same with None for what is not a number, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
