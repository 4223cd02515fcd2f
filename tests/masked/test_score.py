from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import checkpoints
import lmkit
import tokenizers_tiny as tiny
from brute import log_probabilities
from checkpoints import reference, wrapper

hf: Any = transformers
FAMILIES = ["bert", "roberta", "albert", "distilbert", "electra", "deberta_v2", "xlm_roberta", "modernbert", "xlm"]
TEXTS = ["The old sailor told the children a story.", "Birds fly.", "sailorsailor, the bakery; water"]
WORLD = "examples/checkpoints/world-bert"


def scored(tokenizer: Any, text: str) -> list[int]:
    """Return the places of a text that are scored: all but those of the special tokens around it."""
    row = tokenizer(text)["input_ids"]
    return [n for n in range(len(row)) if n not in (0, len(row) - 1)]


def by_hand(model: Any, tokenizer: Any, text: str, later: Sequence[Sequence[int]] | None = None) -> list[float]:
    """Mask one token after the other, and with each those named beside it, in rows of one."""
    row, found = tokenizer(text)["input_ids"], []
    for number, place in enumerate(scored(tokenizer, text)):
        hidden = [place, *(later[number] if later else ())]
        masked = [tokenizer.mask_token_id if n in hidden else token for n, token in enumerate(row)]
        found.append(float(log_probabilities(model, [masked])[0, place, row[place]]))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_a_loop_by_hand(name: str) -> None:
    """Each token's log-probability behind a mask, the others given, to 1e-5; a batch equals single calls."""
    model, tokenizer = reference(name)
    scores = wrapper(name).score(TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        expected = by_hand(model, tokenizer, text)
        assert score.token_logprobs == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert score.logprob == pytest.approx(sum(expected), rel=1e-5, abs=1e-4)
        assert list(score.token_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert score.tokens == tuple(tokenizer.decode([token_id]) for token_id in score.token_ids)
        assert (score.text, score.greedy) == (text, None)
        alone = wrapper(name).score(text)
        assert alone.token_logprobs == pytest.approx(score.token_logprobs, rel=1e-5, abs=1e-5)


def test_mpnet_is_scored_as_by_hand(tmp_path: Path) -> None:
    """MPNet, whose positions are relative, as the others."""
    first = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
    tokenizer = hf.MPNetTokenizer(tiny.numbered(first, tiny.word_pieces()))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.MPNetConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
        hf.MPNetForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = checkpoints.plain("masked", tmp_path)
    with lmkit.load("masked", str(tmp_path), "float32", "cpu") as unmasker:
        for text, score in zip(TEXTS, unmasker.score(TEXTS), strict=True):
            assert score.token_logprobs == pytest.approx(by_hand(model, tokenizer, text), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm_roberta", "xlm"])
def test_the_later_tokens_of_a_word_are_masked_too(name: str) -> None:
    """`within_word_l2r` hides what follows in the same word, and nothing else."""
    model, tokenizer = reference(name)
    later: list[list[int]] = []
    words = ["sailorsailor", ",", "the", "bakery", ";", "water"]
    if name == "xlm_roberta":
        words = ["sailorsailor,", "the", "bakery;", "water"]
    text = TEXTS[2]
    row = tokenizer(text)["input_ids"]
    word, length = 0, 0
    groups: list[int] = []
    for piece in tokenizer.convert_ids_to_tokens(row[1:-1]):
        letters = piece.removeprefix("##").removesuffix("</w>").lstrip("Ġ▁")
        groups.append(word)
        length += len(letters)
        if length >= len(words[word]) and letters:
            word, length = word + 1, 0
    assert groups[-1] == len(words) - 1
    assert len(groups) > len(words)
    for number, group in enumerate(groups):
        later.append([1 + n for n in range(number + 1, len(groups)) if groups[n] == group])
    score = wrapper(name).score(text, metric="within_word_l2r")
    assert score.token_logprobs == pytest.approx(by_hand(model, tokenizer, text, later), rel=1e-5, abs=1e-5)
    original = wrapper(name).score(text)
    same = [
        one == pytest.approx(other, abs=2e-5)
        for one, other in zip(score.token_logprobs, original.token_logprobs, strict=True)
    ]
    assert same == [not hidden for hidden in later]


def test_special_tokens_are_read_but_not_scored() -> None:
    """A separator inside a text is not scored; an unknown token is, for it stands for a part of the text."""
    model, tokenizer = reference("bert")
    text = "The old sailor [SEP] 漢 water"
    score = wrapper("bert").score(text)
    row = tokenizer(text)["input_ids"]
    kept = [n for n, token in enumerate(row[1:-1]) if token != tokenizer.sep_token_id]
    assert tokenizer.unk_token_id in score.token_ids
    assert len(kept) == len(row) - 3
    expected = by_hand(model, tokenizer, text)
    assert score.token_logprobs == pytest.approx([expected[n] for n in kept], rel=1e-5, abs=1e-5)


def test_a_long_text_is_scored_with_what_fits_around_each_token() -> None:
    """Texts longer than the model are scored by a window around each token, as by hand."""
    model, tokenizer = reference("bert")
    text = "the water and the light of the old house " * 20
    row, room = tokenizer(text, verbose=False)["input_ids"], 126
    score = wrapper("bert").score(text)
    assert len(score.tokens) == len(row) - 2 > 128
    for place in (1, 2, 63, 64, 65, 100, len(row) - 65, len(row) - 2):
        masked = [tokenizer.mask_token_id if n == place else token for n, token in enumerate(row)]
        first = min(max(place - (room - 1) // 2, 1), len(row) - 1 - room)
        cut = [row[0], *masked[first : first + room], row[-1]]
        expected = log_probabilities(model, [cut])[0, place - first + 1, row[place]]
        assert score.token_logprobs[place - 1] == pytest.approx(float(expected), rel=1e-5, abs=1e-5)


def test_texts_are_ranked_by_their_scores() -> None:
    """`rank` puts the likeliest first; shares are the softmax of what it is normalized to."""
    texts = ["Birds fly.", "The old sailor told the children a story.", "water water"]
    scores = wrapper("bert").score(texts)
    lengths = {
        "none": [1, 1, 1],
        "tokens": [len(score.tokens) for score in scores],
        "bytes": [len(text.encode()) for text in texts],
    }
    for normalize, by in lengths.items():
        values = torch.tensor([score.logprob / length for score, length in zip(scores, by, strict=True)])
        ranking = wrapper("bert").rank(texts, normalize=normalize)
        assert [choice.index for choice in ranking.choices] == values.argsort(descending=True).tolist()
        shares = values.softmax(0)[values.argsort(descending=True)].tolist()
        assert [choice.probability for choice in ranking.choices] == pytest.approx(shares, rel=1e-3)
        assert ranking.normalize == normalize
    several = wrapper("bert").rank([texts, texts[:2]])
    assert several[0] == wrapper("bert").rank(texts)
    assert [choice.text for choice in several[1].choices] == [
        choice.text for choice in several[0].choices if choice.text in texts[:2]
    ]
    with lmkit.load("masked", WORLD, "float32", "cpu") as unmasker:
        facts = [f"The capital of France is {city}." for city in ("lisbon", "paris", "rome")]
        assert str(unmasker.rank(facts)) == facts[1]
        assert str(unmasker.rank(facts, metric="within_word_l2r")) == facts[1]


@pytest.mark.parametrize(
    "texts, options, words",
    [
        ("Birds [MASK].", {}, r"row 0 has a mask, '\[MASK\]', and score takes whole texts"),
        (["Birds", "He <mask>."], {}, "row 1 has a mask, '<mask>'"),
        ("", {}, "row 0, '', has no token to score"),
        (["Birds", 3], {}, "row 1 is 3, not a text"),
        ("Birds", {"metric": "orginal"}, "metric='orginal' is not accepted. Did you mean 'original'"),
    ],
)
def test_what_cannot_be_scored_says_why(texts: Any, options: dict[str, Any], words: str) -> None:
    """Masks, empty texts and wrong options are OptionErrors."""
    with pytest.raises(lmkit.OptionError, match=words):
        wrapper("bert").score(texts, **options)


@pytest.mark.parametrize(
    "texts, normalize, words",
    [
        (["Birds"], "prior", "normalize='prior' is not accepted.* Accepted: 'none', 'tokens', 'bytes'"),
        ([], "none", "pass a list of texts"),
        ("Birds", "none", "pass a list of texts"),
        ([["Birds"], []], "none", "row 1"),
        (["Birds", ""], "none", "row 0, choice 1, '', has no token to score"),
        ([["Birds", "He"], ["He", ""]], "none", "row 1, choice 1, '', has no token to score"),
        ([["Birds", "He"], ["<mask>", "He"]], "none", "row 1, choice 0 has a mask, '<mask>'"),
    ],
)
def test_what_cannot_be_ranked_says_why(texts: Any, normalize: Any, words: str) -> None:
    """There must be a list of texts, and a way of comparing them that needs no prompt."""
    with pytest.raises(lmkit.OptionError, match=words):
        wrapper("bert").rank(texts, normalize=normalize)


def test_a_row_that_fails_leaves_the_others() -> None:
    """A text whose passes fail is an EngineError that carries the other texts' scores."""
    expected = wrapper("bert").score(TEXTS)
    only = (set(expected[1].token_ids) - set(expected[0].token_ids) - set(expected[2].token_ids)).pop()

    def fail(_step: int, kwargs: dict[str, Any]) -> None:
        if (kwargs["input_ids"] == only).any():
            msg = "no such thing"
            raise ValueError(msg)

    with (
        checkpoints.before_forwards(wrapper("bert").model, fail),
        pytest.raises(lmkit.EngineError, match="no such thing") as caught,
    ):
        wrapper("bert").score(TEXTS)
    assert [score and score.text for score in caught.value.results] == [TEXTS[0], None, TEXTS[2]]


def test_a_closed_model_refuses() -> None:
    """After `close` there are no scores."""
    unmasker = checkpoints.fresh("bert")
    unmasker.close()
    for verb in (unmasker.score, unmasker.rank):
        with pytest.raises(lmkit.EngineError, match="was closed"):
            verb(["Birds fly."])
