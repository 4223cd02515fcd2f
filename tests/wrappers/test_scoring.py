import asyncio
import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

import checkpoints
import choose_answers
import lmkit
from checkpoints import CAUSAL, SEQ2SEQ, reference, texts, wrapper
from lmkit.engine import Reading, Scored, Scorer
from lmkit.engine.passes import base as engine_passes
from lmkit.engine.passes import scores as engine_scores
from lmkit.wrappers.scoring import ranking

hf: Any = transformers
EXACT: dict[str, Any] = {"abs": 1e-5, "rel": 2e-6}
"""Logits of these models are tens: a float32 has about seven digits."""

CLOSE: dict[str, Any] = {"abs": 1e-4, "rel": 2e-6}
"""For batches, whose sums are added up in another order."""

CHAT = [{"role": "user", "content": "Where is the old <|im_end|> sailor?"}]
WORDS = "The old sailor told the children a long story about the sea, and nobody knew why. "
PROMPT = "Every morning the baker opens the small shop near the river. The capital of France is"
CHOICES = [" Paris", " London and the capital of England", " the", "."]


def by_hand(model: Any, token_ids: Sequence[int], start: int, source: Sequence[int] | None = None) -> list[float]:
    """Return the float32 log-softmax of plain transformers' logits at the tokens from `start` on, of one text."""
    read = torch.tensor([list(token_ids[:-1])])
    inputs = {"input_ids": read} if source is None else {"input_ids": torch.tensor([source]), "decoder_input_ids": read}
    with torch.no_grad():
        logprobs = model(**inputs).logits[0].float().log_softmax(-1)
    return [float(logprobs[place - 1, token_ids[place]]) for place in range(start, len(token_ids))]


def boundary(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], int]:
    """Return the tokens of both, and where the longest beginning ends that the prompt's own tokens share with them."""
    whole, before = tokenizer(prompt + continuation)["input_ids"], tokenizer(prompt)["input_ids"]
    return whole, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, before, strict=False)))


def expected_pair(name: str, prompt: str, continuation: str) -> tuple[list[int], list[float]]:
    """Return the tokens of a continuation and their log-probabilities, by plain transformers."""
    model, tokenizer = reference(name)
    whole, start = boundary(tokenizer, prompt, continuation)
    if not start:
        whole, start = [model.generation_config.bos_token_id, *whole], 1
    return whole[start:], by_hand(model, whole, start)


# Texts


@pytest.mark.parametrize("name", CAUSAL)
def test_a_text_is_scored_as_by_hand(name: str) -> None:
    """Log-probabilities are the log-softmax of the full logits: of all tokens behind a BOS, else from the second on."""
    model, tokenizer = reference(name)
    for text in texts(name):
        ids = tokenizer(text)["input_ids"]
        start = 1  # the BOS, or the first token where there is none
        if name not in ("llama", "mistral", "gemma2", "opt"):
            assert ids[0] != tokenizer.bos_token_id
        if len(ids) < 2:
            continue
        score = wrapper(name).score(text)
        assert list(score.token_ids) == ids[start:]
        assert score.token_logprobs == pytest.approx(by_hand(model, ids, start), **EXACT)
        assert score.logprob == pytest.approx(sum(score.token_logprobs))
        assert score.perplexity == pytest.approx(math.exp(-score.logprob / len(score.tokens)))
        before = tokenizer.decode(ids[:start], skip_special_tokens=True)
        assert before + "".join(score.tokens) == tokenizer.decode(ids, skip_special_tokens=True)
        assert score.text == text


@pytest.mark.parametrize("name", CAUSAL)
def test_batches_equal_singles(name: str) -> None:
    """Texts of all lengths scored together have the log-probabilities they have alone, in the order given."""
    rows = [WORDS * 2, *[text for text in texts(name) if " " in text], WORDS[:20], WORDS]
    together = wrapper(name).score(rows)
    for row, score in zip(rows, together, strict=True):
        alone = wrapper(name).score(row)
        assert (score.text, score.token_ids) == (row, alone.token_ids)
        assert score.token_logprobs == pytest.approx(alone.token_logprobs, **CLOSE)
    assert wrapper(name).score([]) == []
    assert len(wrapper(name).score([rows[0]])) == 1


def test_greedy_says_whether_decoding_would_write_it() -> None:
    """Tokens that greedy decoding writes score as greedy, and with another one among them they do not."""
    generator, tokenizer = wrapper("gpt2"), reference("gpt2")[1]
    tried = 0
    for prompt in [*texts("gpt2"), WORDS, PROMPT]:
        result = generator(prompt, max_new_tokens=3)
        if result.text and tokenizer(prompt + result.text)["input_ids"] == tokenizer(prompt)["input_ids"] + list(
            result.token_ids
        ):
            tried += 1
            assert generator.score(prompt, result.text).greedy is True
            assert generator.score(prompt, f"{result.text} Paris").greedy is False
    assert tried


# The boundary


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma2", "bloom", "opt"])
@pytest.mark.parametrize(
    "prompt, continuation",
    [
        ("The old", " sailor told"),
        ("The old ", "sailor told"),
        ("The old", "sailor"),
        ("The old sail", "or told"),
        ("The old  ", "  sailor"),
        ("The capital of France is", " Paris, and"),
        ("Où est la rivi", "ère?"),
        ("", "The old sailor"),
        ("", " sailor"),
        ("the", "n"),
        ("a\n", "\nb"),
    ],
)
def test_what_a_continuation_is(name: str, prompt: str, continuation: str) -> None:
    """The continuation has the tokens of both texts as one that the prompt alone does not begin with."""
    token_ids, logprobs = expected_pair(name, prompt, continuation)
    score = wrapper(name).score(prompt, continuation)
    assert list(score.token_ids) == token_ids
    assert score.token_logprobs == pytest.approx(logprobs, **EXACT)
    assert score.text == continuation


