"""Arguments that nobody should pass: each verb gives a result, an `LmkitError`, or what the caller's object raised."""

import asyncio
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import checkpoints
import lmkit
from checkpoints import changed, fresh, wrapper
from lmkit.options.option import declared

SECONDS = 20
"""After which a call is taken to hang."""


class OwnError(Exception):
    """What the caller's own objects raise."""


def fail(*_: Any, **__: Any) -> Any:
    """Raise what is the caller's own."""
    raise OwnError


def broken(*names: str) -> Any:
    """Make an object of which some methods raise."""
    return type("Broken", (), dict.fromkeys(names, fail))()


def generator() -> Iterator[str]:
    """Give a row and raise."""
    yield "She"
    raise OwnError


def knotted(kind: type, key: Any = None) -> Any:
    """Make a list or a dict that contains itself."""
    knot = kind()
    if kind is list:
        knot.append(knot)
    else:
        knot[key] = knot
    return knot


def deep(levels: int) -> Any:
    """Nest a list."""
    nested: Any = "x"
    for _ in range(levels):
        nested = [nested]
    return nested


class NA:
    """What pandas has for a missing value: it is neither true nor false, nor equal to anything."""

    __hash__ = object.__hash__

    def __eq__(self, _other: object) -> Any:
        return self

    __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


class Dropping(dict):  # type: ignore[type-arg]
    """A dict that has keys and no values."""

    __getitem__ = get = items = fail


VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "true": lambda: True,
    "zero": lambda: 0,
    "minus": lambda: -1,
    "huge": lambda: 10**18,
    "endless": lambda: 10**5000,
    "minus endless": lambda: -(10**5000),
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "tiny": lambda: 5e-324,
    "complex": lambda: 1j,
    "empty": lambda: "",
    "text": lambda: "x",
    "surrogate": lambda: "a\ud800b",
    "zeros": lambda: "\x00" * 3,
    "pattern": lambda: "(a+)+$",
    "broken pattern": lambda: "(",
    "bytes": lambda: b"x",
    "bytearray": lambda: bytearray(b"\xff"),
    "memoryview": lambda: memoryview(b"x"),
    "a type": lambda: str,
    "another type": lambda: list,
    "a function": lambda: len,
    "an ellipsis": lambda: ...,
    "NA": NA,
    "0-d": lambda: np.array("She"),
    "0-d number": lambda: np.array(1.5),
    "0-d tensor": lambda: torch.tensor(3),
    "0-d object": lambda: np.array({"role": "user"}, dtype=object),
    "array": lambda: np.array([1, 2]),
    "array of texts": lambda: np.array(["She", "He"]),
    "2-d": lambda: np.ones((2, 2)),
    "no rows": lambda: np.array([]),
    "tensor": lambda: torch.ones(2, 2, dtype=torch.long),
    "tensor without values": lambda: torch.ones(2, device="meta"),
    "0-d without a value": lambda: torch.ones((), device="meta"),
    "numpy text": lambda: np.str_("She"),
    "numpy number": lambda: np.int64(3),
    "numpy truth": lambda: np.bool_(1),
    "half": lambda: np.float16("nan"),
    "list": list,
    "nested": lambda: [[[]]],
    "nones": lambda: [None],
    "mixed": lambda: ["She", 5, None, b"x", ["He"]],
    "ids": lambda: [1, -1, 10**30],
    "truths": lambda: [True, False],
    "deep": lambda: deep(100_000),
    "set": lambda: {"She"},
    "dict": dict,
    "no strings": lambda: {5: 5, None: (1,)},
    "self": lambda: {"self": 1, "cls": 2},
    "message": lambda: [{"role": "user", "content": {5: b"x"}}],
    "roleless": lambda: [{"role": 5}],
    "surrogates": lambda: [{"role": "user", "content": "a\ud800"}],
    "knot": lambda: knotted(list),
    "knotted dict": lambda: knotted(dict, "role"),
    "knotted message": lambda: [{"role": "user", "content": knotted(list)}],
    "knotted tools": lambda: {"tools": knotted(list)},
    "deep message": lambda: [{"role": "user", "content": deep(100_000)}],
    "broken repr": lambda: broken("__repr__"),
    "broken str": lambda: broken("__str__", "__format__"),
    "broken len": lambda: broken("__len__", "__bool__"),
    "broken getitem": lambda: broken("__getitem__"),
    "broken iter": lambda: broken("__iter__"),
    "broken equal": lambda: broken("__eq__", "__hash__"),
    "broken attributes": lambda: broken("__getattr__"),
    "no length": type("NoLength", (), {"__getitem__": lambda *_: "x"}),
    "broken dict": lambda: Dropping(role="user"),
    "broken message": lambda: [Dropping(role="user", content="x")],
    "broken content": lambda: [{"role": "user", "content": broken("__repr__", "__str__")}],
    "broken list": lambda: type("Broken", (list,), {"__getitem__": fail, "__len__": fail})([1]),
    "broken text": lambda: type("Broken", (str,), {"__repr__": fail, "__str__": fail, "__len__": fail})("She"),
    "broken index": lambda: [broken("__index__")],
    "generator": generator,
    "generator inside": lambda: [generator()],
    "map": lambda: map(fail, [1]),
}


