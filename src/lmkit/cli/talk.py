"""`lmkit chat` without a message: a talk in the terminal, its lines edited by Python's `readline` where it is there."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkit.cli.answers import spell
from lmkit.cli.options import value_of
from lmkit.cli.screen import as_said, aside, note, steered, write
from lmkit.errors import InputTooLongError, LmkitError, OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lmkit.results import Generation, TextChunk

HELP = '''\
/system [TEXT]         what the model is told before all else; alone, nothing
/options [NAME=VALUE]  set an option, as temperature=0.7; alone, show them
/reset                 forget what was said
/save FILE             add the talk to FILE, as a line of JSON
/exit, Ctrl-D          end the talk
Ctrl-C                 end an answer; what was written of it is kept
Up, Down               what you wrote before
Alt-Enter              begin a new line; pasted lines are one message, and
                       so are those between """ and """
A message that begins with / has a space before it.'''


class Talk:
    """Messages, and how they are answered."""

    def __init__(self, generator: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
        """Begin with messages; an answer ends where the model ends it, unless the options say when.

        Raises:
            OptionError: The checkpoint is not made for chats, or an option is not accepted.
        """
        self._generator, self._messages = generator, messages
        self._context: int | None = generator.plan.context_length
        self._options = ({} if self._context is None else {"max_new_tokens": self._context}) | options
        self._check(messages, self._options)

    def run(self) -> None:
        """Answer what is typed until it ends."""
        aside("/help lists what there is, Ctrl-D ends the talk.")
        for line in typed():
            try:
                if line.startswith("/"):
                    self._do(*line[1:].split(maxsplit=1))
                else:
                    self._answer(line.strip())
            except KeyboardInterrupt:  # pressed once more
                aside("stopped.")
            except LmkitError as error:
                advice = " /reset forgets what was said." if isinstance(error, InputTooLongError) else ""
                note(f"error: {as_said(str(error), 'the talk')}{advice}")

    def _answer(self, message: str) -> None:
        """Answer a message; one without an answer is forgotten."""
        asked = [*self._messages, {"role": "user", "content": message}]
        heard: list[TextChunk] = []

        def chunks() -> Iterator[TextChunk]:
            for chunk in self._generator.stream(asked, **self._options):
                heard.append(chunk)
                yield chunk

        try:
            spell(chunks())
        except KeyboardInterrupt:
            said = "".join(chunk.text for chunk in heard if chunk.kind == "content")
            aside("stopped; what it said is kept." if said else "stopped; the message is forgotten.")
            if said:
                self._messages = [*asked, {"role": "assistant", "content": said}]
            return
        for result in [chunk.result for chunk in heard if chunk.result is not None]:
            self._messages = [*asked, result.message]
            self._tell(result)

    def _tell(self, result: Generation) -> None:
        """Say how fast an answer came, and how much of the context the talk fills."""
        used = result.prompt_tokens + result.generated_tokens
        of = "" if self._context is None else f" of {self._context:,}"
        cut = ", stopped at the limit" if result.finish_reason == "length" else ""
        speed = f"{result.generated_tokens:,} tokens, {result.timing.tokens_per_second:.1f} tokens/s"
        aside(f"{speed}; context {used:,}{of}{cut}")

    def _do(self, name: str = "", given: str = "") -> None:
        """Do what a line that begins with / says."""
        commands = {
            "help": self._help,
            "system": self._system,
            "options": self._set,
            "reset": self._reset,
            "save": self._save,
        }
        if name not in commands:
            raise OptionError(
                f"there is no /{name}: /help lists what there is; a message that begins with / has a space before it."
            )
        commands[name](given.strip())

    def _help(self, _given: str) -> None:
        aside(HELP)

    def _system(self, text: str) -> None:
        after = [one for one in self._messages if one["role"] != "system"]
        messages = [*([{"role": "system", "content": text}] if text else []), *after]
        self._check(messages, self._options)
        self._messages = messages

    def _reset(self, _given: str) -> None:
        self._messages = [one for one in self._messages if one["role"] == "system"]
        aside("forgotten.")

    def _save(self, file: str) -> None:
        if not file:
            raise OptionError("/save needs the name of a file.")
        try:
            with Path(file).expanduser().open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"messages": self._messages}, ensure_ascii=False) + "\n")
        except (OSError, RuntimeError, ValueError) as error:
            raise OptionError(f"{file} cannot be written: {error}") from error
        aside(f"{len(self._messages)} messages saved.")

    def _set(self, written: str) -> None:
        name, equals, value = written.partition("=")
        if not written:
            aside("\n".join(f"{name}={json.dumps(value)}" for name, value in self._options.items()) or "none is set.")
            return
        if not equals:
            raise OptionError(f"{written!r} is not written as NAME=VALUE.")
        options = {one: kept for one, kept in self._options.items() if one != name}
        options |= {name: value_of(value)} if value else {}
        try:
            self._check(self._messages, options)
        except LmkitError:
            raise
        except TypeError as error:  # a name of what is not an option, as `prompts`
            raise OptionError(f"{name!r} is not an option of chats.") from error
        self._options = options

    def _check(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
        """Ask for an answer without having it written: the template and the options are looked at."""
        self._generator.stream([*messages, {"role": "user", "content": "?"}], **options)


def typed() -> Iterator[str]:
    """Yield what is typed, several lines as one, until /exit or Ctrl-D; Ctrl-C forgets the line."""
    with contextlib.suppress(ImportError):
        import readline  # gives input() its arrow keys

        if steered(sys.stdout):
            readline.parse_and_bind("set enable-bracketed-paste on")  # which Python turns off
        readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')
    shown = sys.stdout.isatty()
    while True:
        try:
            line = input("> " if shown else "")
            if line.startswith('"""'):
                while not line.endswith('"""') or len(line) < len('""""""'):
                    line += "\n" + input("... " if shown else "")
                line = line[3:-3]
        except EOFError:
            write("")
            return
        except (KeyboardInterrupt, UnicodeDecodeError):
            aside("\n/exit or Ctrl-D ends the talk.")
            continue
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line