def test_a_token_across_the_boundary_is_the_continuations() -> None:
    """A merge of the prompt's last characters with the continuation's first ones is scored; so are leading spaces."""
    generator = wrapper("gpt2")
    assert generator.score("The ol", "d sailor").tokens[0] == "ld"
    assert generator.score("The old", " sailor").tokens[0] == " sa"
    assert generator.score("The old ", "sailor").tokens[0] == " sa"  # the space was a token of the prompt alone


@given(st.text(alphabet="The old sailor,\n é😀", min_size=1, max_size=30), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_a_divided_text_scores_as_the_whole(text: str, at: int) -> None:
    """Wherever a text is divided, the tokens behind the boundary are scored as they are in the whole text."""
    prompt, continuation = text[:at], text[at:]
    whole, start = boundary(reference("llama")[1], prompt, continuation)
    if start == len(whole):
        with pytest.raises(lmkit.OptionError, match="has no token to score"):
            wrapper("llama").score(prompt, continuation)
        return
    score = wrapper("llama").score(prompt, continuation)
    assert list(score.token_ids) == whole[start:]
    assert score.token_logprobs == pytest.approx(by_hand(reference("llama")[0], whole, start), **CLOSE)


def test_special_tokens_at_the_end_are_not_scored(tmp_path: Path) -> None:
    """Where a tokenizer puts an EOS behind texts, it stands neither between prompt and continuation nor at the end."""

    def edit(_model: Any, tokenizer: Any) -> None:
        tokenizer.add_eos_token = True

    generator = checkpoints.fresh("llama", checkpoints.changed("llama", tmp_path / "llama", edit))
    whole = generator.tokenizer("The old sailor")["input_ids"]  # saved like this, it puts no BOS before a text any more
    assert whole[-1] == generator.tokenizer.eos_token_id
    assert list(generator.score("The old sailor").token_ids) == whole[1:-1]
    prompt = generator.tokenizer("The old")["input_ids"][:-1]
    assert whole[: len(prompt)] == prompt
    assert list(generator.score("The old", " sailor").token_ids) == whole[len(prompt) : -1]


def test_an_empty_prompt_without_a_beginning_token_is_an_error(tmp_path: Path) -> None:
    """Where a checkpoint has no token that begins texts, the error says so, for a prior too."""

    def edit(model: Any, _tokenizer: Any) -> None:
        model.generation_config.bos_token_id = None

    generator = checkpoints.fresh("gpt2", checkpoints.changed("gpt2", tmp_path / "gpt2", edit))
    with pytest.raises(lmkit.OptionError, match="no token that begins a text"):
        generator.score("", "The")
    with pytest.raises(lmkit.OptionError, match=r"normalize='prior'.*neutral=''.*Here that is neutral="):
        generator.rank("The", [" old", " sea"], normalize="prior")
    assert generator.rank("The", [" old", " sea"], normalize="prior", neutral="A").normalize == "prior"


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bloom"])
def test_the_harness_finds_the_same(name: str) -> None:
    """The example's requests give what lm-evaluation-harness itself gives: log-likelihoods, and which are greedy."""
    huggingface: Any = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    instance: Any = pytest.importorskip("lm_eval.api.instance")
    pairs = [
        ("The old", " sailor told"),
        ("The old ", " sailor"),
        ("The capital of France is", " Paris"),
        ("The sail", "or told"),
        ("", "The old sailor"),
        *[(PROMPT, choice) for choice in CHOICES],
    ]
    model, tokenizer = reference(name)
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    requests = [instance.Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    expected = harness.loglikelihood(requests, disable_tqdm=True)
    found = choose_answers.loglikelihood(wrapper(name), pairs)
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], **CLOSE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


# Chats


def test_an_answer_is_scored_behind_the_template() -> None:
    """A chat's prompt has the tokens that a call reads, and the answer those that it has behind the template's end."""
    generator, (model, tokenizer) = wrapper("qwen3"), reference("qwen3")
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, sanitize_control_tokens=True)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompt.count(end) == 1  # the one in the message is plain text
    header = tokenizer("<|im_start|>assistant\nThe old sailor.<|im_end|>", add_special_tokens=False)["input_ids"]
    answer = header[len(tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]) :]
    score = generator.score(CHAT, "The old sailor.<|im_end|>")
    assert list(score.token_ids) == answer
    assert answer[-1] == end
    assert score.token_logprobs == pytest.approx(by_hand(model, prompt + answer, len(prompt)), **EXACT)
    both = generator.score([CHAT, CHAT], ["The old sailor.<|im_end|>", "She"])
    assert both[0].token_logprobs == pytest.approx(score.token_logprobs, **CLOSE)
    assert generator.rank(CHAT, ["She", "He"]).choices[0].score.logprob < 0


