"""Runs chat templates in bounds.

A template is a program of the checkpoint's author's. It runs in transformers' own sandbox, with a meter that is asked
at each turn of a loop, each call, filter and test, and for the size of all that they make. What makes much of little
in one step, such as `'a' * 10**9`, is measured before.
"""

from __future__ import annotations

import re
import types
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Final

import jinja2
from jinja2 import nodes, sandbox
from jinja2.utils import _PassArg
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from lmkit.errors import OptionError, VersionError
from lmkit.text.meter import GROWTHS, LAZY, MOST_BITS, Meter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

LONGEST_SOURCE: Final = 100_000
"""How many characters a template itself may have; to compile as many can take some seconds."""
_TERMS = 8  # of a sum that is measured as a whole

_meter: ContextVar[Meter] = ContextVar("meter")


class _Formatter(sandbox.SandboxedFormatter):
    """Formats as the sandbox does, and counts what it makes."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{5}", format_spec):
            raise _meter.get().too_much()
        return _meter.get().checked(super().format_field(value, format_spec))


class _EscapeFormatter(_Formatter, sandbox.SandboxedEscapeFormatter):
    """The same for texts that are marked as HTML."""


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """A sandbox whose meter is the one of the run."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002 - as jinja2 calls it
        meter, numbers = _meter.get(), isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and abs(left) > 1:
            meter.at_most(left.bit_length() * right, MOST_BITS)
        elif operator == "*" and not numbers:
            meter.at_most(_times(meter, left, right) or _times(meter, right, left))
        elif operator == "%" and isinstance(left, (str, bytes)):
            meter.before(operator, left, right if isinstance(right, tuple) else [right], {})
        return meter.checked(self.binop_table[operator](left, right))

    def call(self, context: Any, called: Any, /, *args: Any, **named: Any) -> Any:
        meter = _meter.get()
        meter.tick()
        name = str(getattr(called, "__name__", ""))
        if name in GROWTHS:
            args = tuple(list(one) if isinstance(one, LAZY) else one for one in args)
            own = {key: value for key, value in named.items() if not key.startswith("_")}
            meter.before(name, getattr(called, "__self__", None), args, own)
        return meter.checked(super().call(context, called, *args, **named))

    def wrap_str_format(self, value: Any) -> Any:
        found = super().wrap_str_format(value)
        if found is None:
            return None

        def write(*args: Any, **named: Any) -> Any:
            if value.__name__ == "format_map":
                args, named = (), *args
            text = value.__self__
            escaping = isinstance(text, Markup)
            formatter = _EscapeFormatter(self, escape=text.escape) if escaping else _Formatter(self)
            return str.__new__(type(text), formatter.vformat(text, args, named))

        return write

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        meter, total, found = _meter.get(), 0, []
        for part in parts:
            total += len(part)
            meter.at_most(total)
            found.append(part)
        meter.spend(total)
        return "".join(found)


def _times(meter: Meter, value: Any, number: Any) -> int:
    return meter.weigh(value) * number if isinstance(number, int) else 0


def _measured(name: str, function: Any) -> Any:
    """Return a filter or test that is measured before and behind."""
    wants, grows = _PassArg.from_obj(function), name in GROWTHS

    @jinja2.pass_context
    def measured(context: Any, value: Any, /, *args: Any, **named: Any) -> Any:
        meter = _meter.get()
        meter.tick()
        if grows:
            value = list(value) if isinstance(value, LAZY) else value
            meter.before(name, value, args, named)
        first = context if wants is _PassArg.context else getattr(context, _GIVEN[wants])
        return meter.checked(function(first, value, *args, **named))

    @jinja2.pass_context
    def simple(_: Any, value: Any, /, *args: Any, **named: Any) -> Any:
        meter = _meter.get()
        meter.tick()
        return meter.checked(function(value, *args, **named))

    if wants is None and grows:
        function = _led(function)
    return measured if grows or wants is not None else simple


_GIVEN = {_PassArg.eval_context: "eval_ctx", _PassArg.environment: "environment", None: "environment"}


def _led(function: Any) -> Any:
    return lambda _, *args, **named: function(*args, **named)


@jinja2.pass_context
def _written(_: Any, value: Any) -> Any:
    """Count what is about to be written."""
    meter = _meter.get()
    meter.spend(len(value) if isinstance(value, str) else meter.weigh(value))
    return value


@jinja2.pass_context
def _shown(_: Any, value: Any) -> Any:
    """Count what is printed, but for texts: these are counted where they are made, and put together."""
    return value if isinstance(value, str) else _written(_, value)


@jinja2.pass_context
def _made(_: Any, value: Any) -> Any:
    return _meter.get().checked(value)


@jinja2.pass_context
def _cut(_: Any, value: Any) -> Any:
    """Count a part of a value, which is no larger."""
    _meter.get().spend(len(value))
    return value


