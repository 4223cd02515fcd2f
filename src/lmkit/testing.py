"""Fakes of `Generator`, `Translator` and `Unmasker` that need no model, for tests of what is built on lmkit.

```python
from lmkit.testing import FakeGenerator

generator = FakeGenerator({"Is it nice?": "Yes, it is."})
generator("Is it nice?", max_new_tokens=1).text  # "Yes,"
```

They are the real classes, whose verbs, options and results are their own; only what touches a model is replaced.
Neither torch nor transformers is imported.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from lmkit.engine import CLOSED, Caller, Found, Outcome, Query, Reading, Request, Scored, Update, answered
from lmkit.engine.failures import step_failed
from lmkit.engine.row import Row
from lmkit.errors import EngineError, LmkitError, OptionError, listed, nearest
from lmkit.languages import Languages, Prepared
from lmkit.planning.layout import Layout, ModulePlan
from lmkit.planning.placement import Placement
from lmkit.planning.plan import LoadPlan
from lmkit.planning.precision import Precision
from lmkit.results import EngineStats, TokenLogprob
from lmkit.text.chats import Chats, check_last
from lmkit.text.codec import Codec, checked
from lmkit.text.templates import Template
from lmkit.wrappers.base import Loaded
from lmkit.wrappers.generator import Generator
from lmkit.wrappers.translator import Translator
from lmkit.wrappers.unmasker import Unmasker
from lmkit.wrappers.writer import Job

if TYPE_CHECKING:
    from lmkit.checkpoint.tasks import Task
    from lmkit.documents import Split
    from lmkit.masked.texts import MaskedText
    from lmkit.wrappers.scoring import Item

AnswerT = TypeVar("AnswerT")
JobT = TypeVar("JobT", bound=Job)
Answers: TypeAlias = Mapping[str, AnswerT | Exception] | Callable[[str, Mapping[str, Any]], AnswerT | Exception]
"""Answers by their prompts, or a function of a prompt and its row's options.

White space around a prompt does not count. The prompt of a chat is the content of its last message. An exception makes
the row fail as if a step of the model had raised it; an `LmkitError` other than `EngineError` is raised before any row
runs, as that of a row that cannot be run.
"""
Texts: TypeAlias = str | Sequence[str]
"""An answer, or several, which the completions of a row take in turn."""
Fills: TypeAlias = str | Sequence[str] | Sequence[Sequence[str]]
"""Words for the mask, the best first; where there are several masks, a list of words for each."""

EOS, BOS, MASK = range(3)
LIKELY, UNLIKELY = math.log(0.9), math.log(0.1)


class Call(NamedTuple):
    """What a row was asked: the text or the chat as given, and the options."""

    prompt: Any
    options: dict[str, Any]


class _Words:
    """A tokenizer whose tokens are words, with the white space before them, numbered as they come."""

    eos_token_id, bos_token_id, mask_token_id, mask_token = EOS, BOS, MASK, "[MASK]"
    pad_token_id = unk_token_id = sep_token_id = cls_token_id = None
    all_special_ids = (EOS, BOS)
    added_tokens_decoder: Mapping[int, Any] = {}
    is_fast = False
    get_vocab, convert_tokens_to_ids = dict, dict[str, int]().get  # no token is a byte or a language

    def __init__(self) -> None:
        self._words = {EOS: "</s>", BOS: "<s>", MASK: "[MASK]"}
        self._numbers = {"[MASK]": MASK}
        self._next = itertools.count(len(self._words))

    def __call__(self, text: str = "", pair: str | None = None, *, text_target: str = "", **_: Any) -> dict[str, Any]:
        words = re.findall(r"\[MASK\]|\s*(?:(?!\[MASK\])\S)+|\s+", text or text_target)
        token_ids = [self.number(word) for word in words]
        return {"input_ids": token_ids if pair is None else [*token_ids, EOS, *self(pair)["input_ids"]]}

    def __len__(self) -> int:
        return 2**31  # any number may be that of a word to come

    def number(self, word: str) -> int:
        """Return the token of a word."""
        if word not in self._numbers:
            self._words[number := next(self._next)] = word  # before its number is there for other threads
            self._numbers.setdefault(word, number)
        return self._numbers[word]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        shown = (n for n in token_ids if not (skip_special_tokens and n in self.all_special_ids))
        return "".join(self._words.get(n, f"<{n}>") for n in shown)

    def convert_ids_to_tokens(self, token_ids: Any) -> Any:
        """Return the words of tokens, or of one."""
        return [*map(self.decode, zip(token_ids))] if isinstance(token_ids, list) else self.decode([token_ids])


class _Unset(SimpleNamespace):
    """A config that leaves open what it does not say."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@dataclass(frozen=True, slots=True)