def test_a_template_without_special_tokens_is_encoded_with_the_answer(tmp_path: Path) -> None:
    """Where the template ends in plain text, its end and the answer are encoded as one text."""

    def edit(_model: Any, tokenizer: Any) -> None:
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}The old sail"

    generator = checkpoints.fresh("gpt2", checkpoints.changed("gpt2", tmp_path / "gpt2", edit))
    score = generator.score([{"role": "user", "content": "She"}], "or told")
    token_ids, logprobs = expected_pair("gpt2", "She The old sail", "or told")
    assert list(score.token_ids) == token_ids
    assert score.token_logprobs == pytest.approx(logprobs, **EXACT)


# Rows


def test_single_ones_serve_all() -> None:
    """A prompt with several continuations, or several prompts with one, are as many pairs."""
    generator = wrapper("gpt2")
    pairs = [("The", " sea"), ("The", " old"), ("She", " sea")]
    sea, old, she = (generator.score(*pair).logprob for pair in pairs)
    assert [s.logprob for s in generator.score("The", [" sea", " old"])] == pytest.approx([sea, old], **CLOSE)
    assert [s.logprob for s in generator.score(["The", "She"], " sea")] == pytest.approx([sea, she], **CLOSE)
    assert [s.logprob for s in generator.score(["The", "She"], [" old", " sea"])] == pytest.approx([old, she], **CLOSE)
    assert len(generator.score(["The"], [" sea"])) == len(generator.score("The", (" sea",))) == 1
    assert generator.score("The", []) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((["The", "She"], [" a", " b", " c"]), "there are 2 rows and 3 texts to score"),
        (("S",), r"row 0, 'S', has no token to score.*score\(''"),
        (("",), "row 0, '', has no token to score"),
        (("The", ""), "row 0, '', has no token to score"),
        ((3,), "row 0 is 3, not a text"),
        (("The", 3), "row 0 is 3, not a continuation"),
        ((["The", None], " sea"), "row 1 has None, not a text and not a list of messages"),
        ((CHAT,), r"row 0 is \[{.role.: .*…, not a text"),
    ],
)
def test_what_cannot_be_scored_says_why(arguments: Any, words: str) -> None:
    """Rows that are no texts, too few or empty are an OptionError that shows them."""
    with pytest.raises(lmkit.OptionError, match=words):
        wrapper("gpt2").score(*arguments)


@pytest.mark.parametrize("row", [0, 1])
def test_a_text_that_is_too_long_stops_all_before_they_run(row: int) -> None:
    """A text longer than the context raises with both lengths, and nothing is computed."""
    rows = ["The old sailor"] * 2
    rows[row] = WORDS * 10
    count = len(reference("gpt2")[1](rows[row])["input_ids"])
    with (
        checkpoints.forwards(wrapper("gpt2").model.transformer) as seen,
        pytest.raises(lmkit.InputTooLongError, match=f"row {row} has {count} tokens, the model takes 128"),
    ):
        wrapper("gpt2").score(rows)
    with pytest.raises(lmkit.InputTooLongError, match=rf"row {row} has \d+ tokens, the model takes 128"):
        wrapper("gpt2").rank(rows, [" sea"])
    assert seen == []


# Rankings


def brute(name: str, prompt: str, choices: Sequence[str], normalize: str, neutral: str = "") -> list[float]:
    """Return what each choice is ranked by, each pair by itself with plain transformers."""
    values = []
    for choice in choices:
        token_ids, logprobs = expected_pair(name, prompt, choice)
        prior = sum(expected_pair(name, neutral, choice)[1]) if normalize == "prior" else 0.0
        divisor = {"tokens": len(token_ids), "bytes": len(choice.encode())}.get(normalize, 1)
        values.append((sum(logprobs) - prior) / divisor)
    return values


@pytest.mark.parametrize("normalize", ["none", "tokens", "bytes", "prior"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mistral", "mamba", "opt"])
def test_a_ranking_is_that_of_the_pairs(name: str, normalize: str) -> None:
    """Choices are in order of the normalized log-probability each has alone, whatever is read once for all of them."""
    choices = [*CHOICES, " été"]
    values = brute(name, PROMPT, choices, normalize)
    found = wrapper(name).rank(PROMPT, choices, normalize=normalize)
    assert [choice.index for choice in found.choices] == sorted(range(len(choices)), key=lambda n: -values[n])
    assert [c.logprob for c in found.choices] == pytest.approx(sorted(values, reverse=True), **CLOSE)
    assert [choice.text for choice in found.choices] == [choices[choice.index] for choice in found.choices]
    shares = torch.tensor(values, dtype=torch.float64).softmax(0)
    assert [c.probability for c in found.choices] == pytest.approx(
        [float(shares[c.index]) for c in found.choices], abs=1e-4
    )
    assert str(found) == found.choices[0].text
    assert found.normalize == normalize


def test_rankings_of_several_prompts() -> None:
    """Prompts of different lengths with choices of their own are ranked as each alone; one list serves all."""
    generator = wrapper("mistral")
    prompts = [PROMPT, WORDS, "She", PROMPT[:40]]
    lists = [CHOICES, CHOICES[:2], [" was", " a"], CHOICES]
    for found, prompt, choices in zip(generator.rank(prompts, lists), prompts, lists, strict=True):
        values = brute("mistral", prompt, choices, "none")
        assert {c.index: c.logprob for c in found.choices} == pytest.approx(dict(enumerate(values)), **CLOSE)
    same = generator.rank(prompts, CHOICES[:2])
    assert [[c.text for c in r.choices] for r in same] == [
        [c.text for c in generator.rank(prompt, CHOICES[:2]).choices] for prompt in prompts
    ]
    assert generator.rank([], CHOICES) == []


def test_equal_choices_keep_their_order() -> None:
    """Choices of the same log-probability come in the order given."""
    found = wrapper("gpt2").rank("The", [" sea", " old", " sea", " sea"])
    assert [choice.index for choice in found.choices if choice.text == " sea"] == [0, 2, 3]
    assert sum(choice.probability for choice in found.choices) == pytest.approx(1)


def test_a_neutral_prompt_takes_the_prompts_place() -> None:
    """`neutral=` is what stands before the choices for their prior."""
    values = brute("llama", PROMPT, CHOICES, "prior", "The")
    found = wrapper("llama").rank(PROMPT, CHOICES, normalize="prior", neutral="The")
    assert {c.index: c.logprob for c in found.choices} == pytest.approx(dict(enumerate(values)), **CLOSE)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("The", []), r"row 0 has the choices \[\]: pass a list of texts"),
        (("The", " sea"), "row 0 has the choices ' sea': pass a list of texts"),
        ((["The", "She"], [[" a"], []]), r"row 1 has the choices \[\]"),
        ((["The", "She"], [[" a"]]), "there are 1 lists of choices for 2 rows"),
        (("The", [" a", 3]), "row 0 is 3, not a text to choose"),
    ],
)
def test_choices_that_are_none_say_why(arguments: Any, words: str) -> None:
    """Choices that are no lists of texts, or not as many lists as prompts, are an OptionError."""
    with pytest.raises(lmkit.OptionError, match=words):
        wrapper("gpt2").rank(*arguments)