@jinja2.pass_context
def _turn(_: Any, pieces: int) -> None:
    """Count a turn of a loop, or a call of a macro, that writes so many pieces of text."""
    _meter.get().spend(8 * pieces)


_QUICK = frozenset(
    "boolean callable defined even false float integer iterable mapping none number odd sequence string true "
    "undefined".split()
)
"""Tests that take no time."""
_ASKING = {" written": _written, " made": _made, " cut": _cut, " turn": _turn}
"""What asks the meter inside of a template, as filters that no template can name."""


class _Metered(NodeTransformer):
    """Puts the meter where no method of an environment is asked: turns of loops, lists, `~` and slices."""

    def _turning(self, node: Any) -> Any:
        self.generic_visit(node)
        pieces = nodes.Const(sum(1 for part in node.body for _ in (part, *part.find_all(nodes.Output))))
        node.body.insert(0, nodes.ExprStmt(_asking(pieces, " turn"), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _turning  # noqa: N815 - as jinja2 names them

    def _making(self, node: Any) -> Any:
        self.generic_visit(node)
        try:
            node.as_const()
        except nodes.Impossible:
            return node if getattr(node, "ctx", "load") == "store" else _asking(node, " made")
        return node

    visit_List = visit_Tuple = visit_Dict = _making  # noqa: N815

    def visit_Add(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        inner = node.left.node if isinstance(node.left, nodes.Filter) and node.left.name == " made" else None
        if isinstance(inner, nodes.Add) and len(list(inner.find_all(nodes.Add))) < _TERMS:
            node.left = inner
        return _asking(node, " made")

    def visit_Concat(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_asking(one, " written") for one in node.nodes]
        return _asking(node, " made")

    def visit_Getitem(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        return _asking(node, " cut") if isinstance(node.arg, nodes.Slice) else node


def _asking(node: Any, name: str) -> Any:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _counting(namespace: Any) -> Any:
    """Return a class of namespaces, which alone can hold one another, that count how often they are printed."""

    def printed(self: Any) -> str:
        _meter.get().spend(64)
        return str(_meter.get().checked(namespace.__repr__(self)))

    return type(namespace.__name__, (namespace,), {"__repr__": printed})


@cache
def _sandbox() -> Any:
    """Return transformers' environment of chat templates, with the meter in it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    own = _compile_jinja_template("").environment
    kinds = [type(one) for one in own.extensions.values()]
    environment = _Sandbox(
        trim_blocks=own.trim_blocks, lstrip_blocks=own.lstrip_blocks, extensions=kinds, finalize=_shown
    )
    environment.globals |= {**own.globals, "namespace": _counting(own.globals["namespace"])}
    environment.filters = {name: _measured(name, one) for name, one in own.filters.items()} | _ASKING
    environment.tests = {name: one if name in _QUICK else _measured(name, one) for name, one in own.tests.items()}
    return environment


def syntax(source: str) -> nodes.Template:
    """Read a template as its syntax tree.

    Raises:
        jinja2.TemplateError: It is none.
        OptionError: It is too long.
    """
    if len(source) > LONGEST_SOURCE:
        raise OptionError(
            f"the checkpoint's chat template has {len(source)} characters, lmkit reads {LONGEST_SOURCE} at the most: "
            "pass another one with template={'chat_template': …}."
        )
    tree: nodes.Template = _sandbox().parse(source)
    return tree


@lru_cache(maxsize=64)
def _compiled(source: str) -> Any:
    tree = _Metered().visit(syntax(source))
    tree.set_environment(_sandbox())
    return _sandbox().from_string(tree)


def _started(source: str) -> Any:
    compiled = _compiled(source)
    _meter.get().start()
    return compiled


def _copied(function: Any, **named: Any) -> Any:
    """Return a function of transformers that finds something else under a name of its module."""
    if not named.keys() <= set(function.__code__.co_names):
        raise VersionError(
            f"the installed transformers renders chat templates in another way, without {', '.join(named)}, so that "
            "lmkit cannot bound what they do: install a version that lmkit was tested with."
        )
    names = {**function.__globals__, **named}
    copied = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


@cache
def _apply() -> Any:
    """Return transformers' `apply_chat_template`, but that templates run with the meter."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    render = _copied(render_jinja_template, _compile_jinja_template=_started)
    return _copied(PreTrainedTokenizerBase.apply_chat_template, render_jinja_template=render)


def written(tokenizer: Any, messages: Sequence[Mapping[str, Any]], meter: Meter, **template: Any) -> str:
    """Return a chat as the checkpoint's template writes it: the text of `apply_chat_template`.

    A tokenizer that writes chats with code of its own and no template, as Mistral's do, writes them.

    Raises:
        OptionError: The template wants more than `meter` has left.
        Exception: What else the template raises.
    """
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **template))
    token = _meter.set(meter)
    try:
        return str(_apply()(tokenizer, messages, tokenize=False, **template))
    finally:
        meter.stop()
        _meter.reset(token)