class _Asked(Request):
    """A request, and how it is answered."""

    answer: Sequence[str] | Exception = ()


class _Engine:
    """Writes the answers of requests and scores texts, in the place of what computes."""

    def __init__(self, codec: Codec, likely: Callable[[str, str], bool]) -> None:
        self._codec = codec
        self._likely = likely
        self._closed = False

    def run(self, requests: Iterable[_Asked | None], caller: Caller) -> Iterator[Update[Outcome] | None]:
        """Answer requests one after the other."""
        numbers = itertools.count()
        for request in requests:
            if caller.cancelled.is_set():
                return
            if request is None:
                yield None
            elif isinstance(request.answer, Exception):
                yield Update(next(numbers), error=_failure(request.answer))
            else:
                yield from self._written(request, request.answer, next(numbers), caller)

    def _written(self, request: Request, answer: Sequence[str], index: int, caller: Any) -> Iterator[Update[Outcome]]:
        copies = range(max(request.copies, request.config.num_return_sequences or 1))
        rows = [Row(request, caller, index, copy, self._codec) for copy in copies]
        for row, text in zip(rows, itertools.cycle(answer), strict=False):
            row.start_clock()
            for token_id in (*self._codec.encode(text), EOS):
                if self._closed:
                    raise EngineError(CLOSED)
                sure = TokenLogprob(self._codec.token(token_id), token_id, 0.0)
                known = None if request.logprobs is None else replace(sure, top=(sure,)[: request.logprobs])
                row.accept(token_id, known, token_id)
                if row.done:
                    break
                if row.streams:
                    shown, upto = row.unreleased()
                    row.release(upto)
                    yield Update(index, shown)
        completions = tuple(one for row in rows for one in row.completions())
        text, upto = rows[0].unreleased() if caller.stream else ("", 0)
        outcome = Outcome(completions, rows[0].timing(), tuple(marks for row in rows for marks in row.all_marks))
        yield Update(index, text, outcome, marks=rows[0].marks(text, upto) if caller.stream else ())

    def score(self, readings: Sequence[Reading], _cancelled: object, ended: Callable[[object], None]) -> list[Scored]:
        """Score the ends of texts: answers are likely."""
        found = []
        for reading in readings:
            before, scored = reading.token_ids[: reading.start], reading.token_ids[reading.start :]
            prompt, text = map(self._codec.decode, (reading.source or before, scored))
            likely = self._likely(prompt, text)
            found.append(Scored((LIKELY if likely else UNLIKELY,) * len(scored), likely))
            ended(found[-1])
        return found

    def stats(self) -> EngineStats:
        """Say that nothing is held and nothing was computed."""
        return EngineStats(0, 0, 0, 0, 0, 0, 0, 0)

    def close(self) -> None:
        """Refuse further work."""
        self._closed = True


class _MaskEngine(_Engine):
    """Says what fills a mask: the words that are its token's type."""

    def run(self, requests: Any, caller: Any) -> Any:
        """Answer all who ask, round by round."""
        del caller
        return answered(requests, lambda queries: [self._found(query) for query in queries])

    def _found(self, query: Query) -> Found | EngineError:
        words: Any = query.tokens[query.place][1] or ()
        if isinstance(words, Exception):
            return _failure(words)
        odds = {word: n * math.log(0.5) for n, word in enumerate(words, start=1)}
        if isinstance(query.want, tuple):
            least = min([UNLIKELY, *odds.values()])
            return [(n, odds.get(self._codec.token(n).strip(), least)) for n in query.want]
        found = [(self._codec.tokenizer.number(word), odd) for word, odd in odds.items()]
        return found[: query.want if isinstance(query.want, int) else 1]