def test_a_wrong_normalization_names_the_nearest() -> None:
    """A word that `normalize=` does not take is an OptionError with those it takes."""
    with pytest.raises(lmkit.OptionError, match=r"normalize='token'.* Did you mean 'tokens'\? Accepted: 'none'"):
        wrapper("gpt2").rank("The", [" a"], normalize="token")


def test_shares_of_impossible_choices_are_numbers() -> None:
    """Choices of probability 0 get a share of 0, and equal ones where there are no others."""
    impossible, likely = (lmkit.Score("a", ("a",), (1,), (value,)) for value in (-math.inf, -1.0))
    shares = [choice.probability for choice in ranking(["a", "b"], [impossible, likely], "none").choices]
    assert shares == [1.0, 0.0]
    assert [c.probability for c in ranking(["a", "b"], [impossible, impossible], "none").choices] == [0.5, 0.5]


# Work


@contextmanager
def read_tokens(model: Any) -> Iterator[list[int]]:
    """List how many tokens, padding included, each pass embeds while the block runs."""
    seen: list[int] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(args[0].numel()))
    try:
        yield seen
    finally:
        handle.remove()


def test_a_shared_prompt_is_read_once() -> None:
    """The tokens of a prompt are embedded once for all its choices, not once for each."""
    generator = wrapper("llama")
    generator.rank("The", [" a"])  # tries the model
    prompt = len(reference("llama")[1](PROMPT)["input_ids"])
    rests = [len(expected_pair("llama", PROMPT, choice)[0]) for choice in CHOICES]
    with read_tokens(generator.model) as seen:
        generator.rank([PROMPT], [CHOICES])
    assert sum(seen) <= prompt - 1 + len(CHOICES) * max(rests)


def test_the_head_runs_a_few_places_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than so many places have scores of the vocabulary at a time, of however many tokens."""
    monkeypatch.setattr(engine_scores, "PLACES", 32)
    generator, sizes = checkpoints.fresh("llama"), []
    handle = generator.model.lm_head.register_forward_hook(
        lambda _m, _a, out: sizes.append(out.numel() // out.shape[-1])
    )
    scores = generator.score([WORDS[n:] for n in range(8)])
    handle.remove()
    tokens = sum(len(score.tokens) for score in scores)
    assert max(sizes) == 32
    assert tokens < sum(sizes) < tokens + 100


def test_batches_are_bounded_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass reads at most a budget of tokens, padding included; a row that is longer has one of its own."""
    monkeypatch.setitem(engine_passes.TOKENS, "cpu", 64)
    generator = checkpoints.fresh("llama")
    rows = [WORDS[: 10 * n] for n in range(1, 9)] * 2
    with read_tokens(generator.model) as seen:
        scores = generator.score(rows)
    assert max(seen) <= 64
    assert [s.logprob for s in scores] == pytest.approx([s.logprob for s in wrapper("llama").score(rows)], **CLOSE)


# Encoder-decoders


def target(name: str, text: str) -> tuple[list[int], int]:
    """Return what the decoder is taught of a target, and the first token that is not told to it."""
    model, tokenizer = reference(name)
    start = model.generation_config.decoder_start_token_id
    if name in checkpoints.PAIRS:
        told = checkpoints.target_token(name)
        ids = [token_id for token_id in tokenizer(text_target=text)["input_ids"] if token_id != told]
        return ([start, *ids], 1) if start == told else ([start, told, *ids], 2)
    ids = tokenizer(text_target=text)["input_ids"]
    return [start, *ids], 2 if name == "bart" else 1  # BART's begin with <s>, which it is forced to write


