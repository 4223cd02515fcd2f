import itertools
import math
import re
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import checkpoints
import lmkit
from checkpoints import MASKED, reference, texts, wrapper
from lmkit.engine import Caller

hf: Any = transformers
WORDS = ["the", "a", "in", "of", "was", "and", "water", "light", "train", "that", "he", "on", "is", "to"]
TWO = "The [MASK] of France is [MASK], and London."


@cache
def pipeline(name: str) -> Any:
    """Return transformers' own fill-mask pipeline over the family's checkpoint."""
    model, tokenizer = reference(name)
    return hf.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")


def written(name: str, text: str) -> str:
    """Write a text's masks as the checkpoint does, for the pipeline takes nothing else."""
    return text.replace("[MASK]", reference(name)[1].mask_token)


def named(name: str, count: int) -> dict[str, int]:
    """Return words that are one token of the checkpoint behind a space, and the tokens' ids."""
    tokenizer = reference(name)[1]
    ids = {word: tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in WORDS}
    found = {word: i[0] for word, i in ids.items() if len(i) == 1 and i[0] != tokenizer.unk_token_id}
    assert len(found) >= count
    return dict(list(found.items())[:count])


def log_probabilities(name: str, token_ids: list[int]) -> torch.Tensor:
    """Return the log-softmax of plain transformers' scores for every place of one text."""
    with torch.no_grad():
        scores: torch.Tensor = reference(name)[0](torch.tensor([token_ids])).logits[0]
    return scores.log_softmax(-1)


# One mask


@pytest.mark.parametrize("name", MASKED)
def test_one_mask_is_filled_as_by_the_pipeline(name: str) -> None:
    """Tokens and scores of one mask are those of the fill-mask pipeline, one text at a time."""
    for text in texts(name):
        expected = pipeline(name)(written(name, text), top_k=5)
        result = wrapper(name)(text)
        assert [c.token_id for c in result.candidates] == [e["token"] for e in expected]
        assert [c.score for c in result.candidates] == pytest.approx([e["score"] for e in expected], abs=1e-5)


@pytest.mark.parametrize("name", MASKED)
def test_a_batch_is_filled_as_by_the_pipeline(name: str) -> None:
    """Texts of many lengths in one call get what the pipeline gives each alone, in order."""
    results = wrapper(name)(texts(name), top_k=8)
    for text, result in zip(texts(name), results, strict=True):
        expected = pipeline(name)(written(name, text), top_k=8)
        assert result.text == text
        assert [c.token_id for c in result.masks[0].candidates] == [e["token"] for e in expected]
        assert [c.score for c in result.candidates] == pytest.approx([e["score"] for e in expected], abs=1e-5)


@pytest.mark.parametrize("name", MASKED)
def test_targets_have_the_pipelines_scores(name: str) -> None:
    """`targets=` scores the words given, as the pipeline does; a mask lists them in their order."""
    targets = named(name, 4)
    text = texts(name)[3]
    pieces = reference(name)[1].convert_ids_to_tokens(list(targets.values()))
    expected = {e["token"]: e["score"] for e in pipeline(name)(written(name, text), targets=pieces, top_k=4)}
    result = wrapper(name)(text, targets=list(targets))
    slot = result.masks[0].candidates
    assert [c.token for c in slot] == list(targets)
    assert [c.token_id for c in slot] == list(targets.values())
    assert [c.score for c in slot] == pytest.approx([expected[c.token_id] for c in slot], abs=1e-5)
    best = [c.score for c in result.candidates]
    assert best == sorted(best, reverse=True)
    assert {c.token for c in result.candidates} == set(targets)
    assert [c.text for c in slot] == [text.replace("[MASK]", word) for word in targets]


def test_targets_may_differ_per_row() -> None:
    """A list of lists has the words of each row, and `top_k` may differ too."""
    results = wrapper("bert")(["Birds [MASK].", "He [MASK]."], targets=[["was"], ["the", "is"]], top_k=[1, 1])
    assert [[c.token for c in r.masks[0].candidates] for r in results] == [["was"], ["the", "is"]]
    assert [len(r.candidates) for r in results] == [1, 1]


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_may_be_written_in_any_way(name: str) -> None:
    """`[MASK]`, `<mask>` and the checkpoint's own token mean the same; the result's text is as given."""
    ways = ["[MASK]", "<mask>", reference(name)[1].mask_token]
    results = [wrapper(name)(f"Birds {way} in winter.") for way in ways]
    for way, result in zip(ways, results, strict=True):
        assert result.text == f"Birds {way} in winter."
        assert (result.masks[0].start, result.masks[0].end) == (6, 6 + len(way))
        assert [c.token_id for c in result.candidates] == [c.token_id for c in results[0].candidates]
        assert way not in result.candidates[0].text


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm_roberta", "xlm"])
def test_everything_but_the_mask_stays_as_it_was(name: str) -> None:
    """Case, spaces, line ends and characters the tokenizer does not know survive around the word."""
    left, right = "  The CAPITAL —\tof\n\nParis é  is ", " , don't  you\tKNOW? 你好 "
    word = next(iter(named(name, 1)))
    result = wrapper(name)(f"{left}[MASK]{right}", targets=[word])
    assert result.candidates[0].text == f"{left}{word}{right}"
    free = wrapper(name)(f"{left}[MASK]{right}", top_k=30)
    for candidate in free.candidates:
        assert candidate.text.endswith(right)
        assert candidate.text.startswith(left.rstrip())


