"""What the sections found, as Markdown: the table first, with what the judge expects beside what was measured."""

from typing import Any

Found = dict[str, Any]
Cells = list[list[Any]]
# Sections whose measurements make the table, and those that measure the same programs in another way.
TABLE, KERNEL, THEIRS = ("text", "speech", "reply", "start", "int8"), ("kernel_text", "kernel_speech"), ("theirs",)


def summary(sections: dict[str, Found]) -> str:
    """The table, what failed and what is left."""
    lines = ["# GPU check", "", *table("The table", main_table(sections))]
    for name, found in sections.items():
        lines += [f"**{name} failed:** {error}\n" for error in errors(found)]
    left = {name: found["left"] for name, found in sections.items() if found.get("left")}
    lines += [f"**left, no time ({name}):** {'; '.join(steps)}\n" for name, steps in left.items()]
    return "\n".join(lines)


def markdown(sections: dict[str, Found]) -> str:
    """All that was found."""
    return "\n".join([summary(sections), *(section(name, found) for name, found in sections.items())])


def section(name: str, found: Found) -> str:
    """What one section found."""
    lines: list[str] = []
    if facts := found.get("fact"):
        lines += table(f"{name}: facts", [["", ""], *([fact["name"], fact["value"]] for fact in facts)])
    if findings := found.get("finding"):
        head = ["compared", "relative error", "bound", "holds"]
        lines += table(f"{name}: correctness", [head, *(finding_cells(one) for one in findings)])
    if timings := found.get("timing"):
        head = ["measured", "ms", "rate", "first call, s", "expected ms", "launches", "GB moved", "note"]
        lines += table(f"{name}: times", [head, *(timing_cells(one) for one in timings)])
    for profile in found.get("profile", []):
        rows = [[kernel[:90], f"{ms:.3f}", calls] for kernel, ms, calls in profile["kernels"]]
        lines += table(f"Where the time goes: {profile['title']}", [["kernel", "ms", "calls"], *rows])
    return "\n".join(lines)


def errors(found: Found) -> list[str]:
    """What went wrong in a section: its errors, and comparisons out of their bounds."""
    outside = [one["name"] for one in found.get("finding", []) if not holds(one)]
    return [*found.get("errors", []), *([f"out of bounds: {', '.join(outside)}"] if outside else [])]


def holds(finding: Found) -> bool:
    """Whether an error is within its bound; one that is no number is not."""
    return finding["error"] <= finding["bound"]


def main_table(sections: dict[str, Found]) -> Cells:
    """Every program once: measured, expected and their ratio, with the kernel, and beside transformers."""
    ours, kernel, theirs = (by_name(sections, names) for names in (TABLE, KERNEL, THEIRS))
    rows: Cells = [
        ["program", "ms", "expected", "ms / expected", "rate", "must reach", "kernel on, ms", "expected",
         "ms / expected", "transformers, ms", "times as fast", "launches", "GB moved"]
    ]  # fmt: skip
    for name, one in ours.items():
        own, other, with_kernel = one["milliseconds"], theirs.get(name), kernel.get(name)
        expected = expected_of(one, ours)
        row = [name, number(own), number(expected), ratio(own, expected), rate(one), one["goal"]]
        if with_kernel is None:
            row += ["", "", ""]
        else:
            on, expected = with_kernel["milliseconds"], with_kernel["expected_ms"]
            row += [number(on), number(expected), ratio(on, expected)]
        row += [number(other["milliseconds"]), ratio(other["milliseconds"], own)] if other else ["", ""]
        moved = "" if one["moved_gb"] is None else f"{one['moved_gb']:.2f}"
        rows.append([*row, "" if one["launches"] is None else one["launches"], moved])
    return rows


def by_name(sections: dict[str, Found], names: tuple[str, ...]) -> dict[str, Found]:
    """The timings of some sections by their names."""
    return {one["name"]: one for name in names for one in sections.get(name, {}).get("timing", [])}


def expected_of(timing: Found, known: dict[str, Found]) -> float | None:
    """The milliseconds expected: the judge's, or the sum over its parts where all of them have been judged."""
    if not timing["parts"]:
        return timing["expected_ms"]
    parts = [(known.get(name, {}).get("expected_ms"), count) for name, count in timing["parts"]]
    return None if any(ms is None for ms, _ in parts) else sum(ms * count for ms, count in parts)


def finding_cells(finding: Found) -> list[Any]:
    """A row of correctness."""
    return [finding["name"], f"{finding['error']:.2e}", f"{finding['bound']:.0e}", "yes" if holds(finding) else "NO"]


def timing_cells(timing: Found) -> list[Any]:
    """A row of one section's times."""
    moved, launches = timing["moved_gb"], timing["launches"]
    cells = [timing["name"], number(timing["milliseconds"]), rate(timing), f"{timing['first_seconds']:.1f}"]
    cells += [number(timing["expected_ms"]), "" if launches is None else launches]
    return [*cells, "" if moved is None else f"{moved:.2f}", timing["note"]]


def number(value: float | None) -> str:
    """Milliseconds, or nothing."""
    return "" if value is None else f"{value:,.3f}" if value < 100 else f"{value:,.0f}"


def ratio(value: float, other: float | None) -> str:
    """How many times the other one a value is, or nothing."""
    return f"{value / other:.2f}" if other else ""


def rate(timing: Found) -> str:
    """What is made per second."""
    return f"{timing['rate']:,.0f} {timing['unit']}" if timing["rate"] else ""


def table(title: str, cells: Cells) -> list[str]:
    """Lines of a table, nothing without rows."""
    head, *rows = cells
    if not rows:
        return []
    lines = [f"## {title}", "", "| " + " | ".join(map(str, head)) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows]
    return [*lines, ""]
