"""How a checkpoint writes calls and reasoning: by its own response template, else by what its chat template has."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from lmkit.errors import OptionError
from lmkit.replies import readers
from lmkit.structured.outputs import SPACE, closed_schema

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lmkit.replies.readers import Reader
    from lmkit.results import ChunkKind

REASONING = ("reasoning_content", "thinking", "reasoning")
"""What chat templates and response templates call the reasoning of a message."""


@dataclass(frozen=True, slots=True)
class Region:
    """A part of an answer between markers.

    Attributes:
        kind: What it is.
        opens: Finds where it begins, a pattern of the package `regex`.
        closes: Finds where it ends; None of a marker with nothing behind it.
        readers: What reads a call, tried in order.
        ends: Whether it ends with the text as well.
        bare: Whether it has no marker: only a whole answer is one, if there are tools.
    """

    kind: ChunkKind
    opens: Any
    closes: Any = None
    readers: tuple[Reader, ...] = ()
    ends: bool = False
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Format:
    """How answers are written.

    Attributes:
        regions: What parts an answer has beside its content.
        anchor: Finds where a prompt's last turn begins, if a response template says.
        thoughts: The markers around reasoning, where they are fixed, and what has to stand behind them.
        shape: How a call is written whose arguments are JSON; empty where they are not.
    """

    regions: tuple[Region, ...] = ()
    anchor: Any = None
    thoughts: tuple[str, str, str] | None = None
    shape: str = ""

    def before(self, special: Mapping[str, int], *, thinking: bool) -> str:
        """Write the rule `before` of Lark: reasoning, to its end if the prompt has opened it, else if there is any.

        Args:
            special: The tokenizer's special tokens, which a grammar has to name by their numbers.
            thinking: Whether the prompt has opened the reasoning.
        """
        if self.thoughts is None:
            return ""
        opens, closes, behind = (_terms(part, special) for part in self.thoughts)
        marked = closes.startswith("<")
        whole = f"thought {closes if marked else ''} {behind}"
        thought = f"thought{'' if marked else f'[suffix={closes}]'}: /(.|\\n)*/"
        return f"before: {whole if thinking else f'({opens} {whole})?'}\n{thought}"

    def grammar(self, tools: Mapping[str, Any], choice: str, special: Mapping[str, int]) -> str:
        """Write the grammar of one call in Lark, as llguidance reads it.

        Args:
            tools: The schemas of the tools' arguments by name.
            choice: `"required"` for any of them, or a name.
            special: As for `before`.

        Raises:
            OptionError: Calls of this checkpoint are not JSON, or not known.
        """
        if not self.shape:
            raise OptionError(
                f"tool_choice={choice!r} needs a checkpoint whose calls are JSON, and this one's are not, or not "
                "known: leave it out, and look at the result's tool_calls."
            )
        chosen = [choice] if choice in tools else [*tools]
        calls = [f"call{n}: {self._call(name, tools[name] or {}, special)}" for n, name in enumerate(chosen)]
        return "\n".join([f"start: {' | '.join(f'call{n}' for n in range(len(chosen)))}", *calls])

    def _call(self, name: str, schema: Mapping[str, Any], special: Mapping[str, int]) -> str:
        """Write the call of one tool as what a rule stands for."""
        own = closed_schema({"type": "object", "properties": {}, **schema})
        shared = {"$defs": own.pop("$defs", {}), "x-guidance": {"whitespace_pattern": SPACE}}
        filled = {"{name}": json.dumps(name), "{arguments}": f"%json {json.dumps(own | shared)}"}
        for word, arguments in (("{call}", "arguments"), ("{bare}", "parameters")):
            fields = {"name": {"const": name}, arguments: own}
            call = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
            filled[word] = f"%json {json.dumps(call | shared)}"
        parts = re.split(f"({'|'.join(map(re.escape, filled))})", self.shape)
        return " ".join(filled.get(part) or _terms(part, special) for part in parts)


def _terms(text: str, special: Mapping[str, int]) -> str:
    """Write a text as parts of a rule, with the numbers of special tokens in it."""
    markers = sorted((re.escape(token) for token in special if token in text), key=len, reverse=True)
    parts = re.split(f"({'|'.join(markers)})", text) if markers else [text]
    return " ".join(f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part)


class _Calls(NamedTuple):
    """How one family writes calls: patterns for its chat template and for the markers, and what else is to know."""

    family: str
    opens: str
    closes: str
    readers: tuple[Reader, ...]
    shape: str = ""
    skipped: str = ""
    ends: bool = False
    bare: bool = False


_XML, _PAIRS, _NAMED = (readers.as_xml, readers.as_json), (readers.as_pairs, readers.as_json), (readers.behind_name,)
_PYTHON, _JSON = (readers.as_python, readers.as_json), (readers.as_json,)
_SECTION, _CALL = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_DEEPSEEK = (*_CALL, _NAMED, f"{_SECTION[0]}{_CALL[0]}{{}}{_CALL[1]}{_SECTION[1]}", "|".join(_SECTION))

CALLS: Final = (
    _Calls(  # gpt-oss
        r"<\|channel\|>", r"(?:<\|channel\|>(?:commentary|analysis)|<\|start\|>assistant) to=",
        r"<\|(?:call|end)\|>", _NAMED,
        "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>",
        r"<\|channel\|>(?:final|commentary)<\|message\|>|<\|start\|>assistant|<\|(?:end|return)\|>", ends=True,
    ),
    _Calls(
        f"{_SECTION[0]}.*```json", *_DEEPSEEK[:3],
        _DEEPSEEK[3].format("function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"), _DEEPSEEK[4],
    ),
    _Calls(_SECTION[0], *_DEEPSEEK[:3], _DEEPSEEK[3].format("{name}<｜tool▁sep｜>{arguments}"), _DEEPSEEK[4]),  # V3.1
    _Calls(r"<\|tool_call>", r"<\|tool_call>call:", r"<tool_call\|>", (readers.unquoted,)),  # Gemma 4
    _Calls("<start_function_call>", "<start_function_call>call:", "<end_function_call>", (readers.unquoted,)),
    _Calls(r"<\|tool_call_start\|>", r"<\|tool_call_start\|>", r"<\|tool_call_end\|>", _PYTHON),  # LFM2
    _Calls("<tool_call>.*<function=", "<tool_call>", "</tool_call>", _XML),  # Qwen3-Coder, Qwen 3.5, Nemotron 3
    _Calls("<tool_call>.*<arg_key>", "<tool_call>", "</tool_call>", _PAIRS),  # GLM 4.5
    # Hermes, Qwen 2.5 and 3, Granite 4, SmolLM
    _Calls("<tool_call>", "<tool_call>", "</tool_call>", _JSON, "<tool_call>\n{call}\n</tool_call>"),
    _Calls(  # Mistral, from its eleventh tokenizer on, and before; a call ends where the next begins
        r"\[ARGS\]", r"\[TOOL_CALLS\]", r"(?=\[TOOL_CALLS\])", _JSON + _NAMED, "[TOOL_CALLS]{name}[ARGS]{arguments}",
        ends=True,
    ),
    _Calls(
        r"\[TOOL_CALLS\]", r"\[TOOL_CALLS\]", r"(?=\[TOOL_CALLS\])", _JSON + _NAMED, "[TOOL_CALLS][{call}]",
        ends=True,
    ),
    # Granite 3, Phi-4-mini
    _Calls(r"<\|tool_call\|>", r"<\|tool_call\|>", r"<\|/tool_call\|>", _JSON, "<|tool_call|>[{call}]", ends=True),
    _Calls(  # Llama 3
        r'<\|python_tag\|>|start_header_id.*"parameters"', r"<\|python_tag\|>", r"<\|e(?:om|ot)_id\|>",
        _JSON + _PYTHON, "{bare}", ends=True, bare=True,
    ),
)  # fmt: skip
"""The first whose pattern a chat template has is the one."""

THOUGHTS: Final = (
    ("<|channel|>", "<|channel|>analysis<|message|>", "<|end|>", "<|start|>assistant"),
    ("<|channel>", "<|channel>thought\n", "<channel|>", ""),
    ("[THINK]", "[THINK]", "[/THINK]", ""),
    ("think>", "<think>", "</think>", ""),
)
"""The same for reasoning, as it stands there."""

_BARE = r'\A\s*(?:\{\s*"(?:name|type|function)"|\[\s*[A-Za-z_][\w.]*\()'
"""An answer that is a call without a marker: an object of JSON with a name, or Python."""


def _pattern(text: str) -> Any:
    import regex

    return regex.compile(text, regex.DOTALL)


@lru_cache(maxsize=64)
def known(template: str) -> Format:
    """Return how a checkpoint with this chat template writes, by the family whose markers are in it."""
    thoughts = next((one[1:] for one in THOUGHTS if one[0] in template), None)
    patterns = [_pattern(re.escape(marker)) for marker in (thoughts or ())[:2]]
    regions = [Region("reasoning", *patterns)] if patterns else []
    calls = next((one for one in CALLS if re.search(one.family, template, re.DOTALL)), None)
    if calls is None:
        return Format(tuple(regions), thoughts=thoughts)
    opens, closes = _pattern(calls.opens), _pattern(calls.closes)
    regions.append(Region("tool_call", opens, closes, calls.readers, calls.ends))
    if calls.bare:
        regions.append(Region("tool_call", _pattern(_BARE), closes, calls.readers, ends=True, bare=True))
    if calls.skipped:
        regions.append(Region("content", _pattern(calls.skipped)))
    return Format(tuple(regions), thoughts=thoughts, shape=calls.shape)


def declared(response_template: Mapping[str, Any], template: str) -> Format:
    """Return what a checkpoint's own response template says; transformers' parsers read what is in its regions."""
    from transformers.utils.chat_parsing.response_templates import load_response_template

    spec: Any = load_response_template(dict(response_template))
    regions = [_declared(one) for one in spec.fields.values() if one.open_re or one.close_re]
    return replace(known(template), regions=tuple(regions), anchor=spec.start_anchor_re)


def _declared(field: Any) -> Region:
    def read(text: str, captured: Mapping[str, str]) -> list[tuple[str, Any]]:
        from transformers.utils.chat_parsing.content_parsers import process_field

        value = process_field(text, field, dict(captured))
        return [readers.named(call) for call in (value if isinstance(value, list) else [value])]

    if field.open_re is None:  # what is left over: its end is a marker with nothing behind
        return Region("content", field.close_re)
    kinds: dict[str, ChunkKind] = {"tool_calls": "tool_call", **dict.fromkeys(REASONING, "reasoning")}
    closes, ends = field.close_re or _pattern("(?!)"), field.close_re is None
    return Region(kinds.get(field.name, "content"), field.open_re, closes, (read,), ends)
