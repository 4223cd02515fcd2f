"""What stands between the markers of a call to names and arguments; a `ValueError` says what is wrong with it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from lmkit._quiet import without_warnings

Reader: TypeAlias = Callable[[str, Mapping[str, str]], list[tuple[str, Any]]]
"""Reads a text, with what the pattern of its opening marker captured, as pairs of a name and arguments."""

_WORDS = {"true": True, "false": False, "null": None}
_SUFFIX = ".call"
LONGEST = 100_000
"""How many characters of Python are looked at: its parser is not made for hostile ones."""


def named(call: Any) -> tuple[str, Any]:
    """Return name and arguments of a call that is an object of JSON, in any of the ways in which it is written."""
    call = call["function"] if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
    name = (call.get("name") or call.get("function")) if isinstance(call, dict) else None
    if not isinstance(name, str):
        raise ValueError("it has no name")  # noqa: TRY004 - of what the model wrote, not of a type
    arguments = call.get("arguments", call.get("parameters", {}))
    return name, json.loads(arguments) if isinstance(arguments, str) else arguments


def as_json(text: str, _: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Read `{"name": …, "arguments": …}`, several behind one another, or a list of them."""
    decoder, calls, text = json.JSONDecoder(), list[Any](), text.strip()
    while text:
        call, end = decoder.raw_decode(text)
        calls += call if isinstance(call, list) else [call]
        text = text[end:].lstrip(" \t\r\n;,")
    if not calls:
        raise ValueError("it is empty")
    return [named(call) for call in calls]


def behind_name(text: str, _: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Read a name, something between, and arguments as JSON, such as `f[ARGS]{…}`."""
    # Nothing is given back: a long text without arguments would be tried at every length of its name.
    found = re.fullmatch(
        r"\s*(?:function<｜tool▁sep｜>|functions\.)?([\w.:/-]++)([^{]*+)(\{.*\})[\s`]*", text, re.DOTALL
    )
    if not found:
        raise ValueError("it is no name with arguments")
    return [(found[1], json.loads(found[3]))]


def tagged(whole: str, pair: str) -> Reader:
    """Make a reader of tags: `whole` finds the name and what is inside, `pair` each argument in it."""

    def read(text: str, _: Mapping[str, str]) -> list[tuple[str, Any]]:
        found = re.fullmatch(whole, text, re.DOTALL)
        if not found or re.sub(pair, "", found[2], flags=re.DOTALL).strip():
            raise ValueError("its tags are not whole")
        return [(found[1].strip(), dict(re.findall(pair, found[2], re.DOTALL)))]

    return read


as_xml = tagged(
    r"\s*<function=([^>\n]+)>(.*)</function>\s*", r"<parameter=([^<>\n]+)>\n?((?:(?!<parameter=).)*?)\n?</parameter>"
)
as_pairs = tagged(
    r"\s*([^\n<]+)(.*)", r"<arg_key>((?:(?!<arg_key>).)*?)</arg_key>\s*<arg_value>((?:(?!<arg_key>).)*?)</arg_value>"
)


def unquoted(text: str, _: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Read `f{key:<|"|>text<|"|>,other:3}`, as Gemma writes."""
    found = re.fullmatch(r"\s*([\w.-]+)\s*(\{.*\})\s*", text, re.DOTALL)
    if not found:
        raise ValueError("it is no name with arguments")
    parts = re.split(r'<\|"\|>|<escape>', found[2])
    keyed = [re.sub(r"([{,]\s*)([\w.-]+)\s*:", r'\1"\2":', part) for part in parts[::2]]
    strings = [*map(json.dumps, parts[1::2]), ""]
    if len(keyed) != len(strings):
        raise ValueError("a text in it does not end")
    return [(found[1], json.loads("".join(a + b for a, b in zip(keyed, strings, strict=True))))]


class _Words(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node


def as_python(text: str, _: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Read `[f(a='x', n=3), g()]`, or one call alone; nothing of it is run."""
    if len(text) > LONGEST:
        raise ValueError("it is too long")
    body = without_warnings(lambda: ast.parse(text.strip(), mode="eval")).body
    calls = []
    for call in body.elts if isinstance(body, (ast.List, ast.Tuple)) else [body]:
        if not isinstance(call, ast.Call) or call.args or not all(one.arg for one in call.keywords):
            raise ValueError("it is no call with names of arguments")
        try:
            values = {str(one.arg): ast.literal_eval(_Words().visit(one.value)) for one in call.keywords}
        except ValueError as error:
            raise ValueError("a value in it is no plain one") from error
        calls.append((ast.unparse(call.func).removesuffix(_SUFFIX), values))
    return calls
