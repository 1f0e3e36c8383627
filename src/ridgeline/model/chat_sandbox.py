"""Jinja for chat templates from strangers: no way out, and no way to take all time or memory.

A template is a program that came with the weights. It runs in jinja2's immutable sandbox, and whatever can
make much from little is charged to a budget before it does: turns of loops, calls, operators, filters. The
template is rewritten before it is compiled so that loops and `~` are seen too, and so that what it looks for
in texts is masked as they are.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE_CHARACTERS = 1 << 20
MAX_OUTPUT_CHARACTERS = 10_000_000
_MAX_CHARGE = 10 * MAX_OUTPUT_CHARACTERS
_MAX_TIME_S = 10.0
_MAX_WIDTH = 10_000
_MAX_INTEGER_BITS = 1 << 16
_STEP = 64  # the least charge, so that a budget is about a million steps
_CALL = 512  # of a call, which takes longer


class TemplateLimitError(TemplateError):
    """The template does more than any chat needs."""


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self._left = _MAX_CHARGE
        self._deadline_s = time.monotonic() + _MAX_TIME_S

    def charge(self, amount: int) -> None:
        self._left -= amount + _STEP
        if self._left < 0:
            raise TemplateLimitError(f"it makes more than {_MAX_CHARGE} characters")
        if time.monotonic() > self._deadline_s:
            raise TemplateLimitError(f"it runs for more than {_MAX_TIME_S:g} s")

    def charge_text(self, values: Iterable[object]) -> int:
        """Charge for the texts of these values and of all that they hold; returns how many characters."""
        pending, total = list(values), 0
        while pending:
            value = pending.pop()
            amount = 0
            if isinstance(value, str):
                amount = len(value)
            elif isinstance(value, dict):
                pending += [*value.keys(), *value.values()]
            elif isinstance(value, list | tuple | set | frozenset):
                pending += value
            elif isinstance(value, int):
                amount = value.bit_length()
            self.charge(amount)
            total += amount + _STEP
        return total


current_budget: ContextVar[Budget] = ContextVar("current_budget")
current_masks: ContextVar[Mapping[str, str]] = ContextVar("current_masks")
"""What stands for some texts in everything that this rendering was given."""


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """What chat templates expect of their environment, within a budget (`current_budget` must be set)."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], finalize=_finalize
        )
        del self.globals["lipsum"]
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.filters["tojson"] = _tojson
        kept = {name: function for name, function in self.filters.items() if name not in _REFUSED}
        self.filters = {name: _charged(name, function) for name, function in kept.items()}
        self.filters[_CHARGE] = _charge_turn
        self.filters[_CONCATENATE] = _concatenate
        self.filters[_MASK] = _masked

    def compiled(self, source: str) -> Template:
        """The template, charged. Raises jinja2's TemplateError for what is not a template."""
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise TemplateLimitError(f"it has {len(source)} characters; accepted: {MAX_SOURCE_CHARACTERS}")
        tree = _Rewriting().visit(self.parse(source))
        return self.from_string(tree.set_environment(self))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        current_budget.get().charge(_operator_growth(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        # The sandbox wraps `format`; the string that it belongs to is that of the wrapped method.
        method = getattr(function, "__wrapped__", function)
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            if method.__name__ == "join":
                args = tuple(list(arg) for arg in args)
            named = [value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")]
            _charge_text_function(method.__name__, text, [*args, *named])
        result = super().call(context, function, *args, **kwargs)
        current_budget.get().charge(_CALL + (len(result) if isinstance(result, Sized) else 0))
        return result


class _Generation(Extension):
    """`{% generation %}` marks for training what a model wrote; here it is its content, in its own scope."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Rewriting(NodeTransformer):
    """Rewrites a template so that each turn of a loop is charged, `~` runs as a filter, and constants that
    are looked for in texts are masked."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        texts = (found.data for found in node.find_all(nodes.TemplateData))
        constants = (found.value for found in node.find_all(nodes.Const) if isinstance(found.value, str))
        size = sum(map(len, texts)) + sum(map(len, constants))
        charge = nodes.Filter(nodes.Const(size), _CHARGE, [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(charge, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, _CONCATENATE, [], [], None, None, lineno=node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802
        self.generic_visit(node)
        if node.ops and node.ops[0].op in ("in", "notin"):
            node.expr = _with_mask(node.expr)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Call:  # noqa: N802
        self.generic_visit(node)
        if node.args and isinstance(node.node, nodes.Getattr) and node.node.attr in _SEARCHES:
            node.args[0] = _with_mask(node.args[0])
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        if node.args and node.name == "replace":
            node.args[0] = _with_mask(node.args[0])
        return node


def _with_mask(node: nodes.Expr) -> nodes.Expr:
    if not isinstance(node, nodes.Const) or not isinstance(node.value, str):
        return node
    return nodes.Filter(node, _MASK, [], [], None, None, lineno=node.lineno)


# ------------------------------------------------------------------------------------------- globals


class _Dict:
    """The function `dict` without the class, whose methods can change what the sandbox keeps immutable."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace that cannot pretend to have Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self` may be an attribute
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it sets the attribute {name!r} of a namespace; accepted: no leading underscore")


def _raise_exception(message: object = "") -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; jinja2's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


# ------------------------------------------------------------------------------------------- charges

_CHARGE, _CONCATENATE, _MASK = "_charge", "_concatenate", "_mask"
# Methods of texts whose first argument is looked for in the text.
_SEARCHES = frozenset(
    {
        "count", "endswith", "find", "index", "partition", "removeprefix", "removesuffix", "replace", "rfind",
        "rindex", "rpartition", "rsplit", "split", "startswith",
    }
)  # fmt: skip
# Filters for web pages that multiply their input; no chat needs them.
_REFUSED = frozenset({"center", "filesizeformat", "pprint", "random", "urlize", "wordwrap", "xmlattr"})
# Filters that pass items on or look at them without making text of them.
_STRUCTURAL = frozenset(
    {
        "abs", "attr", "batch", "count", "d", "default", "dictsort", "first", "float", "groupby", "int",
        "items", "last", "length", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "round",
        "select", "selectattr", "slice", "sort", "sum", "unique",
    }
)  # fmt: skip
_WIDTHS = frozenset({"batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "tojson", "zfill"})
# A width of many digits, a width that is an argument, a field within a field.
_WIDE_FORMAT = re.compile(r"\d{4}|%[^%a-zA-Z]*\*|\{[^}]*\{")


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    current_budget.get().charge_text([value])
    return value


@pass_context
def _charge_turn(context: Context, size: int) -> None:
    current_budget.get().charge(size)


@pass_context
def _concatenate(context: Context, parts: list[Any]) -> str:
    current_budget.get().charge_text(parts)
    return "".join(str(part) for part in parts)


@pass_context
def _masked(context: Context, text: str) -> str:
    for plain, mask in current_masks.get().items():
        text = text.replace(plain, mask)
    return text


def _charged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that charges for what it reads and makes."""
    # How jinja2's decorators say what a filter wants as its first argument.
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @pass_context
    def call(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget, extra = current_budget.get(), [*args, *kwargs.values()]
        if name in _STRUCTURAL:
            budget.charge(len(value) if isinstance(value, Sized) else 0)
            _check_widths(name, extra)
            if name == "sum" and any(isinstance(item, Sized) and not isinstance(item, str) for item in extra):
                raise TemplateLimitError("it sums what are not numbers")
        else:
            if name == "join":
                value = list(value)
            _charge_text_function(name, value, extra)
        leading: dict[str, Any] = {
            "context": context,
            "eval_context": context.eval_ctx,
            "environment": context.environment,
        }
        first = (leading[wanted],) if wanted else ()
        result = function(*first, value, *args, **kwargs)
        budget.charge(len(result) if isinstance(result, Sized) else 0)
        return result

    return call


def _charge_text_function(name: str, value: Any, extra: list[Any]) -> None:
    """Charge a filter or a method of a string for all that its result can be made of."""
    budget = current_budget.get()
    size = budget.charge_text([value])
    extra_size = budget.charge_text(extra)
    _check_widths(name, extra)
    if name in ("join", "replace"):
        # Each item or character can bring one of the arguments into the result.
        longest = max((len(item) for item in [value, *extra] if isinstance(item, str)), default=0)
        count = max((len(item) for item in [value, *extra] if isinstance(item, list)), default=0)
        if name == "replace" and extra:
            count, longest = str(value).count(str(extra[0])), extra_size
        budget.charge(count * longest)
    elif name in ("format", "format_map"):
        budget.charge(_format_growth(str(value), extra_size))
    elif name == "translate":
        raise TemplateLimitError("it calls translate, which chats do not need")
    elif name in _WIDTHS:
        widest = max((item for item in extra if isinstance(item, int)), default=8)
        budget.charge(widest * (_lines(value) if name in ("indent", "expandtabs") else 1))
        if name == "tojson":
            budget.charge(widest * size // _STEP)


def _lines(value: object) -> int:
    text = str(value)
    return text.count("\n") + text.count("\t") + 1


def _check_widths(name: str, extra: list[Any]) -> None:
    if name in _WIDTHS:
        for item in extra:
            if isinstance(item, int) and item > _MAX_WIDTH:
                raise TemplateLimitError(f"it gives {name} a width of {item}; accepted: up to {_MAX_WIDTH}")


def _format_growth(pattern: str, arguments_size: int) -> int:
    if _WIDE_FORMAT.search(pattern):
        raise TemplateLimitError("it formats to a width of four digits or one that is not written out")
    return (pattern.count("{") + pattern.count("%")) * (arguments_size + 1000)


def _operator_growth(operator: str, left: object, right: object) -> int:
    """An upper bound on what an operator makes. TemplateLimitError for integers of absurd size."""
    if operator == "%" and isinstance(left, str):
        return _format_growth(left, current_budget.get().charge_text([right]))
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_INTEGER_BITS:
            raise TemplateLimitError(f"it computes with integers of more than {_MAX_INTEGER_BITS} bits")
        return 0
    sizes = [len(side) for side in (left, right) if isinstance(side, Sized)]
    if operator == "*":
        times = [side for side in (left, right) if isinstance(side, int)]
        return sum(sizes) * max(0, *times, 0)
    return sum(sizes)
