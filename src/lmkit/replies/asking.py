"""What a caller asks of a chat's answer to what the template is given, and to how the answer is read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lmkit.errors import OptionError, listed
from lmkit.replies.formats import REASONING, Format, declared, known
from lmkit.replies.scanner import Scanner
from lmkit.replies.tools import definition, schemas
from lmkit.structured.outputs import Grammar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from lmkit.structured.outputs import Output
    from lmkit.text.chats import Chats
    from lmkit.text.codec import Codec
    from lmkit.text.templates import Template

SWITCHES = ("enable_thinking", "thinking")
"""What chat templates call the choice whether to think."""

TAIL = 60
"""How many characters of a prompt's end may begin a marker."""


@dataclass(frozen=True, slots=True)
class Asked:
    """How one chat is asked and its answer read.

    Attributes:
        values: What the template is given.
        form: How the checkpoint writes.
        tools: The schemas of the tools' arguments by name; None where no tools were given.
        tool_choice: What to call: `"auto"`, `"required"`, or a name.
        budget: How many tokens may be reasoning.
        reasoning_name: What the template calls the reasoning of a message.
    """

    values: Mapping[str, Any]
    form: Format
    tools: Mapping[str, Any] | None
    tool_choice: str
    budget: int | None
    reasoning_name: str

    def scanner(self, prompt: str, begun: str = "") -> Callable[[], Scanner]:
        """Return what reads answers to a prompt, behind what the last message has `begun`."""
        return partial(Scanner, self.form, opening(self.form, prompt, begun), self.tools)

    def processor(self, codec: Codec, scanner: Callable[[], Scanner], prompt: int) -> tuple[Budget, ...]:
        """Return what ends the reasoning of a row behind `prompt` tokens, if it has a budget."""
        if self.budget is None or self.form.thoughts is None:
            return ()
        closing = codec.encode("".join(self.form.thoughts[1:]), special=False)
        return (Budget(codec, scanner, closing, prompt, self.budget),)

    def held(
        self, codec: Codec, scanner: Callable[[], Scanner], output: Output[Any] | None
    ) -> tuple[Output[Any] | None, str]:
        """Return what the answer has to be, if anything, and the rule of Lark for the reasoning before it.

        Raises:
            OptionError: A call is asked for, and those of this checkpoint are not JSON, or `output` is something else.
        """
        special = {name: number for number, name in codec.names.items()}
        if self.tool_choice != "auto":
            if output is not None:
                raise OptionError("tool_choice and output contradict: an answer is a call or a value.")
            output = Grammar(self.form.grammar(self.tools or {}, self.tool_choice, special))
        return output, "" if output is None else self.form.before(special, thinking=_thinks(scanner()))


def asked(chats: Chats, codec: Codec, options: Mapping[str, Any]) -> Asked:
    """Read the options of a chat that `chats` writes.

    Raises:
        OptionError: They contradict each other, or the checkpoint's template does not read what they ask for.
    """
    values = dict(options.get("template") or {})
    if options.get("tools") and values.get("tools"):
        raise OptionError("tools= and template={'tools': …} contradict each other: pass one of them.")
    given = options.get("tools") or values.get("tools")
    if isinstance(given, (list, tuple)) and given:
        values["tools"] = [definition(tool) for tool in given]
    tools = schemas(values["tools"]) if isinstance(given, (list, tuple)) and given else None
    choice = options.get("tool_choice", "auto")
    if choice != "auto" and (not tools or choice not in ("required", *tools)):
        raise OptionError(
            f"tool_choice={choice!r} is not accepted: it takes 'auto', 'required' or the name of a tool in tools=, "
            f"which has {listed(tools or ()) or 'none'}."
        )
    template = chats.template(values)
    form = form_of(codec, template.source)
    budget = _thinking(options.get("thinking"), values, template, form)
    name = next((name for name in REASONING if name in template.names), REASONING[0])
    return Asked(values, form, tools, choice, budget, name)


def form_of(codec: Codec, template: str) -> Format:
    """Return how a checkpoint writes: as its response template says, else as its chat template lets expect."""
    own = getattr(codec.tokenizer, "response_template", None)
    try:
        return declared(own, template) if own else known(template)
    except Exception:  # noqa: BLE001 - a response template is the checkpoint's, and may be anything
        return known(template)


def _thinking(asked: bool | int | None, values: dict[str, Any], template: Template, form: Format) -> int | None:  # noqa: FBT001
    """Tell the template whether to think, and return how much."""
    if asked is None:
        return None
    switch = next((name for name in SWITCHES if name in template.variables), None)
    budget = None if isinstance(asked, bool) else asked
    if switch is None and (budget is None or form.thoughts is None):
        effort = ", but template={'reasoning_effort': 'low'}" if "reasoning_effort" in template.variables else ""
        raise OptionError(
            f"thinking={asked!r}: this checkpoint's chat template has no choice of thinking{effort}. It reads: "
            f"{listed(sorted(template.variables)) or 'nothing'}."
        )
    if budget is not None and form.thoughts is None:
        raise OptionError(f"thinking={asked!r}: how this checkpoint's reasoning ends is not known: pass True or False.")
    if switch is not None:
        if switch in values:
            raise OptionError(f"thinking= and template={{{switch!r}: …}} contradict each other: pass one of them.")
        values[switch] = bool(asked)
    return budget


def opening(form: Format, prompt: str, begun: str) -> str:
    """Return the part of a prompt that belongs to the answer: what the template or the last message has begun."""
    if form.anchor is not None:
        ends = [found.end() for found in form.anchor.finditer(prompt)]
        return prompt[ends[-1] :] if ends else ""
    if begun:
        return begun
    bare = len(prompt.rstrip())
    opens = [region.opens for region in form.regions if not region.bare]
    for start in range(max(bare - TAIL, 0), bare):
        if any(one.fullmatch(prompt, start, end, partial=True) for one in opens for end in (bare, len(prompt))):
            return prompt[start:]
    return ""


def _thinks(scanner: Scanner, text: str = "") -> bool:
    """Say whether reasoning is open behind what an answer begins with."""
    scanner.feed(text)
    scanner.finish()
    return scanner.kind == "reasoning"


class Budget:
    """Ends the reasoning of one row, by forcing its closing marker, once it has as many tokens.

    It decides by the row's own tokens alone, so that a row may begin again.
    """

    def __init__(
        self, codec: Codec, scanner: Callable[[], Scanner], closing: Sequence[int], prompt: int, tokens: int
    ) -> None:
        """Look at a row behind `prompt` tokens, once it has written `tokens` of its own."""
        self._codec = codec
        self._scanner = scanner
        self._closing = closing
        self._start = prompt + tokens
        self._prompt = prompt

    def __call__(self, token_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Force the next token of the marker, where reasoning is open. *Shapes:* `(1, tokens)`, `(1, vocabulary)`."""
        behind = token_ids.shape[-1] - self._start
        if not 0 <= behind < len(self._closing):
            return scores
        own = token_ids[0, self._prompt : self._start].tolist()
        if not _thinks(self._scanner(), self._codec.decode(own, special=True)):
            return scores
        forced = scores.new_full(scores.shape, -float("inf"))
        forced[:, self._closing[behind]] = 0
        return forced