@dataclass(frozen=True, slots=True)
class _Loaded(Loaded):
    """What a fake has in the place of a model."""

    likely: Callable[[str, str], bool] = lambda _prompt, _text: False

    def engine(self, codec: Codec, start: int | None = None) -> Any:
        del start
        return _Engine(codec, self.likely)

    def grammars(self, codec: Codec, start: int | None) -> Any:
        del codec, start
        return SimpleNamespace(of=lambda *_, **__: None)  # an answer is what the table says

    def scorer(self, codec: Codec) -> Any:
        return self.engine(codec)

    def mask_scorer(self) -> Any:
        return _MaskEngine(Codec(self.tokenizer), self.likely)


class _LastMessage(Chats):
    """Writes the content of a chat's last message, and nothing else; answers may have calls as Hermes writes them."""

    def template(self, given: Mapping[str, Any]) -> Template:  # noqa: ARG002 - there is one
        """Return what says how answers are written."""
        return Template("<tool_call> <think>", frozenset(["tools", "enable_thinking"]), frozenset(), frozenset())

    def encode(
        self, messages: Sequence[Mapping[str, Any]], template: Mapping[str, Any], *, continued: bool = False
    ) -> tuple[str, list[int]]:
        del template
        if continued:
            check_last(messages[-1])
        content = messages[-1].get("content") or ""
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        return text, self._codec.encode(checked(text, "the chat"))


class _AnyLanguages(Languages):
    """Takes any word for a language."""

    def _none(self, text: str, source: str | None, target: str | None) -> Prepared:
        return Prepared(text, source=source, target=target)


class _Fake:
    """What fakes share: their answers, what they were asked, and what they lack.

    Attributes:
        calls: What each row was asked that was called, mapped or streamed, in order.
    """

    _plan: LoadPlan
    _codec: Codec
    _loaded: Loaded | None

    def _begin(self, task: Task, answers: Any, **more: Any) -> Loaded:
        """Take the answers, and return what stands for a loaded model."""
        self.calls: list[Call] = []
        self._table = answers if callable(answers) else {prompt.strip(): one for prompt, one in answers.items()}
        config = _Unset(
            eos_token_id=EOS, bos_token_id=BOS, is_encoder_decoder=task == "seq2seq", decoder_start_token_id=BOS
        )
        model: Any = SimpleNamespace(
            config=config,
            generation_config=config,
            get_input_embeddings=lambda: None,
            get_output_embeddings=lambda: None,
        )
        tokenizer: Any = _Words()
        again: Any = partial(type(self), answers, **more)  # type: ignore[call-arg]  # subclasses take them
        return _Loaded(model, tokenizer, _plan(task), again, likely=self._likely)

    @property
    def model(self) -> Any:
        """Nothing.

        Raises:
            EngineError: Always.
        """
        raise EngineError(f"{type(self).__name__} is a fake: it has no model, tokenizer, device, modules or memory.")

    tokenizer = device = modules = memory_bytes = model

    def __repr__(self) -> str:
        return f"<lmkit.testing.{type(self).__name__}{', closed' if self._loaded is None else ''}>"

    def _answer(self, prompt: str, options: Mapping[str, Any], row: int) -> Any:
        """Return what the table or the function has for a prompt.

        Raises:
            OptionError: The table has nothing.
        """
        if callable(self._table):
            answer = self._table(prompt, options)
        elif prompt.strip() in self._table:
            answer = self._table[prompt.strip()]
        else:
            raise OptionError(
                f"row {row}: the fake has no answer to {prompt!r}.{nearest(prompt, self._table)} Its table has: "
                f"{listed(self._table) or 'nothing'}. Add the prompt to it, or pass a function."
            )
        if isinstance(answer, LmkitError) and not isinstance(answer, EngineError):
            raise answer
        texts = [answer] if isinstance(answer, str) else answer
        if not texts or not isinstance(texts, (Sequence, Exception)):
            raise OptionError(f"the answer to {prompt!r} is {answer!r}: give a text, several, or an exception.")
        return texts

    def _answered(self, job: JobT, call: Call) -> JobT:
        """Note what a row is asked, and put the answers to its requests."""
        self.calls.append(call)
        requests = []
        for request in job.requests:
            answer = self._answer(self._codec.decode(request.input_ids, special=False), call.options, job.row)
            requests.append(_Asked(**{one.name: getattr(request, one.name) for one in fields(request)}, answer=answer))
        return replace(job, requests=tuple(requests))

    def _likely(self, prompt: str, text: str) -> bool:
        try:
            answer = self._answer(prompt, {}, 0)
        except LmkitError:
            return False
        return not isinstance(answer, Exception) and text.strip() in map(str.strip, answer)


