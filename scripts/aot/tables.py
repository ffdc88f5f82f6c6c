"""Tables of compiled programs, and the number of conversations that fit on a mesh of H200s."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from omni_jax.ops.cache import capacity_for
from omni_jax.sharding import mesh_name
from omni_jax.weights.budget import describe_part
from scripts.aot.kernels import Work
from scripts.aot.programs import Target

COLUMNS = ("program", "experts", "compile s", "arguments GB", "temporaries GB", "largest array GB",
           "read + written, GB", "of what must be read", "kernels", "launches", "expected ms",
           "expected ms, launched by the host", "copies")  # fmt: skip
MESH_COLUMNS = ("program", "arguments GB", "temporaries GB", "largest array GB", "launches", "collectives",
                "kB sent per token")  # fmt: skip
TRAIN_COLUMNS = ("mesh", "recipe", "rows x tokens of a device", "trained, moments, gradients GB", "frozen GB",
                 "work of add, update GB", "all GB", "fits at 0.75 / 0.9", "collectives of add", "GB sent per step",
                 "kB sent per token")  # fmt: skip
KERNEL_COLUMNS = ("kernel", "opcode", "runs", "MB read", "MB written", "GFLOP", "expected us", "named part")
PART_COLUMNS = ("named part", "launches", "MB read", "MB written", "GFLOP", "expected us", "share")
# Memory of an H200, and the planned lengths of conversations, prompt and reply together.
DEVICE_BYTES, PLANNED_TOKENS = 141e9, (4096, 16384, 65536)
# The share of it that JAX takes by default, and that with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9.
POOL_SHARES = (0.75, 0.9)
# The programs that answer conversations, by the first word of their names.
TEXT_KINDS = ("prefill", "decode", "verify")


@dataclass(frozen=True)
class Row:
    """One compiled program, or the error for which it did not compile.

    new_gb: results that are not in the memory of arguments. copies: launches that only copy, by the name of what they
    copy. collectives: by kind, how often it runs and the bytes that one device sends for it. read_gb, written_gb: in
    one step or frame. needed_gb: what must be read of weights and cache, 0 where it is not counted. expected_ms,
    hosted_ms: the time that follows, if launches are part of a command buffer and if the host makes each. tokens: made
    by the devices that exchange with each other. cache: rows, slots. slowest, parts: where they are asked for, the
    kernels of the most expected time, and all kernels by the named part of the model.
    """

    program: str
    experts: str
    compile_seconds: float = 0.0
    argument_gb: float = 0.0
    temp_gb: float = 0.0
    new_gb: float = 0.0
    largest_gb: float = 0.0
    largest_op: str = ""
    kernels: int = 0
    launches: int = 0
    copies: dict[str, int] = field(default_factory=dict)
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)
    read_gb: float = 0.0
    written_gb: float = 0.0
    needed_gb: float = 0.0
    expected_ms: float = 0.0
    hosted_ms: float = 0.0
    tokens: int = 1
    cache: tuple[int, int] | None = None
    slowest: list[Work] = field(default_factory=list)
    parts: list[Work] = field(default_factory=list)
    error: str = ""


def heading(columns: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = heading(COLUMNS)
    for r in rows:
        if r.error:
            lines.append(f"| {r.program} | {r.experts} | {r.error.replace('|', '/')} |" + " |" * (len(COLUMNS) - 3))
            continue
        copies = ", ".join(f"{count} {name}" for name, count in r.copies.items()) or "none"
        lines.append(
            f"| {r.program} | {r.experts} | {r.compile_seconds:.1f} | {r.argument_gb:.1f} | {r.temp_gb:.3f} "
            f"| {r.largest_gb:.3f} {r.largest_op} | {r.read_gb:.2f} + {r.written_gb:.2f} | {_over_needed(r)} "
            f"| {r.kernels} | {r.launches} | {r.expected_ms:.2f} | {r.hosted_ms:.2f} | {copies} |"
        )
    return "\n".join(lines)


def _over_needed(row: Row) -> str:
    """What a program moves, relative to what it must read."""
    return f"{(row.read_gb + row.written_gb) / row.needed_gb:.2f}" if row.needed_gb else ""


def kernel_tables(rows: Sequence[Row]) -> str:
    """For each program that compiled, its slowest kernels and its named parts, as Markdown."""
    lines = []
    for row in rows:
        if row.error:
            continue
        title = f"{row.program}, {row.experts}" if row.experts else row.program
        lines += ["", f"{title}: the {len(row.slowest)} kernels of the most expected time", ""]
        lines += [*heading(KERNEL_COLUMNS), *map(_kernel_line, row.slowest), "", f"{title}: by named part", ""]
        lines += [*heading(PART_COLUMNS), *(_part_line(part, 1e3 * row.expected_ms) for part in row.parts)]
    return "\n".join(lines)


def _kernel_line(work: Work) -> str:
    return f"| {work.name} | {work.opcode} | {_figures(work)} | {work.part} |"


def _part_line(work: Work, whole: float) -> str:
    return f"| {work.name} | {_figures(work)} | {work.microseconds / whole:.1%} |"


def _figures(work: Work) -> str:
    moved = f"{work.read / 1e6:.2f} | {work.written / 1e6:.2f}"
    return f"{work.runs} | {moved} | {work.operations / 1e9:.2f} | {work.microseconds:.1f}"


def mesh_table(rows: list[Row]) -> str:
    """The rows of several devices as Markdown: all sizes are of one device."""
    lines = heading(MESH_COLUMNS)
    for r in rows:
        if r.error:
            lines.append(f"| {r.program} | {r.error.replace('|', '/')} |" + " |" * 5)
            continue
        moved = ", ".join(f"{count} {kind}" for kind, (count, _) in r.collectives.items()) or "none"
        # What one device sends, over the tokens that all devices which exchange with it make together.
        kilobytes = sum(size for _, size in r.collectives.values()) / r.tokens / 1e3
        lines.append(
            f"| {r.program} | {r.argument_gb:.1f} | {r.temp_gb:.3f} | {r.largest_gb:.3f} {r.largest_op} "
            f"| {r.launches} | {moved} | {kilobytes:.1f} |"
        )
    return "\n".join(lines)


def train_table(mesh: str, batch: str, steps: list[tuple[str, dict[str, int], Row, Row]]) -> str:
    """Recipes on a mesh as Markdown: all sizes are of one device, beside the programs `add` and `update` of a step.

    batch: rows x tokens of a device. steps: the name of each recipe, bytes that a device holds throughout by what they
    are, and its two programs.
    """
    lines = heading(TRAIN_COLUMNS)
    for name, held, add, update in steps:
        if error := add.error or update.error:
            lines.append(f"| {mesh} | {name} | {batch} | {error.replace('|', '/')} |" + " |" * (len(TRAIN_COLUMNS) - 4))
            continue
        state = ", ".join(f"{held[part] / 1e9:.1f}" for part in ("trained", "moments", "gradients"))
        work = [row.temp_gb + row.new_gb for row in (add, update)]
        whole = sum(held.values()) / 1e9 + max(work)
        fits = " / ".join("yes" if whole * 1e9 <= share * DEVICE_BYTES else "no" for share in POOL_SHARES)
        moved = ", ".join(f"{count} {kind}" for kind, (count, _) in add.collectives.items()) or "none"
        sent = sum(size for row in (add, update) for _, size in row.collectives.values())
        lines.append(
            f"| {mesh} | {name} | {batch} | {state} | {held['frozen'] / 1e9:.1f} | {work[0]:.1f}, {work[1]:.1f} "
            f"| {whole:.1f} | {fits} | {moved} | {sent / 1e9:.1f} | {sent / add.tokens / 1e3:.1f} |"
        )
    return "\n".join(lines)


def plan_heading() -> list[str]:
    """The first two lines of a table of `plan` lines."""
    lengths = [f"conversations of {tokens} tokens" for tokens in PLANNED_TOKENS]
    return heading(["mesh", "H200s", "weights, GB per device", *lengths])


def plan(target: Target, sizes: dict[str, int], rows: list[Row]) -> str:
    """A line of Markdown: the weights on one device of a mesh, and how many conversations all devices have room for.

    Besides the weights there are the cache while it grows, one prompt in flight (whole on each device), and the
    temporaries of the programs `rows`. Two numbers each: with JAX's usual share of the memory, and with the larger one.
    """
    parts = [
        describe_part(name, declaration, target.config, {}, str(target.dtype))
        for name, declaration in target.declarations.items()
    ]
    weights = sum(part.weight_bytes(sizes) for part in parts)

    def needed(count: int, tokens: int) -> float:
        cache = sum(part.most_cache_bytes(sizes, count, tokens) for part in parts)
        return weights + cache + temporaries(rows, count, capacity_for(tokens))

    def fitting(tokens: int, share: float) -> int:
        count = 0
        while needed(count + _devices(sizes), tokens) <= share * DEVICE_BYTES:
            count += _devices(sizes)
        return count

    cells = (" / ".join(str(fitting(tokens, share)) for share in POOL_SHARES) for tokens in PLANNED_TOKENS)
    return f"| {mesh_name(sizes)} | {_devices(sizes)} | {weights / 1e9:.1f} | {' | '.join(cells)} |"


def temporaries(rows: list[Row], count: int, slots: int) -> float:
    """An upper bound of the bytes of temporaries on a device, for `count` conversations of `slots` cache slots.

    Nothing grows faster than rows times slots, so each compiled program in `rows` gives an upper bound for larger ones,
    and the lowest of each kind counts. A prompt is prefilled alone; speech has fewer rows and is left out.
    """
    bounds: dict[str, float] = {}
    for row in rows:
        kind = row.program.split()[0]
        prompt = kind == "prefill"
        if kind not in TEXT_KINDS or row.error or row.cache is None or (prompt and row.cache[0] > 1):
            continue
        growth = (1 if prompt else count) * slots / (row.cache[0] * row.cache[1])
        bounds[kind] = min(bounds.get(kind, float("inf")), row.temp_gb * 1e9 * max(1.0, growth))
    return max(bounds.values(), default=0.0)


def _devices(sizes: dict[str, int]) -> int:
    return prod(sizes.values())
