"""How many bytes a compiled program reads and writes in device memory, and the time that follows.

Of a slice, a gather or an update in place, what is really touched counts, not the array that it lies in; inside a
fusion likewise, so that a layer which a kernel takes out of a stack counts as one layer. A kernel that computes grouped
products over all experts of a layer is given the whole layer; of it, the share of experts that some row is expected to
choose counts (`expected_share`). What is read twice by one kernel counts once, as if a cache of the device held it.
The kernel that attends for one token (`ops.decode_kernel`) is given the caches of all layers, in place: of each it
reads one layer, all of whose slots count as if they held tokens, and writes one slot of each row.

The time of a launch is the longer one of its bytes and its operations (`products`) at the device's speed, and the cost
of a launch: little within a command buffer, more where the host launches every kernel by itself.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from scripts.aot.hlo import UPDATES, Module, Op, array_bytes, elements, trips_of
from scripts.aot.products import GROUPED, operations, shape_of

# An H200: bytes per second that kernels reach of 4.8 TB/s, and bfloat16 operations per second that products reach.
BANDWIDTH, OPERATIONS = 4.3e12, 790e12
# Seconds that a launch costs by itself, as part of a command buffer (a CUDA graph).
GRAPH_LAUNCH = 1.5e-6
# The same outside of one. An assumption, measured here on no GPU: 3 us is the usual figure of a launch by the host. It
# is added to every launch, as if the device waited for each; the host runs ahead while kernels take longer than that.
HOST_LAUNCH = 3e-6
# Instructions that take a part of their first operand.
PARTS = frozenset("dynamic-slice slice gather".split())
# Instructions that give what they are given, perhaps in another shape or type: a kernel computes of them what it needs.
SAME = frozenset("bitcast convert copy reshape transpose tuple get-tuple-element".split())
SCOPE = re.compile(r'op_name="([^"]*)"')
# Scopes that JAX makes by itself, and what kernels in no other belong to.
UNNAMED_SCOPE = re.compile(
    r".*[(:>,].*|while|body|cond|closed_call|eval_jaxpr|checkpoint|rematted_computation|shard_map|branch_\d+_fun"
)
UNNAMED = "loop"
# The kernel of one token's attention, and which of its operands its outputs are.
ONE_TOKEN, ALIASES = "decode_attention/", re.compile(r"\{(\d+)\}: \((\d+), \{\}")


@dataclass(frozen=True)
class Traffic:
    """What launches move and compute: launches, bytes read and written, floating-point operations."""

    launches: int = 0
    read: int = 0
    written: int = 0
    operations: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[int, int, int, int]:
        return self.launches, self.read, self.written, self.operations

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def times(self, count: int) -> "Traffic":
        """The same `count` times."""
        return Traffic(*(count * value for value in self.values))

    def seconds(self, launch: float = GRAPH_LAUNCH) -> float:
        """The time on an H200 of one launch, or of several as if they were one and cost as many launches."""
        return max(self.moved / BANDWIDTH, self.operations / OPERATIONS) + launch * self.launches


def expected_share(rows: int, experts: int, chosen: int) -> float:
    """The share of a layer's experts that some of `rows` rows chooses, if each chooses evenly and by itself."""
    return 1 - (1 - chosen / experts) ** rows