ANSWERS = ["Le vieux marin raconte une histoire.", "Paris", "The train was late, and we walked home through the rain."]


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_translation_is_scored_as_by_hand(name: str) -> None:
    """Log-probabilities are those of the decoder taught the target: its end token too, its start and language not."""
    model, translator, languages = reference(name)[0], wrapper(name), checkpoints.languages(name)
    sources = texts(name)[:3]
    together = translator.score(sources, ANSWERS, **languages)
    for source, answer, among in zip(sources, ANSWERS, together, strict=True):
        ids, start = target(name, answer)
        expected = by_hand(model, ids, start, checkpoints.encoded(name, source))
        score = translator.score(source, answer, **languages)
        assert list(score.token_ids) == ids[start:]
        assert score.token_ids[-1] in checkpoints.ends(model)
        assert score.token_logprobs == pytest.approx(expected, **EXACT)
        assert among.token_logprobs == pytest.approx(expected, **CLOSE)
        assert among.text == answer


@pytest.mark.parametrize("normalize", ["none", "tokens", "bytes", "prior"])
@pytest.mark.parametrize("name", ["t5", "bart", "m2m100", "marian", "marian_group"])
def test_translations_are_ranked_as_they_score(name: str, normalize: str) -> None:
    """Translations are in order of the normalized log-probability each has alone; an empty text is the prior."""
    model, languages = reference(name)[0], checkpoints.languages(name)
    source = texts(name)[0]
    values = []
    for answer in ANSWERS:
        ids, start = target(name, answer)
        value = sum(by_hand(model, ids, start, checkpoints.encoded(name, source)))
        if normalize == "prior":
            value -= sum(by_hand(model, ids, start, checkpoints.encoded(name, "")))
        values.append(value / {"tokens": len(ids) - start, "bytes": len(answer.encode())}.get(normalize, 1))
    found = wrapper(name).rank(source, ANSWERS, normalize=normalize, **languages)
    assert {c.index: c.logprob for c in found.choices} == pytest.approx(dict(enumerate(values)), **CLOSE)
    assert [c.index for c in found.choices] == sorted(range(len(values)), key=lambda n: -values[n])


def test_a_misspelt_normalize_is_named() -> None:
    """It stands among the options that a ranking of translations takes."""
    with pytest.raises(lmkit.OptionError, match=r"'normalise'\. Did you mean 'normalize'\?"):
        wrapper("marian").rank("Birds fly.", ANSWERS, normalise="tokens")


def test_a_source_is_encoded_once() -> None:
    """The encoder reads each text once for all its translations."""
    translator = wrapper("marian")
    translator.score("Birds fly.", "Paris")  # tries the model
    with checkpoints.forwards(translator.model.model.encoder) as seen:
        translator.rank(texts("marian"), ANSWERS)
    assert sum(len(inputs["input_ids"]) for inputs in seen) == len(texts("marian"))


def test_languages_may_differ_per_row() -> None:
    """Each pair is scored with its own target language."""
    translator = wrapper("m2m100")
    pair = "The train was late.", "Le train est en retard."
    both = translator.score([pair[0]] * 2, [pair[1]] * 2, source="en", target=["fr", "de"])
    alone = [translator.score(*pair, source="en", target=code) for code in ("fr", "de")]
    assert [s.logprob for s in both] == pytest.approx([s.logprob for s in alone], **CLOSE)
    assert alone[0].logprob != pytest.approx(alone[1].logprob, **CLOSE)
    with pytest.raises(lmkit.LanguageError):
        translator.score(*pair, source="en", target="tlh")
    with pytest.raises(lmkit.UnknownOptionError, match="num_beams"):
        translator.score(*pair, source="en", target="fr", num_beams=2)


def test_a_preset_prefixes_the_source() -> None:
    """A translation is scored behind the text as the preset writes it."""
    model, tokenizer = reference("t5")
    source = tokenizer("summarize: Birds fly.")["input_ids"]
    ids, start = target("t5", "Birds")
    score = wrapper("t5").score("Birds fly.", "Birds", preset="summarization")
    assert score.token_logprobs == pytest.approx(by_hand(model, ids, start, source), **EXACT)


@pytest.mark.parametrize("arguments", [(WORDS * 10, "Paris"), ("Paris", WORDS * 10)], ids=["source", "target"])
def test_a_translation_that_is_too_long_is_an_error(arguments: tuple[str, str]) -> None:
    """A source or a target longer than the model takes raises with both lengths."""
    with pytest.raises(lmkit.InputTooLongError, match=r"row 0 has \d+ tokens, the model takes 128"):
        wrapper("bart").score(*arguments)


# Families


def tiny(name: str, **options: Any) -> Any:
    """Make a tiny model of the named class, with weights that matter."""
    ids = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {} if name.startswith(("ProphetNet", "XLNet")) else {
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 128,
    }  # fmt: skip
    model_class = getattr(hf, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**ids | shape | {"hidden_size": 32} | options)).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
TWO_STACKS: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
HEADS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "scaled": ("CohereForCausalLM", {"logit_scale": 0.3}, True),
    "divided": ("GraniteForCausalLM", {"logits_scaling": 3.0}, True),
    "with a bias": ("PhiForCausalLM", {}, True),
    "with a bias, other names": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}, True),
    "with a softcap": ("Gemma3ForCausalLM", {"final_logit_softcapping": 5.0, "head_dim": 8, "sliding_window": 8}, True),
    "experts": ("MixtralForCausalLM", {"num_local_experts": 4, "num_key_value_heads": 2}, True),
    "a decoder of two stacks": ("BartForCausalLM", TWO_STACKS, False),
    "positions from 2 on": ("RobertaForCausalLM", {"is_decoder": True}, False),
    "a state": ("Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}, False),
    "one row at a time": ("RwkvForCausalLM", {"attention_hidden_size": 32}, False),
    "a prefix that depends on its end": (
        "ProphetNetForCausalLM",
        {"decoder_ffn_dim": 64, "num_decoder_layers": 2, "num_decoder_attention_heads": 4, "is_encoder_decoder": False,
         "add_cross_attention": False},
        False,
    ),
}  # fmt: skip


