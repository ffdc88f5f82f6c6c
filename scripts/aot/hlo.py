"""Read an optimised HLO text: which kernels it launches, how large their results are, what is copied.

Only computations that run as a sequence of launches count (the entry, loop bodies and branches); a fusion is one
kernel.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from math import prod

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
         "u64": 8, "f64": 8}  # fmt: skip
# These launch nothing: they name, group or point into arrays, or run another computation.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "add-dependency opt-barrier".split()
)
# What each of the n devices of a ring sends for every byte of its result. A ragged one sends less: valid rows only.
RING: dict[str, Callable[[int], Fraction]] = {
    "all-reduce": lambda n: Fraction(2 * (n - 1), n),
    "all-gather": lambda n: Fraction(n - 1, n),
    "reduce-scatter": lambda n: Fraction(n - 1),
    "all-to-all": lambda n: Fraction(n - 1, n),
    "ragged-all-to-all": lambda n: Fraction(n - 1, n),
    "collective-permute": lambda n: Fraction(1),
}
# Opcodes that copy an array or a part of it and compute nothing.
MOVES = frozenset("copy copy-start transpose slice dynamic-slice concatenate pad".split())
# Opcodes that write into an existing array.
UPDATES = frozenset("dynamic-update-slice scatter".split())
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
OPCODE = re.compile(r"(?:^|[\])} ])([a-z][a-z0-9\-]*)\(")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
# The devices that take part: listed, as an iota ("[2,4]<=[8]": two groups of four), or by axes of a mesh given before.
LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=")
AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")


@dataclass(frozen=True)
class Op:
    """One instruction: its name, opcode, result type and whole text."""

    name: str
    opcode: str
    result: str
    text: str
    root: bool

    @property
    def launches(self) -> bool:
        return self.opcode not in FREE and not self.opcode.endswith("-done")

    @property
    def collective(self) -> str:
        """The kind of collective that it starts, or an empty string."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in RING else ""

    def sent(self, devices: int) -> int:
        """Bytes that each device of its group sends, in a ring; a group is all `devices` unless it says otherwise."""
        # What starts names its operands before its results; older starts of all-reduces name results alone.
        starts = self.opcode.endswith("-start") and (self.collective != "all-reduce" or self.result.startswith("(("))
        results = elements(self.result)[1] if starts else self.result
        size = sum(_bytes(kind, dims) for kind, dims in ARRAY.findall(results))
        return int(size * RING[self.collective](self.group(devices)))

    def group(self, devices: int) -> int:
        """The number of devices that take part in it together."""
        if listed := LISTED.search(self.text):
            return len(listed[1].split(","))
        if iota := IOTA.search(self.text):
            return int(iota[1].split(",")[-1])
        if axes := AXES.search(self.text):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
            return prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
        return devices

    @property
    def called(self) -> list[str]:
        """Computations that it runs."""
        names = CALLED.findall(self.text)
        for group in BRANCHES.findall(self.text):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names

    @property
    def operands(self) -> list[str]:
        """Names of its operands."""
        inside = self.text[len(self.result) + len(self.opcode) + 1 :]
        return re.findall(r"%([\w.\-]+)", inside.split("), ")[0])

    @property
    def size(self) -> int:
        """Bytes of its (first) array."""
        found = ARRAY.search(self.result)
        return _bytes(found[1], found[2]) if found else 0

    def __str__(self) -> str:
        found = ARRAY.search(self.result)
        return f"{self.opcode} {found[0]}" if found else self.opcode