def test_a_piece_of_a_word_joins_the_word_before_it() -> None:
    """A WordPiece continuation is written without its `##` and without a space."""
    tokenizer = reference("bert")[1]
    continuing = [i for t, i in tokenizer.get_vocab().items() if t.startswith("##")]
    result = wrapper("bert")("Birds [MASK].", top_k=len(tokenizer))
    found = {c.token_id: c for c in result.candidates}
    assert continuing
    for token_id in continuing[:5]:
        piece = tokenizer.convert_ids_to_tokens(token_id)[2:]
        assert (found[token_id].token, found[token_id].text) == (piece, f"Birds{piece}.")


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_top_k_is_how_many(top_k: int) -> None:
    """`top_k` candidates come, best first, and never more than the vocabulary has."""
    result = wrapper("bert")("Birds [MASK].", top_k=top_k)
    scores = [c.score for c in result.candidates]
    assert len(scores) == len(result.masks[0].candidates) == top_k
    assert scores == sorted(scores, reverse=True)
    everything = wrapper("bert")("Birds [MASK].", top_k=10**6)
    assert sum(c.score for c in everything.candidates) == pytest.approx(1, abs=1e-4)


# Several masks


@pytest.mark.parametrize("name", MASKED)
def test_each_of_several_masks_is_guessed_as_by_the_pipeline(name: str) -> None:
    """`masks[i].candidates` are the pipeline's independent guesses, the other masks left in the text."""
    expected = pipeline(name)(written(name, TWO), top_k=4)
    result = wrapper(name)(TWO, top_k=4)
    assert [(m.start, m.end) for m in result.masks] == [m.span() for m in re.finditer(r"\[MASK\]", TWO)]
    for slot, guesses in zip(result.masks, expected, strict=True):
        assert [c.token_id for c in slot.candidates] == [g["token"] for g in guesses]
        assert [c.score for c in slot.candidates] == pytest.approx([g["score"] for g in guesses], abs=1e-5)
        assert all(c.text.count("[MASK]") == 1 for c in slot.candidates)
        assert all(len(c.tokens) == 1 for c in slot.candidates)


def chained(name: str, text: str, choices: list[int]) -> list[tuple[tuple[int, ...], float]]:
    """Return every way of filling the masks and its probability by the chain rule, best first."""
    tokenizer = reference(name)[1]
    ids = tokenizer(written(name, text))["input_ids"]
    places = [n for n, token_id in enumerate(ids) if token_id == tokenizer.mask_token_id]
    ways = []
    for way in itertools.product(choices, repeat=len(places)):
        row, total = list(ids), 0.0
        for place, token_id in zip(places, way, strict=True):
            total += float(log_probabilities(name, row)[place, token_id])
            row[place] = token_id
        ways.append((way, math.exp(total)))
    return sorted(ways, key=lambda item: -item[1])


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm_roberta", "deberta_v2", "modernbert"])
def test_two_masks_are_filled_by_the_chain_rule(name: str) -> None:
    """With room for all pairs of the targets, candidates are every pair, ranked as by brute force."""
    targets = named(name, 4)
    expected = chained(name, TWO, list(targets.values()))
    result = wrapper(name)(TWO, targets=list(targets), top_k=16)
    assert [c.token_ids for c in result.candidates] == [way for way, _ in expected]
    assert [c.score for c in result.candidates] == pytest.approx([score for _, score in expected], rel=1e-3, abs=1e-7)
    words = {token_id: word for word, token_id in targets.items()}
    for candidate in result.candidates:
        first, second = (words[i] for i in candidate.token_ids)
        assert candidate.text == f"The {first} of France is {second}, and London."
        assert candidate.tokens == (first, second)