def readings(count: int = 99) -> list[Reading]:
    """Return rows of several lengths, some behind the same beginning."""
    draw = torch.Generator().manual_seed(0)
    numbers = iter(torch.randint(5, count - 4, (1000,), generator=draw).tolist())

    def tokens(many: int) -> tuple[int, ...]:
        return tuple(next(numbers) for _ in range(many))

    beginnings = [tokens(25), tokens(18)]
    rows = [Reading(tokens(many), 1) for many in (2, 5, 9, 30, 9)]
    return rows + [Reading(beginning + tokens(many), len(beginning)) for beginning in beginnings for many in (1, 3, 2)]


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_all_kinds_score_as_by_hand(name: str) -> None:
    """Scalings, biases and softcaps are the model's own; a batch or a shared beginning changes no score."""
    class_name, options, shares = HEADS[name]
    model, rows = tiny(class_name, **options), readings()
    scorer = Scorer(model, 0)
    for row, scored in zip(rows, scorer.score(rows), strict=True):
        assert isinstance(scored, Scored)
        assert scored.logprobs == pytest.approx(by_hand(model, row.token_ids, row.start), abs=1e-5)
    assert scorer._shares == shares


def test_a_model_whose_head_is_not_apart_runs_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no part of a model can be read without the head, all its scores are taken, of few tokens at a time."""
    monkeypatch.setattr(engine_passes, "WHOLE", 99 * 40)

    class Odd(hf.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            outputs = super().forward(input_ids, **kwargs)
            outputs.logits = outputs.logits + 0.1 * self.model.embed_tokens(input_ids)[..., :1].cumsum(1)
            outputs.logits = outputs.logits * (1 + self.model(input_ids).last_hidden_state[..., :1] / 10)
            return outputs

    model, rows = tiny("LlamaForCausalLM"), readings()
    model.__class__ = Odd
    scorer = Scorer(model, 0)
    with read_tokens(model) as seen:
        found = scorer.score(rows)
    assert scorer._reader is not None
    assert scorer._reader.body is None
    assert max(seen) <= 40
    for row, scored in zip(rows, found, strict=True):
        assert isinstance(scored, Scored)
        assert scored.logprobs == pytest.approx(by_hand(model, row.token_ids, row.start), abs=1e-5)


@pytest.mark.parametrize(
    "name, options",
    [("BertLMHeadModel", {}), ("XLNetLMHeadModel", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64})],
)
def test_a_model_that_sees_what_follows_is_refused(name: str, options: dict[str, Any]) -> None:
    """A model whose tokens see those behind them has no log-probability of a text."""
    with pytest.raises(lmkit.OptionError, match="sees what follows a token"):
        Scorer(tiny(name, **options), 0).score(readings())


# Failures


def breaking(model: Any, when: Callable[[torch.Tensor], bool], error: Exception) -> Any:
    """Have the model's embedding raise for some token ids."""

    def hook(_module: Any, arguments: tuple[torch.Tensor]) -> None:
        if when(arguments[0]):
            raise error

    return model.get_input_embeddings().register_forward_pre_hook(hook)


def test_a_row_that_fails_leaves_the_others() -> None:
    """A pass that fails is tried again with half of its rows; a row that fails alone is named, the others are kept."""
    generator = checkpoints.fresh("llama")
    rows = ["The old sailor", "She wrote a letter", "The train was late", "Nobody knew why", "The capital"]
    expected = wrapper("llama").score(rows)
    letter = reference("llama")[1](rows[1])["input_ids"][4]
    generator.score(rows[0])  # tries the model
    handle = breaking(generator.model, lambda ids: bool((ids[:, 4:5] == letter).any()), ValueError("broken"))
    with pytest.raises(lmkit.EngineError, match="row 1: a step of the model failed: ValueError: broken") as raised:
        generator.score(rows)
    handle.remove()
    found = raised.value.results
    assert found[1] is None
    kept = [n for n in range(5) if n != 1]
    for n in kept:
        assert found[n].token_logprobs == pytest.approx(expected[n].token_logprobs, **CLOSE)  # type: ignore[attr-defined]
    assert [s.logprob for s in generator.score(rows)] == pytest.approx([s.logprob for s in expected], **CLOSE)


def test_memory_that_runs_out_takes_fewer_rows() -> None:
    """Where a pass does not fit into memory, fewer rows of it do, of one prompt's choices too."""
    generator = checkpoints.fresh("llama")
    expected = wrapper("llama").rank([PROMPT, WORDS], CHOICES)
    generator.score("The old sailor")
    handle = breaking(generator.model, lambda ids: len(ids) > 2, torch.OutOfMemoryError("no memory"))
    found = generator.rank([PROMPT, WORDS], CHOICES)
    handle.remove()
    for one, other in zip(found, expected, strict=True):
        assert [c.logprob for c in one.choices] == pytest.approx([c.logprob for c in other.choices], **CLOSE)


