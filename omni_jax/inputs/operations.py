"""The size of what each operation of a template would make, checked from its name and operands before it runs.

Operators, methods and filters whose result can be much larger than their operands have a check here, and so do those
that can take long; the others are linear, and `limits` counts their results. Templates cannot call methods that are not
in `METHODS`.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omni_jax.files import MAX_DEPTH, depth_of
from omni_jax.inputs.limits import (
    DATA,
    ELEMENT,
    ESCAPED,
    MAX_BITS,
    LimitError,
    allow,
    check_value,
    made,
    text_of,
    weight,
)

MAX_PADDING = 999  # the width of a formatted field, digits of a rounded number
MAX_STEPS = 1_000_000_000  # character comparisons, where Python searches from the end or strips
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold center count endswith find format format_map index isalnum isalpha isascii isdecimal "
        "isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition "
        "removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith "
        "strip swapcase title upper zfill".split()
    ),
    dict: frozenset("copy get items keys values".split()),
    list: frozenset("copy count index".split()),
    tuple: frozenset("count index".split()),
}


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Raise LimitError if a binary operator would make too large a value."""
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * right > MAX_BITS:
            raise LimitError(f"it computes a number of more than {MAX_BITS:,} bits")
    elif operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(many, DATA) and isinstance(times, int):
                allow((1 if isinstance(many, str) else ELEMENT) * len(many) * times)
    elif operator == "+" and isinstance(left, DATA) and isinstance(right, DATA):
        allow((1 if isinstance(left, str) else ELEMENT) * (len(left) + len(right)))
    elif operator == "%" and isinstance(left, str):
        _check_percent(left, right)


def _check_percent(form: str, *values: Any, **named: Any) -> None:
    fields = re.sub(r"%\([^)]*\)", "%", text_of(form))
    _check_fields(form, fields.count("%"), re.findall(r"%[-+ #0-9.*]*", fields), (values, named))


def _check_braces(form: str, *values: Any, **named: Any) -> None:
    fields = form.replace("{{", "").replace("}}", "")
    if re.search(r"\{[^{}]*\{", fields):
        raise LimitError("it computes the width of a formatted field")
    _check_fields(form, fields.count("{"), re.findall(r":[^}]*", fields), (values, named))


def _check_fields(form: str, count: int, widths: list[str], values: Any) -> None:
    if any("*" in width or re.search(rf"\d{{{len(str(MAX_PADDING)) + 1},}}", width) for width in widths):
        raise LimitError(f"it formats a field of more than {MAX_PADDING} characters")
    allow(len(form) + count * (ESCAPED * weight(values) + MAX_PADDING))


def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    old, new, text = text_of(old), text_of(new), text_of(text)
    allow(len(text) + text.count(old) * len(new))


def _check_join(values: Any, glue: Any = "", *_: Any, **__: Any) -> None:
    if isinstance(values, DATA):
        _check_letters(values)
        allow(ESCAPED * weight(values) + len(values) * len(text_of(glue)))


def _check_width(text: Any, width: Any = 80, *_: Any, **__: Any) -> None:
    allow(width if isinstance(width, int) else 0)


def _check_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    text = text_of(text)
    allow(len(text) + (1 + _lines(text)) * (len(width) if isinstance(width, str) else int(width)))


def _check_round(value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
    if abs(precision) > MAX_PADDING:
        raise LimitError(f"it rounds to more than {MAX_PADDING} digits")


def _check_sum(values: Any, attribute: Any = None, start: Any = 0, *_: Any, **__: Any) -> None:
    if not isinstance(start, int | float):
        raise LimitError("it adds up values that are not numbers")


def _check_split(text: Any, separator: Any = None, *_: Any, **__: Any) -> None:
    if isinstance(text, str):
        allow(len(text) + ELEMENT * (text.count(separator) if isinstance(separator, str) else len(text) // 2))


def _check_search(text: Any, what: Any = None, *_: Any, **__: Any) -> None:
    if isinstance(text, str) and isinstance(what, str) and len(text) * len(what) > MAX_STEPS:
        raise LimitError(f"it would take more than {MAX_STEPS:,} comparisons of characters")


def _check_rsplit(text: Any, separator: Any = None, *_: Any, **__: Any) -> None:
    _check_search(text, separator)
    _check_split(text, separator)


def _check_lines(text: Any, *_: Any, **__: Any) -> None:
    allow(len(text) + ELEMENT * _lines(text))


def _check_letters(value: Any, *_: Any, **__: Any) -> None:
    check_value(ELEMENT * len(value) if isinstance(value, str) else 0)


def _check_text(value: Any, *_: Any, **__: Any) -> None:
    allow(ESCAPED * weight(value))


def _check_json(value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, **_: Any) -> None:
    size, depth = weight(value), depth_of(value)
    if depth > MAX_DEPTH:
        raise LimitError(f"it writes JSON of more than {MAX_DEPTH} levels")
    spaces = len(indent) if isinstance(indent, str) else int(indent or 0)
    between = depth * spaces + sum(map(len, separators or ()))
    allow(ESCAPED * size + (1 + size // ELEMENT) * between)


def _lines(text: str) -> int:
    return sum(map(text.count, LINE_ENDS))


FILTER_CHECKS: Mapping[str, Callable[..., None]] = dict.fromkeys(
    "groupby list map max min reject rejectattr select selectattr sort title unique wordcount".split(), _check_letters
) | {
    "center": _check_width, "e": _check_text, "escape": _check_text, "forceescape": _check_text,
    "format": _check_percent, "indent": _check_indent, "join": _check_join, "replace": _check_replace,
    "round": _check_round, "string": _check_text, "sum": _check_sum, "tojson": _check_json, "trim": _check_search,
    "urlencode": _check_text,
}  # fmt: skip
_METHOD_CHECKS: Mapping[str, Callable[..., None]] = dict.fromkeys(
    "lstrip rfind rindex rpartition rstrip strip".split(), _check_search
) | {
    "center": _check_width, "format": _check_braces, "format_map": _check_braces, "ljust": _check_width,
    "replace": _check_replace, "rjust": _check_width, "rsplit": _check_rsplit, "split": _check_split,
    "splitlines": _check_lines, "title": _check_letters, "zfill": _check_width,
}  # fmt: skip


def check_method(owner: Any, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether templates may call this method of a text, list or dict; LimitError if it would make too much."""
    kind = next((kind for kind in METHODS if isinstance(owner, kind)), None)
    if kind is None or name not in METHODS[kind]:
        return False
    if kind is str and name == "join":
        _check_join(*args, owner)
    elif kind is str and name in _METHOD_CHECKS:
        _METHOD_CHECKS[name](owner, *args, **named)
    return True


def listed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with iterators replaced by lists, so that their lengths are known beforehand."""
    return tuple(list(arg) if isinstance(arg, Iterator | range) else arg for arg in args)


def metered(function: Callable[..., Any], check: Callable[..., None] | None = None) -> Callable[..., Any]:
    """A filter or test of Jinja whose result is checked before and counted after; its arguments are those of Jinja."""
    value = 1 if hasattr(function, "jinja_pass_arg") else 0  # position of the filtered value among the arguments

    @functools.wraps(function)  # which copies jinja_pass_arg
    def run(*args: Any, **named: Any) -> Any:
        allow(0)
        if check is not None:
            args = listed(args)
            check(*args[value:], **named)
        return made(function(*args, **named))

    return run