def test_three_masks_are_filled_by_the_chain_rule() -> None:
    """Three masks, one of them beside another, are ranked as by brute force."""
    targets = named("bert", 3)
    text = "The [MASK] [MASK] of France is [MASK]."
    expected = chained("bert", text, list(targets.values()))
    result = wrapper("bert")(text, targets=list(targets), top_k=27)
    assert [c.token_ids for c in result.candidates] == [way for way, _ in expected]


def test_ways_are_followed_from_the_best_beginnings() -> None:
    """With `top_k` ways the search keeps the best beginnings, and each score is the chain rule's."""
    result = wrapper("bert")(TWO, top_k=3)
    tokenizer = reference("bert")[1]
    ids = tokenizer(TWO)["input_ids"]
    first, second = (n for n, i in enumerate(ids) if i == tokenizer.mask_token_id)
    beginnings = log_probabilities("bert", ids)[first].topk(3)
    ways = []
    for token_id, score in zip(beginnings.indices.tolist(), beginnings.values.tolist(), strict=True):
        row = [token_id if n == first else i for n, i in enumerate(ids)]
        more = log_probabilities("bert", row)[second].topk(3)
        ways += [
            ((token_id, other), score + s) for other, s in zip(more.indices.tolist(), more.values.tolist(), strict=True)
        ]
    ways = sorted(ways, key=lambda way: -way[1])[:3]
    assert [c.token_ids for c in result.candidates] == [way for way, _ in ways]
    assert [c.score for c in result.candidates] == pytest.approx([math.exp(score) for _, score in ways], abs=1e-6)
    assert result.candidates[0].token == result.candidates[0].tokens[0]
    assert result.candidates[0].token_id == result.candidates[0].token_ids[0]


# Errors


def test_a_text_without_a_mask_is_an_error() -> None:
    """A text with nothing to fill in says which row and how a mask is written."""
    with pytest.raises(lmkit.OptionError, match=r"row 1 has no mask: write \[MASK\] or <mask>.*'No'"):
        wrapper("bert")(["Birds [MASK].", "No"])
    with pytest.raises(lmkit.OptionError, match="row 0 has no mask"):
        wrapper("bert")("")


@pytest.mark.parametrize("name, word", [("bert", "漢字"), ("xlm_roberta", "漢字")])
def test_a_target_that_cannot_be_written_is_an_error(name: str, word: str) -> None:
    """A target that is unknown to the vocabulary is an error that shows it, never its first piece."""
    with pytest.raises(lmkit.OptionError, match=f"the target {word!r} cannot be written with this checkpoint's vocab"):
        wrapper(name)("Birds [MASK].", targets=["the", word])


@pytest.mark.parametrize("word", ["[PAD]", "[MASK]", "the [SEP]"])
def test_a_special_token_is_no_target(word: str) -> None:
    """What the tokenizer reads as a special token is no word to fill in, alone or beside words."""
    with pytest.raises(lmkit.OptionError, match=rf"target '{re.escape(word)}' cannot .* special tokens are no words"):
        wrapper("bert")("Birds [MASK].", targets=["the", word])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"top_k": 0}, "top_k=0 is not accepted"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": True}, "top_k=True"),
        ({"targets": []}, r"targets=\[\] is not accepted"),
        ({"targets": "the"}, "targets='the' is not accepted"),
        ({"targets": [3]}, r"targets=\[3\]"),
        ({"targets": ["the", " "]}, r"targets=\['the', ' '\]"),
        ({"top_k": [1, 2]}, "top_k has 2 values for 1 rows"),
        ({"order": "random"}, "order='random' is not accepted: order takes 'left_to_right', 'most_certain'"),
        ({"normalize": "bytes"}, "normalize='bytes' is not accepted"),
        ({"temperature": -1}, "temperature=-1 is not accepted"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams and temperature contradict"),
        ({"mode": lmkit.Beam(3, length_penalty=2.0)}, "give num_beams alone"),
    ],
)
def test_a_wrong_option_says_what_is_accepted(options: dict[str, Any], words: str) -> None:
    """Values that the options do not take are OptionErrors that show them."""
    with pytest.raises(lmkit.OptionError, match=words):
        wrapper("bert")("Birds [MASK].", **options)


@pytest.mark.parametrize("wrong, right", [("topk", "top_k"), ("target", "targets")])
def test_a_misspelt_option_names_the_nearest(wrong: str, right: str) -> None:
    """An unknown option is a TypeError that names the nearest."""
    with pytest.raises(lmkit.UnknownOptionError, match=f"Did you mean '{right}'"):
        wrapper("bert")("Birds [MASK].", **{wrong: 1})


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    """A checkpoint that cannot write a mask is refused when it is loaded."""

    def edit(_model: Any, tokenizer: Any) -> None:
        tokenizer.mask_token = None

    where = checkpoints.changed("bert", tmp_path / "bert", edit)
    if hf.AutoTokenizer.from_pretrained(where).mask_token is not None:
        (where / "tokenizer_config.json").write_text(
            (where / "tokenizer_config.json").read_text().replace('"[MASK]"', "null")
        )
    with pytest.raises(lmkit.LmkitError, match="no mask token"):
        checkpoints.fresh("bert", where)


