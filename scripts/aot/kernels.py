"""The kernels of a compiled program that take longest, and its named parts.

What is computed ahead of time says where a program's milliseconds should go, so that a trace on a GPU can be laid
beside it. Figures are of all runs of a kernel in one run of its program, launches as part of a command buffer.
"""

from dataclasses import dataclass

from scripts.aot.traffic import Judge, Traffic


@dataclass(frozen=True)
class Work:
    """What a kernel or a named part does in all its runs: bytes, floating-point operations, expected microseconds.

    opcode: of a kernel, empty of a part. part: that a kernel belongs to.
    """

    name: str
    opcode: str
    part: str
    runs: int
    read: int
    written: int
    operations: int
    microseconds: float


def costliest(judge: Judge, number: int) -> list[Work]:
    """The `number` kernels of the most expected time, the slowest first."""
    works = [
        work_of(op.name, op.opcode, judge.scope(op), one.times(count), count * one.seconds())
        for op, count, one in (judge.launched() if number else ())
    ]
    return sorted(works, key=lambda work: -work.microseconds)[:number]


def named_parts(judge: Judge) -> list[Work]:
    """All kernels by the innermost named part of the model that they belong to, the slowest part first."""
    return [work_of(name, "", name, moved, seconds) for name, (moved, seconds) in judge.by_scope().items()]


def work_of(name: str, opcode: str, part: str, moved: Traffic, seconds: float) -> Work:
    """The figures of one kernel or part."""
    return Work(name, opcode, part, moved.launches, moved.read, moved.written, moved.operations, 1e6 * seconds)
