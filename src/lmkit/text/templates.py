"""Chat templates: which one a chat is written with, what it reads, and what it could write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final

from jinja2 import nodes
from jinja2.meta import find_undeclared_variables

from lmkit.errors import OptionError, listed, nearest, shown
from lmkit.text.sandbox import syntax

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RESERVED: Final[Mapping[str, str]] = {
    "messages": "the messages are the call's first argument",
    "conversation": "the messages are the call's first argument",
    "add_generation_prompt": "lmkit opens the assistant's turn, unless the call has continue_final_message=True",
    "continue_final_message": "it is an option of the call itself",
    "sanitize_control_tokens": "control tokens in messages are always plain text",
    "tokenizer_kwargs": "lmkit encodes what the template writes as plain apply_chat_template does",
    "return_assistant_tokens_mask": "lmkit gives no mask of tokens",
    **dict.fromkeys(
        ("tokenize", "return_tensors", "return_dict", "padding", "truncation", "max_length"), "lmkit sets it itself"
    ),
}
"""Arguments of `apply_chat_template` that are no business of the template's, and why."""

_TEMPLATE_ENVIRONMENT = {"add_generation_prompt", "dict", "messages", "namespace", "raise_exception", "range"}
_LONGEST_PIECE = 32


@dataclass(frozen=True)
class Template:
    """A template, read but not run.

    Attributes:
        source: Its text.
        variables: The names it takes from its caller, besides the messages.
        names: The words that it compares with or asks messages for.
        literals: The strings in it, what it writes as it stands included.
    """

    source: str
    variables: frozenset[str]
    names: frozenset[str]
    literals: frozenset[str]

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(text[-n:] for text in self.literals for n in range(1, min(len(text), _LONGEST_PIECE) + 1))

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(text[:n] for text in self.literals for n in range(1, min(len(text), _LONGEST_PIECE) + 1))

    def writes(self, token: str) -> bool:
        """Say whether it has the text of a token, or could build it around a word, as `'<|' + role + '|>'` does."""
        if token.isspace():
            return False
        if any(token in text for text in self.literals):
            return True
        last = next((n for n in range(1, len(token)) if token[-n:] in self._beginnings), len(token))
        first = next((n for n in range(1, len(token)) if token[:n] in self._ends), len(token))
        return not token.isalnum() and first + last < len(token)

    def check(self, given: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> None:
        """Refuse what the template does not read."""
        for number, message in enumerate(messages):
            calls = message.get("tool_calls")
            if isinstance(calls, (list, tuple)) and calls and "tool_calls" not in self.names:
                raise OptionError(
                    f"message {number} has 'tool_calls', and this checkpoint's chat template does not read them: write "
                    "them into its content, or load a checkpoint that is made for tools."
                )
        for name in given:
            if name not in {*self.variables, "chat_template"}:
                made = " Load a checkpoint that is made for tools, or bring a template: template={'chat_template': …}."
                raise OptionError(
                    f"this checkpoint's chat template does not read {shown(name)}, so it would change nothing."
                    f"{made if name == 'tools' else nearest(str(name), self.variables)} "
                    f"Besides messages it reads: {listed(sorted(self.variables)) or 'nothing'}."
                )


@lru_cache(maxsize=64)
def parsed(source: str) -> Template:
    """Read a template.

    Raises:
        jinja2.TemplateError: It is none.
    """
    tree = syntax(source)
    constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return Template(
        source,
        frozenset(find_undeclared_variables(tree)) - _TEMPLATE_ENVIRONMENT - {"strftime_now"},
        frozenset(constants | {node.attr for node in tree.find_all(nodes.Getattr)}),
        frozenset(constants | {node.data for node in tree.find_all(nodes.TemplateData)}),
    )


def chosen(tokenizer: Any, given: Mapping[str, Any]) -> str:
    """Return the template that a chat is written with: the checkpoint's only one, the one that is named, or the given.

    Raises:
        OptionError: There is none, none of that name, or no telling which; or something is given that lmkit sets.
    """
    for name in given:
        if name in RESERVED:
            raise OptionError(f"template= cannot set {name!r}: {RESERVED[name]}.")
    own, wanted = tokenizer.chat_template, given.get("chat_template")
    named = sorted(own) if isinstance(own, dict) else []
    if wanted is None and not own:
        raise OptionError(
            "this checkpoint has no chat template, so there is no telling how it separates messages: "
            "call the generator with one plain prompt, or load a checkpoint made for chat "
            "(their names often end in -Instruct, -it or -chat)."
        )
    if wanted is None and named and "default" not in named and not (given.get("tools") and "tool_use" in named):
        raise OptionError(
            f"this checkpoint has several chat templates and no default: choose one of {listed(named)}, such as "
            f"template={{'chat_template': {named[0]!r}}}."
        )
    if wanted is not None and wanted not in named and not (isinstance(wanted, str) and "{" in wanted):
        hint = nearest(wanted, named) if isinstance(wanted, str) else ""
        raise OptionError(
            f"template={{'chat_template': {shown(wanted)}}} is no template of this checkpoint.{hint} "
            + (f"It has: {listed(named)}." if named else "It has one, without a name; pass a Jinja text, or none.")
        )
    return str(tokenizer.get_chat_template(wanted, given.get("tools")))