def test_scores_that_are_not_finite_fail_their_row_alone() -> None:
    """A text whose scores are NaN is an EngineError that carries the other texts' results."""
    given = ["Birds [MASK].", "The price of bread in [MASK] and London", "He [MASK]."]
    expected = wrapper("bert")(given)

    def spoil(_step: int, logits: torch.Tensor) -> None:
        logits[0, 0] = torch.nan  # the longest text is the first of its batch

    with (
        checkpoints.on_logits(wrapper("bert").model, spoil),
        pytest.raises(lmkit.EngineError, match="no finite score") as caught,
    ):
        wrapper("bert")(given)
    found = [None if r is None else r.candidates[0].text for r in caught.value.results]
    assert found == [expected[0].candidates[0].text, None, expected[2].candidates[0].text]


# Verbs


def test_verbs_give_what_a_call_gives() -> None:
    """`map` and `stream` give the results of a call, in order."""
    expected = wrapper("bert")(texts("bert"))
    assert [r.candidates[0].text for r in wrapper("bert").stream(texts("bert"))] == [
        r.candidates[0].text for r in expected
    ]
    mapped = list(wrapper("bert").map([*texts("bert"), "none"], on_error="return"))
    assert [r.candidates[0].token_id for r in mapped[:-1]] == [r.candidates[0].token_id for r in expected]
    assert isinstance(mapped[-1], lmkit.OptionError)
    assert wrapper("bert")([]) == []


def test_a_map_reads_a_bounded_number_ahead() -> None:
    """An endless iterable is filled as it comes; no more than 256 texts are read beyond those that were given."""
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "Birds [MASK]."

    results = wrapper("bert").map(endless(), top_k=1)
    for taken in range(1, 200):
        assert next(results).text == "Birds [MASK]."
        assert read - taken <= 256
    results.close()


def test_a_call_that_is_cancelled_reads_no_further() -> None:
    """Once its caller has gone, what is left of a call is not read, even inside one round."""
    gone = threading.Event()
    texts = [f"{'the ' * length}[MASK]" for length in range(10, 120)]
    unmasker = wrapper("bert")
    jobs = unmasker._valid(texts, {})
    with checkpoints.forwards(unmasker.model.bert) as seen:
        list(unmasker._run(jobs, Caller()))
        whole = len(seen)
        seen.clear()
        with checkpoints.before_forwards(unmasker.model.bert, lambda _step, _kwargs: gone.set()):
            assert list(unmasker._run(jobs, Caller(cancelled=gone))) != []
        assert (len(seen), whole > 2) == (1, True)


def test_threads_share_a_model() -> None:
    """Calls from several threads at a time get what each gets alone."""
    given = texts("roberta") * 3
    expected = [[c.token_ids for c in r.candidates] for r in wrapper("roberta")(given)]
    found: dict[int, Any] = {}

    def run(number: int) -> None:
        found[number] = [[c.token_ids for c in r.candidates] for r in wrapper("roberta")(given)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), expected)


def test_a_stream_raises_a_rows_error_in_its_place() -> None:
    """A stream gives the results before a row whose scores are NaN, then its error."""

    def spoil(step: int, logits: torch.Tensor) -> None:
        if step == 1:
            logits[:] = torch.nan

    with checkpoints.on_logits(wrapper("bert").model, spoil):
        results = wrapper("bert").stream(["Birds [MASK].", "He [MASK].", "She [MASK]."])
        assert next(results).text == "Birds [MASK]."
        with pytest.raises(lmkit.EngineError, match="no finite score"):
            next(results)


def test_the_text_of_a_result_is_its_best_way() -> None:
    """`str` of a result is the text filled in the best way."""
    result = wrapper("bert")("Birds [MASK].")
    assert str(result) == result.candidates[0].text == str(result.candidates[0])


def test_stats_count_what_rows_read() -> None:
    """What the model is tried on at the first call is not counted; texts are."""
    with checkpoints.fresh("bert") as unmasker:
        unmasker("A [MASK].")
        read = len(unmasker.tokenizer("A [MASK].")["input_ids"])
        assert (unmasker.stats.forwards, unmasker.stats.prompt_tokens) == (1, read)
