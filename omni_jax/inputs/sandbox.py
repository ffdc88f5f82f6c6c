"""The Jinja environment in which chat templates run: the settings they are written for, and the limits of `limits`.

    source -> lexer: is it small and flat? -> Jinja's parser -> counting calls inserted -> Jinja's compiler -> template

Jinja's sandbox keeps a template away from files and from Python. It has hooks for operators, calls and attributes, but
none for loops, literals, `~`, comparisons, slices and output, so calls that count these are inserted into the parsed
template. Filters and methods whose cost cannot be known beforehand, and that no prompt needs, are left out.

Source: HF `_compile_jinja_template` (the same sandbox, settings, filters and functions). Deliberate differences: the
limits, and what is left out.
"""

import json
import re
from datetime import datetime
from functools import lru_cache
from typing import Any, ClassVar

from omni_jax.inputs.limits import LimitError, joined, made, nested, spend, text_of
from omni_jax.inputs.operations import FILTER_CHECKS, check_method, check_operator, listed, metered

MAX_SOURCE = 100_000  # characters of a template; the longest known have a quarter of this
MAX_BLOCKS = 50  # depth of nested `if`, `for`, `macro` and similar blocks
MAX_TOKENS = 1000  # words and signs of one tag, which bound the depth of an expression
LEFT_OUT = ("batch", "pprint", "random", "slice", "striptags", "urlize", "wordwrap", "xmlattr")
_OPENS = frozenset("autoescape block call filter for generation if macro with".split())


def compile_template(source: str) -> Any:
    """The Jinja template of a source; if it cannot be compiled, LimitError, or any error of Jinja and Python."""
    environment = _environment()
    _check_source(environment, source)
    tree = _counting()().visit(environment.parse(source))
    tree.set_environment(environment)
    return environment.template_class.from_code(environment, environment.compile(tree), environment.make_globals(None))


def _check_source(environment: Any, source: str) -> None:
    """Raise LimitError unless a template is so small and flat that no parser or compiler can run out of stack."""
    if len(source) > MAX_SOURCE:
        raise LimitError(f"it has {len(source):,} characters, more than {MAX_SOURCE:,}")
    depth, tag = 0, []
    for line, kind, word in environment.lex(source):
        if kind.endswith("_begin"):
            tag = []
        elif kind == "block_end" and tag:
            opens = tag[0] in _OPENS or (tag[0] == "set" and "=" not in tag)
            depth += 1 if opens else -1 if tag[0].startswith("end") else 0
        elif kind != "whitespace":
            tag.append(word)
        if len(tag) > MAX_TOKENS:
            raise LimitError(f"its tag at line {line} has more than {MAX_TOKENS:,} words and signs")
        if depth > MAX_BLOCKS:
            raise LimitError(f"it nests more than {MAX_BLOCKS} blocks at line {line}")


@lru_cache(maxsize=1)
def _counting() -> Any:
    """The class that inserts calls of `made` and `joined` into a parsed template, where Jinja has no hook."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def call(name: str, args: list[Any]) -> Any:
        return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None, lineno=args[0].lineno)

    class Counting(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            node = self.generic_visit(node)
            # Output, even of nothing, is counted.
            node.body.insert(0, nodes.Output([nodes.Const("", lineno=node.lineno)], lineno=node.lineno))
            return node

        def visit_TemplateData(self, node: Any) -> Any:
            return nodes.Const(node.data, lineno=node.lineno)  # counted as other output is

        def visit_Concat(self, node: Any) -> Any:
            return call("joined", list(self.generic_visit(node).iter_child_nodes()))

        def visit_Tuple(self, node: Any) -> Any:
            node = self.generic_visit(node)
            return call("made", [node]) if node.ctx == "load" else node

        def visit_Getitem(self, node: Any) -> Any:
            node = self.generic_visit(node)
            return call("made", [node]) if isinstance(node.arg, nodes.Slice) else node

        def visit_Value(self, node: Any) -> Any:
            return call("made", [self.generic_visit(node)])

        visit_List = visit_Dict = visit_Compare = visit_Value

    return Counting


@lru_cache(maxsize=1)
def _sandbox() -> Any:
    """The class of the environment: Jinja's sandbox with the checks of `limits` at operators and calls."""
    from jinja2.exceptions import SecurityError
    from jinja2.runtime import BlockReference, LoopContext, Macro, Undefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Cycler, Joiner

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
        made, joined = staticmethod(made), staticmethod(joined)  # for the calls that are inserted into templates

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_operator(operator, left, right)
            return made(super().call_binop(context, operator, left, right))

        def call(self, context: Any, called: Any, /, *args: Any, **named: Any) -> Any:
            if called is made or called is joined:
                return called(*args)
            inner = getattr(called, "__wrapped__", called)  # Jinja wraps str.format
            owner = getattr(inner, "__self__", None)
            args = listed(args) if isinstance(owner, str) else args
            if not (
                isinstance(called, Macro | BlockReference | LoopContext | Joiner | Undefined)
                or isinstance(owner, LoopContext | Cycler)
                or any(called is function for function in self.globals.values())
                or check_method(
                    owner, getattr(inner, "__name__", ""), args, {k: v for k, v in named.items() if k[0] != "_"}
                )
            ):
                raise SecurityError(f"{getattr(inner, '__qualname__', 'this')} is not for templates")
            return made(nested(super().call, context, called, *args, **named))

    return Sandbox


@lru_cache(maxsize=1)
def _environment() -> Any:
    """The sandbox with the settings, filters and functions that templates are written for."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks an assistant's words for training; here it has no effect."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Opaque(Namespace):
        """A namespace whose text omits its contents, because it may contain itself."""

        def __repr__(self) -> str:
            return "<Namespace>"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    @jinja2.pass_context
    def written(_: Any, value: Any) -> str:
        text = text_of(value)
        spend(len(text))  # counts as part of the macro, block or prompt that it is written to
        return text

    # Unoptimised: constants would be computed while compiling, where nothing is counted.
    environment = _sandbox()(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=written, optimized=False
    )
    filters = environment.filters | {"tojson": to_json}
    environment.filters = {
        name: metered(function, FILTER_CHECKS.get(name)) for name, function in filters.items() if name not in LEFT_OUT
    }
    environment.tests = {name: metered(function) for name, function in environment.tests.items()}
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _now, "namespace": Opaque}
    return environment


def _now(form: str) -> str:
    """The current time by a pattern of `strftime`, bounded because its fields can be padded."""
    if len(form) > MAX_TOKENS:
        raise LimitError("it writes the time by an overlong pattern")
    return datetime.now().strftime(form)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes. Private-use characters, which may hide a literal, are never escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return re.sub(r"[^\x00-\x7f\ue000-\uf8ff]", lambda c: json.dumps(c[0])[1:-1], text) if ensure_ascii else text