def test_a_ranking_with_a_row_that_fails_is_none_of_the_results() -> None:
    """The rankings of other prompts are in the error's results."""
    generator = checkpoints.fresh("llama")
    odd = reference("llama")[1]("x", add_special_tokens=False)["input_ids"][-1]
    generator.score("The old sailor")
    breaking(generator.model, lambda ids: bool((ids == odd).any()), ValueError("broken"))
    with pytest.raises(lmkit.EngineError, match="row 1: ") as raised:
        generator.rank(["The", "The", "She"], [[" sea", " a"], [" x", " x a"], [" a", " b"]])
    assert [result is None for result in raised.value.results] == [False, True, False]


def test_scores_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    """A model that gives NaN is told of, with what to load instead."""

    def edit(model: Any, _tokenizer: Any) -> None:
        model.lm_head.weight.data[7] = math.nan

    generator = checkpoints.fresh("llama", checkpoints.changed("llama", tmp_path / "llama", edit))
    with pytest.raises(lmkit.LmkitError):
        generator.score("The old sailor")


def test_closing_ends_scores_and_gives_the_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed model refuses to score, also in the middle of a call, and is not kept alive."""
    monkeypatch.setitem(engine_passes.TOKENS, "cpu", 64)
    generator, seen = checkpoints.fresh("llama"), []
    generator.score("The old sailor")

    def close(_module: Any, _arguments: Any) -> None:
        seen.append(1)
        generator._scores.close()

    handle = generator.model.model.register_forward_pre_hook(close)
    with pytest.raises(lmkit.EngineError, match=r"^the model was closed: load it again to go on") as raised:
        generator.score([WORDS, WORDS * 2, PROMPT])
    handle.remove()
    assert len(seen) == 1
    assert [score is None for score in raised.value.results] == [True, False, True]
    del raised
    gone = weakref.ref(generator.model)
    generator.close()
    gc.collect()
    assert gone() is None
    for call in (generator.score, generator.rank):
        with pytest.raises(lmkit.EngineError, match="was closed"):
            call("The", [" a"])


def test_threads_score_beside_generation() -> None:
    """Scores and completions of threads that run at the same time are those that each has alone."""
    generator = wrapper("llama")
    rows = [WORDS, PROMPT, "The old sailor", "She wrote a letter"]
    scores = [score.logprob for score in generator.score(rows)]
    written = generator("The old sailor", max_new_tokens=20).token_ids
    best = str(generator.rank(PROMPT, CHOICES))
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(5):
            found = [score.logprob for score in generator.score(rows)]
            wrong.extend([found] if found != pytest.approx(scores, **CLOSE) else [])
            again = generator("The old sailor", max_new_tokens=20).token_ids
            wrong.extend([again] if again != written else [])
            wrong.extend([best] if str(generator.rank(PROMPT, CHOICES)) != best else [])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    """Ctrl-C in a pass ends the call, and the next one scores as before."""
    generator = checkpoints.fresh("llama")
    expected = generator.score(PROMPT).token_logprobs
    handle = breaking(generator.model, lambda _ids: True, KeyboardInterrupt())  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        generator.score([PROMPT, WORDS])
    handle.remove()
    assert generator.score(PROMPT).token_logprobs == expected


EMPTY: dict[str, Any] = {
    "llama": lambda model, **how: model.score(["The old sailor", 5, "She wrote"], **how),
    "t5": lambda model, **how: model.score(["The train", None, "Birds"], ["a", "b", "c"], **how),
    "bert": lambda model, **how: model.score(["The old sailor", "", "She [MASK]", "She"], **how),
}
"""Calls with rows that cannot be scored, by the family."""


@pytest.mark.parametrize("name", EMPTY)
def test_a_row_that_cannot_be_scored_is_its_error(name: str) -> None:
    """With `on_error="return"` its error stands in its place and the others are scored; else it stops all of them."""
    found = EMPTY[name](wrapper(name), on_error="return")
    wrong = [number for number, one in enumerate(found) if isinstance(one, lmkit.OptionError)]
    assert wrong == ([1, 2] if name == "bert" else [1])
    assert "row 1" in str(found[1])
    rows = ["The old sailor", "She wrote"] if name == "llama" else ["The old sailor", "She"]
    expected = wrapper("t5").score(["The train", "Birds"], ["a", "c"]) if name == "t5" else wrapper(name).score(rows)
    for one, other in zip((found[0], found[-1]), expected, strict=True):
        assert one.token_logprobs == pytest.approx(other.token_logprobs, **CLOSE)
    with pytest.raises(lmkit.OptionError, match="row 1"):
        EMPTY[name](wrapper(name))
    with pytest.raises(lmkit.OptionError, match="on_error='ignore' is not accepted"):
        EMPTY[name](wrapper(name), on_error="ignore")


@pytest.mark.parametrize("normalize", ["none", "prior"])
def test_rankings_without_choices_leave_the_others(normalize: Any) -> None:
    """A prompt without choices, or with an empty one, is its error; the others are ranked as alone."""
    lists = [[" sea", " a"], [], [" sea", ""], [" a", " the"]]
    found: Any = wrapper("llama").rank(["The"] * 4, lists, normalize=normalize, on_error="return")
    assert [type(one) for one in found] == [lmkit.Ranking, lmkit.OptionError, lmkit.OptionError, lmkit.Ranking]
    for one, row in ((0, lists[0]), (3, lists[3])):
        alone = wrapper("llama").rank("The", row, normalize=normalize)
        assert [choice.text for choice in found[one].choices] == [choice.text for choice in alone.choices]
        assert [c.logprob for c in found[one].choices] == pytest.approx([c.logprob for c in alone.choices], **CLOSE)
    answers: Any = wrapper("t5").rank(["Birds", "Birds"], [["a", "b"], []], normalize=normalize, on_error="return")
    assert [type(one) for one in answers] == [lmkit.Ranking, lmkit.OptionError]
    texts: Any = wrapper("bert").rank([["the sea", ""], ["the", "sea"]], on_error="return")
    assert [type(one) for one in texts] == [lmkit.OptionError, lmkit.Ranking]
    assert "row 0, choice 1" in str(texts[0])


def test_a_pass_that_fails_is_returned_in_its_place() -> None:
    """So is what goes wrong while rows run."""
    generator = checkpoints.fresh("llama")
    odd = reference("llama")[1]("x", add_special_tokens=False)["input_ids"][-1]
    generator.score("The old sailor")
    breaking(generator.model, lambda ids: bool((ids == odd).any()), ValueError("broken"))
    found: Any = generator.score(["The sea", "a x a", "She wrote"], on_error="return")
    assert [type(one) for one in found] == [lmkit.Score, lmkit.EngineError, lmkit.Score]
    alone: Any = generator.score("a x a", on_error="return")
    assert isinstance(alone, lmkit.EngineError)


def test_scores_and_rankings_for_asyncio() -> None:
    """`ascore` and `arank` give what `score` and `rank` give, several at a time."""
    calls = {
        "llama": (("The old sailor",), (["The", "She"], [" a", " sea"])),
        "t5": (("Birds", "a"), ("Birds", ["a", "b"])),
        "bert": ((["The sea", "She"],), (["the sea", "the"],)),
    }

    async def main() -> list[Any]:
        pending = [
            verb(*given)
            for name, both in calls.items()
            for verb, given in zip((wrapper(name).ascore, wrapper(name).arank), both, strict=True)
        ]
        return list(await asyncio.gather(*pending))

    expected = [
        verb(*given)
        for name, both in calls.items()
        for verb, given in zip((wrapper(name).score, wrapper(name).rank), both, strict=True)
    ]
    assert [str(one) for one in asyncio.run(main())] == [str(one) for one in expected]
    with pytest.raises(lmkit.OptionError, match="row 0"):
        asyncio.run(wrapper("bert").ascore(""))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_cancelling_a_score_ends_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its task is cancelled, what is left is not read; other calls are scored as before."""
    monkeypatch.setitem(engine_passes.TOKENS, "cpu", 64)
    model, begun = checkpoints.fresh(name), threading.Event()
    rows = [WORDS + "the " * number for number in range(40)]
    model.score("The old sailor")

    async def main() -> int:
        with checkpoints.forwards(model.model.base_model) as seen:
            handle = model.model.register_forward_pre_hook(lambda *_: begun.set())
            handle = model.model.base_model.register_forward_pre_hook(lambda *_: begun.set())
            task = asyncio.create_task(model.ascore(rows))
            await asyncio.to_thread(begun.wait, 60)
            before = len(seen)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            handle.remove()
            return len(seen) - before

    assert asyncio.run(main()) <= 3
    assert model.score("The old sailor").tokens


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_progress_counts_the_texts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`progress=True` draws a bar as a call does, equal texts counted each; another value is refused."""
    wrapper(name).score(["The old sailor", "She wrote", "She wrote"], progress=True)
    assert "3/3" in capsys.readouterr().err
    wrapper(name).score(["The old sailor", "She wrote"])
    assert capsys.readouterr().err == ""
    with pytest.raises(lmkit.OptionError, match="progress='yes'"):
        wrapper(name).score("The old sailor", progress="yes")


LACKING: dict[str, Any] = {
    "t5": lambda model, text: model.score("Birds", text),
    "marian": lambda model, text: model.score("Birds fly.", text),
    "bert": lambda model, text: model.score(text),
    "xlm_roberta": lambda model, text: model.score(text),
    "gpt2": lambda model, text: model.score("the sea", text),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_the_vocabulary_lacks_is_flagged(name: str, tmp_path: Path) -> None:
    """A score says which of its tokens stand for something unknown, whatever the model is."""
    model = wrapper(name)
    if name == "gpt2":  # its own tokenizer knows every byte
        where = checkpoints.changed(name, tmp_path / name, lambda _model, _tokenizer: None)
        words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "sea": 2}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        hf.TokenizersBackend(tokenizer_object=words, unk_token="<unk>").save_pretrained(where)
        model = checkpoints.fresh(name, where)
    score = LACKING[name](model, " the \u6f22\u5b57 sea")
    unknown = model.tokenizer.unk_token_id
    expected = tuple(n for n, token_id in enumerate(score.token_ids) if token_id == unknown)
    assert score.unknown == expected != ()
    assert score.to_dict()["unknown"] == list(expected)
    assert LACKING[name](model, " the sea").unknown == ()


def test_choices_that_tie_as_unknown_say_so() -> None:
    """Of a ranking each choice has the flag of its score; a vocabulary of bytes lacks nothing."""
    found = {one.text: one.unknown for one in wrapper("t5").rank("Birds", ["\u6f22", "\u5b57", "the sea"]).choices}
    assert (bool(found["\u6f22"]), found["\u6f22"], found["the sea"]) == (True, found["\u5b57"], ())
    assert wrapper("gpt2").score("The", " \u6f22\u5b57").unknown == ()
