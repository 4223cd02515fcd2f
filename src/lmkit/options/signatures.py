"""What a call's `**options` are, said at run time too: for completion, `help` and notebooks."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from lmkit.options.option import declared

CallableT = TypeVar("CallableT", bound=Callable[..., Any])

_UNPACKED = re.compile(r"Unpack\[(\w+)\]")
_MODULES = re.compile(r"\b(typing|collections\.abc|lmkit(\.\w+)+)\.(?=\w)")


def spelled_out(told: CallableT) -> CallableT:
    """Give a function, or each verb of a class, a signature with every option, and list them in its docstring.

    They are read from the `TypedDict` that its `**options` unpack. What type checkers see stays as it is written.
    """
    given: Any = told
    verbs: list[Any] = [one for one in (given, *vars(given).values()) if inspect.isfunction(one)]
    for verb in verbs:
        signature = inspect.signature(verb)
        own = dict(signature.parameters)
        rest = own.popitem()[1] if own else None
        if rest is not None and rest.kind is rest.VAR_KEYWORD and (named := _UNPACKED.fullmatch(str(rest.annotation))):
            options: type = inspect.unwrap(verb).__globals__[named[1]]
            more = [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
                for name, kind in _types(options).items()
                if name not in own
            ]
            verb.__signature__ = signature.replace(parameters=[*own.values(), *more])
            verb.__doc__ = f"{inspect.getdoc(verb)}\n\nOptions:\n{textwrap.indent(_listed(options), '    ')}"
    return told


def _types(options: type) -> Mapping[str, str]:
    if _is_postponed(options):
        return {name: hint.__forward_arg__ for name, hint in options.__annotations__.items()}
    hints = get_type_hints(options)
    return {name: _MODULES.sub("", inspect.formatannotation(hints[name])) for name in options.__annotations__}


def _listed(options: type) -> str:
    if _is_postponed(options):  # its docstring says what each is
        return textwrap.dedent((inspect.getdoc(options) or "").partition("Attributes:\n")[2])
    lines = [
        f"{name}: {one.meaning}. Takes {one.accepts}.{f' Default: {one.default}.' if one.default else ''}"
        for name, one in declared(options).items()
    ]
    return "\n".join(textwrap.fill(line, 110, subsequent_indent="    ") for line in lines)


def _is_postponed(options: type) -> bool:
    return any(hasattr(hint, "__forward_arg__") for hint in options.__annotations__.values())
