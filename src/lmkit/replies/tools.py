"""Tools: their definitions for a chat template, what is wrong with a call of them, and calls that are run."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, get_type_hints

from lmkit.errors import OptionError, listed, nearest, shown

if TYPE_CHECKING:
    from lmkit.results import Completion, Generation, ToolCall

Tool: TypeAlias = Callable[..., Any] | Mapping[str, Any]
"""A function with annotations and a Google docstring, or a definition in JSON as chat templates take it."""

_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
    "object": (dict,), "null": (type(None),),
}  # fmt: skip


def definition(tool: Tool) -> Mapping[str, Any]:
    """Describe a tool for a chat template.

    Raises:
        OptionError: It is a function without annotations or docstring, or a definition without a name.
    """
    if callable(tool):
        return _described(tool)[0]
    given: object = tool
    inner = tool.get("function", tool) if isinstance(given, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise OptionError(
            f"tools= has {shown(tool)}, which has no name: pass a function, or a definition such as "
            "{'type': 'function', 'function': {'name': …, 'description': …, 'parameters': {…}}}."
        )
    return tool


def schemas(definitions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the schemas of tools' arguments by name."""
    inner = [one.get("function", one) for one in definitions]
    return {one["name"]: one.get("parameters") for one in inner}


def _described(function: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Describe a function, and say whether JSON alone makes its arguments: not if pydantic has to."""
    from transformers import utils

    documented: Any = utils  # it is there, but not typed as being there
    try:
        try:
            return documented.get_json_schema(function), True
        except documented.TypeHintParsingException:
            return _by_pydantic(function, documented.get_json_schema), False
    except Exception as error:
        name = getattr(function, "__name__", repr(function))
        raise OptionError(
            f"the tool {name} cannot be described: {str(error)[:300].rstrip('.!')}. Annotate every argument, and "
            "describe each under 'Args:' in the docstring, as Google does; or pass a definition in JSON."
        ) from error


def _by_pydantic(function: Callable[..., Any], describe: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Describe a function whose arguments are of types that only pydantic knows."""
    from pydantic import TypeAdapter

    hints = {name: hint for name, hint in get_type_hints(function, include_extras=True).items() if name != "return"}

    @functools.wraps(function)
    def plain() -> None: ...

    plain.__annotations__ = dict.fromkeys(hints, str)
    described = describe(plain)
    parameters = described["function"]["parameters"]
    shared: dict[str, Any] = {}
    for name, hint in hints.items():
        schema = TypeAdapter(hint).json_schema()
        shared |= schema.pop("$defs", {})
        parameters["properties"][name] = {"description": parameters["properties"][name]["description"]} | schema
    return described | {
        "function": described["function"] | {"parameters": parameters | ({"$defs": shared} if shared else {})}
    }


def checked(
    name: str, arguments: Any, tools: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any] | None, str | None]:
    """Return a call's name, its arguments, texts among them cast to their types, and what is wrong with it."""
    if not isinstance(arguments, dict):
        return name, None, f"its arguments are {json.dumps(arguments)[:100]}, not an object"
    if tools is None or tools.get(name, "") is None:
        return name, arguments, None
    if name not in tools:
        return name, arguments, f"there is no tool {name!r}.{nearest(name, tools)} There are: {listed(tools)}."
    schema = tools[name]
    properties = schema.get("properties", {})
    arguments = {key: cast(value, properties.get(key), schema) for key, value in arguments.items()}
    return name, arguments, misfit(arguments, {"type": "object", **schema}, schema, "the call")


def cast(text: Any, schema: Any, root: Mapping[str, Any]) -> Any:
    """Turn a text into what a schema asks for, if it is that; a schema that takes texts takes it as it is."""
    if not isinstance(text, str) or misfit(text, schema, root, "") is None:
        return text
    plain = text.strip()
    try:
        value = json.loads(plain.lower() if plain in ("True", "False") else "null" if plain == "None" else plain)
    except (ValueError, RecursionError):
        return text
    return text if misfit(value, schema, root, "") else value