def _failure(error: Exception) -> EngineError:
    return error if isinstance(error, EngineError) else step_failed(error)


def _plan(task: Task) -> LoadPlan:
    """Make the plan of a fake, by which nothing takes anything."""
    why, nothing = "a fake has no weights", Layout({"": "cpu"}, (ModulePlan("fake", "cpu", "float32", 0),), {}, 0, {})
    precision = Precision("float32", None, None, why)  # type: ignore[arg-type]  # torch.float32
    return LoadPlan(
        task, "fake", "fake", "fake", 0, precision, Placement({"": "cpu"}, reason=why), "torch", "fake", "lmkit",
        compiled=False, prefix_cache_bytes=0, key_values=None, context_length=None, end_token_ids=(), fits=True,
        reasons={"fits": why}, _layout=nothing,
    )  # fmt: skip


class FakeGenerator(_Fake, Generator):
    """A `Generator` that answers from a table or a function.

    Its tokens are words: `max_new_tokens=2` cuts an answer behind its second word, and a stream tells it word by word.
    Draws and searches write the same answers. For `score` and `rank` a word of an answer has the probability 0.9, of
    another text 0.1.
    """

    def __init__(self, answers: Answers[Texts]) -> None:
        """Answer from a table: texts by their prompts, or a function of a prompt and its options; see `Answers`."""
        super().__init__(self._begin("causal", answers))
        self._chats = _LastMessage(self._codec)

    def _job(self, given: Any, options: dict[str, Any], row: int) -> Any:
        return self._answered(super()._job(given, dict(options), row), Call(given, options))

    def _item(self, text: str, token_ids: list[int], start: int, row: int) -> Item:
        del start  # a word may begin in the prompt and end in the text: here they are words of their own
        before = self._codec.encode(self._codec.decode(token_ids).removesuffix(text))
        return super()._item(text, [*before, *self._codec.encode(text)], len(before), row)


class FakeTranslator(_Fake, Translator):
    """A `Translator` that answers from a table or a function; see `FakeGenerator`.

    A text is taken whole unless `split=` says otherwise: then each piece is looked up.
    """

    def __init__(self, answers: Answers[Texts], *, languages: Sequence[str] = (), presets: Sequence[str] = ()) -> None:
        """Answer from a table.

        Args:
            answers: As for a `FakeGenerator`; a function finds `source`, `target` and `preset` in the options.
            languages: The codes of which `source=` and `target=` then have to be; by default any word will do, or none.
            presets: The names that `preset=` takes.
        """
        super().__init__(self._begin("seq2seq", answers, languages=languages, presets=presets))
        told: Any = dict.fromkeys(languages), {preset: {} for preset in presets}
        self._languages = Languages("codes", *told) if languages else _AnyLanguages("none", *told)

    def _usual_split(self, prepared: Prepared) -> Split:
        del prepared
        return "none"

    def _job(self, given: Any, options: dict[str, Any], row: int) -> Any:
        return self._answered(super()._job(given, dict(options), row), Call(given, options))


class FakeUnmasker(_Fake, Unmasker):
    """An `Unmasker` that fills masks from a table or a function.

    At a mask its first word has the probability 0.5, the next 0.25 and so on, whatever fills the others; there are no
    more candidates than words. What `targets` name beside them, and each word that is scored, has 0.1 at the most.
    """

    def __init__(self, answers: Answers[Fills]) -> None:
        """Fill from a table: words by texts as given, or a function of a text and its options; see `Fills`."""
        super().__init__(self._begin("masked", answers))

    def _job(self, given: Any, options: dict[str, Any], row: int) -> MaskedText:
        job = super()._job(given, dict(options), row)
        self.calls.append(Call(given, options))
        words, masks = self._answer(given, options, row), len(job.spans)
        if isinstance(words, Exception):
            words = [words] * masks
        elif isinstance(words[0], str):
            words = [words]
        if len(words) != masks:
            raise OptionError(f"row {row} has {masks} masks, and its answer is {words!r}: give a list for each.")
        # The type of a mask's token is seen by who is asked about it.
        return replace(job, blanks=replace(job.blanks, types=tuple(words)))