def elements(result: str) -> list[str]:
    """The elements of a tuple type."""
    parts, depth = [""], 0
    for letter in result.strip()[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def array_bytes(result: str) -> int:
    """Bytes of all arrays of a result's type; of what starts asynchronously, those of its results alone."""
    if result.startswith("(("):
        result = elements(result)[1]
    return sum(_bytes(kind, dims) for kind, dims in ARRAY.findall(result))


def trips_of(op: Op) -> int:
    """How often a loop runs, one turn where its length is not known."""
    trips = TRIPS.search(op.text)
    return int(trips[1]) if trips else 1


def _bytes(kind: str, dims: str) -> int:
    return BYTES.get(kind, 1) * prod(int(dim) for dim in dims.split(",") if dim)


class Module:
    """The computations of one optimised HLO text."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Op]] = {}
        current: list[Op] = []
        self.entry = ""
        self.devices = max(map(int, DEVICES.findall(text.partition("\n")[0])), default=1)
        for line in text.splitlines():
            if head := HEAD.match(line):
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif found := LINE.match(line):
                opcode = OPCODE.search(found[3])
                if opcode:
                    result = found[3][: opcode.start(1)]
                    current.append(Op(found[2], opcode[1], result, found[3], bool(found[1])))

    @cached_property
    def sequences(self) -> list[str]:
        """Computations that run as launches: the entry and whatever its loops, branches and calls run."""
        names, queue = [], [self.entry]
        while queue:
            name = queue.pop()
            if name in names or name not in self.computations:
                continue
            names.append(name)
            for op in self.computations[name]:
                if op.opcode in ("while", "conditional", "call"):
                    queue += op.called
        return names

    def _launching(self) -> Iterator[Op]:
        for name in self.sequences:
            yield from (op for op in self.computations[name] if op.launches)

    def kernels(self) -> int:
        """Launching instructions in the text."""
        return sum(1 for _ in self._launching())

    def launches(self) -> int:
        """Launches when the program runs."""
        return self._total(lambda op: op.launches)

    def collectives(self) -> dict[str, tuple[int, int]]:
        """How often each kind of collective runs, and the bytes that one device sends for them, all together."""

        def sent(op: Op, kind: str) -> int:
            return op.sent(self.devices) if op.collective == kind else 0

        found = {}
        for kind in RING:
            if count := self._total(lambda op, kind=kind: op.collective == kind):
                found[kind] = (count, self._total(partial(sent, kind=kind)))
        return found

    def _total(self, of: Callable[[Op], int], name: str | None = None) -> int:
        """The sum over what runs; a loop of unknown length counts as one turn, a branch as its longest arm."""
        total = 0
        for op in self.computations[name or self.entry]:
            inner = [self._total(of, c) for c in op.called if c in self.computations]
            if op.opcode == "while":
                total += sum(inner) * trips_of(op)
            elif op.opcode == "conditional":
                total += max(inner, default=0)
            elif op.opcode in ("call", "async-start"):
                total += sum(inner) + of(op)
            else:
                total += of(op)
        return total

    def _written(self, op: Op) -> list[Op]:
        """The instructions that compute what a launch writes: the outputs of a fusion, or the instruction itself."""
        inner = self.computations.get(op.called[0], []) if op.called and op.opcode.startswith("fusion") else []
        named = {o.name: o for o in inner}
        roots = [o for o in inner if o.root] or [op]
        if roots[0].opcode == "tuple":
            roots = [named[name] for name in roots[0].operands if name in named]
        return [self._before_bitcasts(root, named) for root in roots]

    @staticmethod
    def _before_bitcasts(op: Op, named: dict[str, Op]) -> Op:
        while op.opcode == "bitcast" and op.operands and op.operands[0] in named:
            op = named[op.operands[0]]
        return op

    def _all_written(self) -> Iterator[Op]:
        for op in self._launching():
            yield from self._written(op)

    def largest(self) -> tuple[int, str]:
        """Bytes and name of the largest array that a launch writes anew; updates in place do not count."""
        new = [op for op in self._all_written() if op.opcode not in UPDATES]
        largest = max(new, key=lambda op: op.size, default=None)
        return (largest.size, str(largest)) if largest else (0, "")

    def copies(self, watched: dict[int, str]) -> dict[str, int]:
        """How many launches only move an array whose bytes are `watched`, by the array's name there."""
        found = Counter(watched[op.size] for op in self._all_written() if op.opcode in MOVES and op.size in watched)
        return dict(found)