def misfit(value: Any, schema: Any, root: Mapping[str, Any], where: str) -> str | None:
    """Say what a value lacks to be what a schema says, as far as names, types and choices go; None if nothing."""
    if isinstance(schema, Mapping) and "$ref" in schema:
        schema = root.get("$defs", {}).get(schema["$ref"].rpartition("/")[2])
    if not isinstance(schema, Mapping) or (value is None and schema.get("nullable")):
        return None
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        fits = any(misfit(value, one, root, where) is None for one in choices)
        return None if fits else f"{where} is {value!r}, which fits none of its types"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is {value!r}, not one of {listed(map(str, schema['enum']))}"
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_is(value, one) for one in types):
        return f"{where} is {value!r}, not of type {' or '.join(types)}"
    return next(filter(None, _inside(value, schema, root, where)), None)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    whole = kind == "integer" and isinstance(value, float) and math.isfinite(value) and value.is_integer()
    return whole or isinstance(value, _TYPES.get(kind, (object,)))


def _inside(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> Iterable[str | None]:
    if isinstance(value, list) and "items" in schema:
        yield from (misfit(one, schema["items"], root, f"{where}[{n}]") for n, one in enumerate(value))
    properties = schema.get("properties")
    if not isinstance(value, dict) or properties is None:
        return
    yield from (f"{where} lacks {name!r}" for name in schema.get("required", ()) if name not in value)
    for name, one in value.items():
        if name in properties:
            yield misfit(one, properties[name], root, repr(name))
        elif not schema.get("additionalProperties"):
            yield f"{where} has {name!r}, which is none of {listed(properties) or 'nothing'}"


def call_tools(
    result: Completion | Generation, functions: Iterable[Callable[..., Any]] | Mapping[str, Callable[..., Any]]
) -> list[dict[str, Any]]:
    """Run the calls of tools that a model has written, in order, and return the messages to append to the chat.

    What a model writes is not to be trusted: pass functions that may be called with any arguments of their types. A
    call with an error, or of a function that is not there, is answered by a message that says so, and runs nothing;
    what a function raises is told to the model in the same way.

    ```python
    answer = generator.chat(messages, tools=[weather])
    messages += [answer.message, *lmkit.call_tools(answer, [weather])]
    ```

    Args:
        result: What has the calls: of a result with several completions, its first one's are run.
        functions: What may be called: functions, or functions by the name that the model calls them.

    Returns:
        One message of the role `"tool"` for each call: a text as it is, other values as JSON.

    Raises:
        OptionError: A function is asynchronous, or cannot be described.
    """
    pairs = functions.items() if isinstance(functions, Mapping) else [(one.__name__, one) for one in functions]
    named = {str(name): one for name, one in pairs}
    for name, one in named.items():
        if inspect.iscoroutinefunction(one):
            raise OptionError(f"{name} is asynchronous, and call_tools waits for nothing: pass a plain function.")
    return [
        {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": _answer(call, named)}
        for call in result.tool_calls
    ]


def _answer(call: ToolCall, functions: Mapping[str, Callable[..., Any]]) -> str:
    if call.error is not None or call.arguments is None:
        return f"Error: {call.error or 'the call has no arguments'}"
    if call.name not in functions:
        return f"Error: there is no tool {call.name!r}. There are: {listed(functions)}."
    function = functions[call.name]
    if not _plain(function):
        from pydantic import validate_call

        function = validate_call(function)
    try:
        value = function(**call.arguments)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_shown)
    except Exception as error:  # noqa: BLE001 - the model is told, and may do better
        return f"Error: {type(error).__name__}: {error}"


def _plain(function: Callable[..., Any]) -> bool:
    """Say whether a function takes values as JSON has them; one that cannot be described is called as it is."""
    try:
        return _described(function)[1]
    except OptionError:
        return True


def _shown(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) else list(value) if isinstance(value, (set, Sequence)) else str(value)