def task(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Make a call of a verb for asyncio."""

    def call(*given: Any, **options: Any) -> Any:
        async def main() -> Any:
            return await verb(*given, **options)

        return asyncio.run(main())

    return call


def read(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Make a call that reads all there is of a verb which gives results one by one."""
    return lambda *given, **options: list(verb(*given, **options))


CHAT = [{"role": "user", "content": "She"}]
SHORT = {"max_new_tokens": 2}
Verb = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], set[str]]


def verbs(model: Any, kind: str) -> dict[str, Verb]:
    """Return each verb of a wrapper with good arguments, and the names of its options."""
    text, whole = ("She [MASK].", "She is.") if kind == "masked" else ("She", "She")
    options, short = (
        set(declared(type(model)._accepted)) | ({"output"} if kind != "masked" else set()),
        {} if kind == "masked" else SHORT,
    )
    behind = () if kind == "masked" else (text,)
    told = {"on_error", "progress", *({"source", "target", "preset"} if kind == "seq2seq" else ())}
    told |= {"continue_final_message"} if kind == "causal" else {"metric"} if kind == "masked" else set()
    choices = ([whole, "He"],) if kind == "masked" else (text, [text, "He"])
    found: dict[str, Verb] = {
        "call": (model, (text,), short, options),
        "stream": (read(model.stream), (text,), short, options),
        "map": (read(model.map), ([text],), short, options | {"on_error"}),
        "acall": (task(model.acall), (text,), short, set()),
        "score": (model.score, (whole, *behind), {}, told),
        "rank": (model.rank, choices, {}, told | {"normalize"} | ({"neutral"} if kind == "causal" else set())),
        "ascore": (task(model.ascore), (whole, *behind), {}, set()),
    }
    if kind == "causal":
        found["chat"] = (model.chat, (CHAT,), short, {"template", "continue_final_message"})
        found["answer"] = (model.score, (CHAT, text), {}, set())
        for name in ("tools", "documents", "chat_template", "x"):
            ask = lambda given, name=name: model.chat(CHAT, template={name: given}, **SHORT)  # noqa: E731
            found[f"template of {name}"] = (ask, ("{{ 1 }}" if name == "chat_template" else [],), {}, set())
    return found


def calls(verb: Verb) -> Iterator[tuple[str, Callable[[Callable[[], Any]], Any]]]:
    """Give each place of a verb where a value can be put, and what calls it so."""
    do, given, usual, options = verb
    for place in range(len(given)):
        yield str(place), lambda make, n=place: do(*given[:n], make(), *given[n + 1 :], **usual)
        yield f"in {place}", lambda make, n=place: do(*given[:n], [given[n], make()], *given[n + 1 :], **usual)
    for name in sorted(options):
        yield name, lambda make, name=name: do(*given, **usual | {name: make()})
        yield f"in {name}", lambda make, name=name: do(*given, **usual | {name: [make()]})


class Hang(BaseException):
    """A call took too long."""


def _ring(*_: object) -> None:
    raise Hang


def wrong(call: Callable[[Callable[[], Any]], Any], make: Callable[[], Any]) -> str:
    """Call with a value; return what came that should not."""
    signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        call(make)
    except lmkit.LmkitError as error:
        return "" if str(error).strip() else "an error without a word"
    except OwnError:
        return ""
    except (Exception, Hang) as error:  # noqa: BLE001 - anything else is what is looked for
        return repr(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


@cache
def loaded(kind: str) -> Any:
    """Return a wrapper; the generator's has a chat template that writes all it is given."""
    if kind != "causal":
        return wrapper({"seq2seq": "t5", "masked": "bert"}[kind])
    template = "{{ tools }}{{ documents }}{{ x }}{% for message in messages %}{{ message.content }}{% endfor %}"
    where = checkpoints.ROOT / "chats"
    return fresh("llama", changed("llama", where, lambda _, tokenizer: setattr(tokenizer, "chat_template", template)))


VERBS = ["call", "stream", "map", "acall", "score", "rank", "ascore"]
TEMPLATES = [f"template of {name}" for name in ("tools", "documents", "chat_template", "x")]
ASKED = [
    *(("causal", verb) for verb in [*VERBS, "chat", "answer", *TEMPLATES]),
    *((kind, verb) for kind in ("seq2seq", "masked") for verb in VERBS),
]


@pytest.mark.filterwarnings("ignore")  # a bar that the terminal does not have, and what numpy says of such values
@pytest.mark.parametrize("kind, name", ASKED)
def test_whatever_a_verb_is_given_it_answers_or_says_so(kind: str, name: str) -> None:
    """Each value in one place, or in all with `LMKIT_ARGUMENTS=all`; a good call behind gives what it gave before."""
    verb = verbs(loaded(kind), kind)[name]
    do, given, usual, _ = verb
    before = untimed(do(*given, **usual))
    places, everywhere = list(calls(verb)), os.environ.get("LMKIT_ARGUMENTS") == "all"
    found = {}
    for number, (value, make) in enumerate(VALUES.items()):
        for place, call in places if everywhere else [places[number % len(places)], places[0]]:
            endless = kind == "seq2seq" and "max_new_tokens" in place and value in ("huge", "endless")  # it is done
            if not endless and (told := wrong(call, make)):
                found[place, value] = told
    assert found == {}
    assert untimed(do(*given, **usual)) == before


def untimed(results: Any) -> str:
    """Write results without what they took."""
    return re.sub(r"Timing\([^)]*\)", "", repr(results))