class Judge:
    """The traffic of one module's kernels.

    share: of the experts of a layer that grouped products read.
    """

    def __init__(self, module: Module, share: float = 1.0):
        self.module, self.share = module, share
        self.named = {name: {op.name: op for op in ops} for name, ops in module.computations.items()}

    def total(self) -> Traffic:
        """Of the whole program, as often as each kernel runs."""
        return sum((traffic for _, _, traffic in self.kernels()), Traffic())

    def seconds(self, launch: float = GRAPH_LAUNCH) -> float:
        """The time of all launches, one after the other."""
        return sum(one.seconds(launch) * count for _, count, one in self.launched())

    def by_scope(self, launch: float = GRAPH_LAUNCH) -> dict[str, tuple[Traffic, float]]:
        """What each named part of the model moves, and the seconds of its launches, the slowest part first."""
        moved: dict[str, Traffic] = defaultdict(Traffic)
        seconds: dict[str, float] = defaultdict(float)
        for op, count, one in self.launched():
            name = self.scope(op)
            moved[name] += one.times(count)
            seconds[name] += one.seconds(launch) * count
        return {name: (moved[name], seconds[name]) for name in sorted(moved, key=lambda name: -seconds[name])}

    def scope(self, op: Op) -> str:
        """The innermost named part of the model of a kernel; of a fusion without one, that of its last instruction."""
        within = self.module.computations[fused] if (fused := self._fused(op)) else []
        return next((name for one in (op, *reversed(within)) if (name := scope_of(one))), UNNAMED)

    def kernels(self) -> Iterator[tuple[Op, int, Traffic]]:
        """Every launching instruction, how often it runs, and what it moves in all."""
        for op, count, one in self.launched():
            yield op, count, one.times(count)

    def launched(self) -> Iterator[tuple[Op, int, Traffic]]:
        """Every launching instruction, how often it runs, and what it moves each time."""
        for computation, op, count in self._running(self.module.entry, 1):
            reads = sum(self._read(computation, op, i) for i in range(len(op.operands)))
            yield op, count, Traffic(1, reads, self._written(computation, op), self._operations(computation, op))

    def _running(self, computation: str, count: int) -> Iterator[tuple[str, Op, int]]:
        """Launching instructions with how often they run; of the arms of a branch, those of the one with the most."""
        for op in self.module.computations[computation]:
            called = [name for name in op.called if name in self.module.computations]
            if op.opcode == "while":
                for name in called:
                    yield from self._running(name, count * trips_of(op))
            elif op.opcode == "conditional":
                arms = [list(self._running(name, count)) for name in called]
                yield from max(arms, key=lambda arm: sum(n for *_, n in arm), default=[])
            elif op.opcode == "call":
                for name in called:
                    yield from self._running(name, count)
            elif op.launches:
                yield computation, op, count

    def _read(self, computation: str, op: Op, operand: int) -> int:
        """Bytes that an instruction reads of an operand that lies in memory."""
        source = self.named[computation].get(op.operands[operand])
        if source is None:
            return 0
        whole, fused = array_bytes(source.result), self._fused(op)
        if fused:
            parameter = self._parameter(fused, operand)
            return min(whole, self._used(fused, parameter)) if parameter else 0
        if op.opcode in PARTS and operand == 0:
            return array_bytes(op.result)
        if operand in _caches(op):
            return whole // shape_of(source.result)[0]
        return 0 if op.opcode in UPDATES and operand == 0 else whole

    def _used(self, computation: str, value: Op) -> int:
        """Bytes of a value that the instructions of a fusion read."""
        total = 0
        for op in self.module.computations[computation]:
            for i, name in enumerate(op.operands):
                if name == value.name:
                    total += self._used_by(computation, op, i, value)
        return total

    def _used_by(self, computation: str, op: Op, operand: int, value: Op) -> int:
        whole, fused = array_bytes(value.result), self._fused(op)
        if op.opcode in SAME:
            if op.root:
                return whole  # what leaves a kernel is written, so all of it was read
            given = array_bytes(op.result)
            return min(whole, self._used(computation, op) * whole // given) if given else 0
        if fused:
            parameter = self._parameter(fused, operand)
            return min(whole, self._used(fused, parameter)) if parameter else 0
        if op.opcode in PARTS:
            taken = array_bytes(op.result)
            # What is sliced out for a grouped product is read as far as that reads it.
            readers = [user for user in self._users(computation, op) if GROUPED in user.text]
            return int(self.share * taken) if operand == 0 and readers else taken if operand == 0 else whole
        return 0 if op.opcode in UPDATES and operand == 0 else whole

    def _users(self, computation: str, value: Op) -> Iterator[Op]:
        """The instructions that use a value, also under another shape."""
        for op in self.module.computations[computation]:
            if value.name in op.operands:
                if op.opcode in SAME:
                    yield from self._users(computation, op)
                else:
                    yield op

    def _written(self, computation: str, op: Op) -> int:
        """Bytes that an instruction writes: of an update in place, those of the update."""
        fused = self._fused(op)
        if not fused:
            return self._new(computation, op)
        root = next(one for one in self.module.computations[fused] if one.root)
        roots = [self.named[fused][name] for name in root.operands] if root.opcode == "tuple" else [root]
        return sum(self._new(fused, one) for one in roots)

    def _new(self, computation: str, op: Op) -> int:
        named = self.named[computation]
        while op.opcode == "bitcast" and op.operands[0] in named:
            op = named[op.operands[0]]
        if op.opcode in UPDATES:
            update = named.get(op.operands[1 if op.opcode == "dynamic-update-slice" else 2])
            return array_bytes(update.result) if update else 0
        if self._fused(op):
            return self._written(computation, op)
        if caches := _caches(op).values():
            arrays = [(array_bytes(text), shape_of(text)) for text in elements(op.result)]
            return sum(size // (shape[0] * shape[3] if i in caches else 1) for i, (size, shape) in enumerate(arrays))
        # What a library's product gives beside its result is its workspace.
        return op.size if op.opcode == "custom-call" else array_bytes(op.result)

    def _operations(self, computation: str, op: Op) -> int:
        """Floating-point operations of the products in an instruction."""
        if fused := self._fused(op):
            return sum(self._operations(fused, one) for one in self.module.computations[fused])
        return operations(op, self.named[computation])

    def _fused(self, op: Op) -> str:
        """The computation that an instruction runs within its kernel, or an empty string."""
        if not op.opcode.startswith("fusion"):
            return ""
        return next((name for name in op.called if name in self.named), "")

    def _parameter(self, computation: str, index: int) -> Op | None:
        return next((op for op in self.module.computations[computation] if f"parameter({index})" in op.text), None)


def scope_of(op: Op) -> str:
    """The innermost named part of the model in an instruction's own name, or an empty string."""
    found = SCOPE.search(op.text)
    names = found[1].split("/")[:-1] if found else []
    return next((name for name in reversed(names) if not UNNAMED_SCOPE.fullmatch(name)), "")


def _caches(op: Op) -> dict[int, int]:
    """The operands of one token's kernel that are caches [L, B, K, S, H], and the outputs that they become."""
    if op.opcode != "custom-call" or ONE_TOKEN not in op.text:
        return {}
    return {int(operand): int(output) for output, operand in ALIASES.findall(op.text)}
