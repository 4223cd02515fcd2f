import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import checkpoints
import lmkit
from brute import all_ways, chain, log_probabilities, total
from checkpoints import reference, wrapper

hf: Any = transformers
ORDERS = ["left_to_right", "most_certain"]
WORDS = ["the", "old", "sailor", "and", "water", "light", "bread", "river", "keys", "house", "small", "shop"]
TWO = "the [MASK] river and [MASK] house"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, Any]]:
    """Give a wrapper, the model and the tokenizer of a BERT that knows 50 tokens, special ones included."""
    where = tmp_path_factory.mktemp("fifty")
    fill = [f"word{number}" for number in range(50 - 5 - len(WORDS))]
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    hf.BertTokenizer({token: n for n, token in enumerate([*first, *WORDS, *fill])}).save_pretrained(where)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = hf.BertForMaskedLM(hf.BertConfig(vocab_size=50, max_position_embeddings=64, **sizes))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:  # the usual narrow weights leave all texts alike
                    weight.normal_(std=0.6 if "embeddings" in name else 0.3)
    model.eval().save_pretrained(where)
    with lmkit.load("masked", str(where), "float32", "cpu") as unmasker:
        yield unmasker, *checkpoints.plain("masked", where)


def read(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return a text's tokens and the places of its masks."""
    row = tokenizer(text.replace("[MASK]", tokenizer.mask_token))["input_ids"]
    return row, [place for place, token_id in enumerate(row) if token_id == tokenizer.mask_token_id]


def same(candidate: Any, found: dict[int, float], order: tuple[int, ...]) -> bool:
    """Say whether a candidate has the log-probabilities and the order of a chain."""
    expected = [found[place] for place in sorted(found)]
    return candidate.order == order and candidate.token_logprobs == pytest.approx(expected, rel=1e-5, abs=2e-5)


# By search


@pytest.mark.parametrize("order", ORDERS)
def test_two_masks_rank_as_by_brute_force(small: tuple[Any, Any, Any], order: str) -> None:
    """All 2500 pairs of a vocabulary of 50 come in the order of the chain rule, with its probabilities."""
    unmasker, model, tokenizer = small
    row, places = read(tokenizer, TWO)
    ways = all_ways(model, row, places, range(50), order)
    result = unmasker(TWO, top_k=2500, num_beams=50, order=order)
    assert {candidate.token_ids for candidate in result.candidates} == ways.keys()
    expected = sorted((total(found) for found, _ in ways.values()), reverse=True)
    assert [candidate.logprob for candidate in result.candidates] == pytest.approx(expected, abs=5e-5)
    assert all(same(candidate, *ways[candidate.token_ids]) for candidate in result.candidates)
    assert math.fsum(candidate.score for candidate in result.candidates) == pytest.approx(1, abs=1e-4)


def test_both_orders_of_filling_occur_and_are_told(small: tuple[Any, Any, Any]) -> None:
    """Among texts some are filled from the right, and then their candidates say so."""
    unmasker, model, tokenizer = small
    texts = [TWO, "[MASK] and [MASK]", "old [MASK] small [MASK] keys", "[MASK] light [MASK] bread water"]
    texts += ["the [MASK] old [MASK]", "water [MASK] [MASK] keys", "[MASK] shop river [MASK]", "[MASK] [MASK] house"]
    orders = []
    for text, result in zip(texts, unmasker(texts, order="most_certain"), strict=True):
        row, places = read(tokenizer, text)
        surest = log_probabilities(model, [row])[0, places].max(-1).values
        orders.append(int(surest.argmax()))
        assert {candidate.order[0] for candidate in result.candidates} == {orders[-1]}
    assert set(orders) == {0, 1}


def test_three_masks_rank_as_by_brute_force(small: tuple[Any, Any, Any]) -> None:
    """With room for all ways of three words at three masks, the surest mask first, per way."""
    unmasker, model, tokenizer = small
    text = "[MASK] old [MASK] and [MASK]"
    words = tokenizer.convert_tokens_to_ids(WORDS[:3])
    row, places = read(tokenizer, text)
    ways = all_ways(model, row, places, words, "most_certain")
    result = unmasker(text, top_k=27, targets=WORDS[:3], order="most_certain")
    assert {candidate.token_ids for candidate in result.candidates} == ways.keys()
    assert all(same(candidate, *ways[candidate.token_ids]) for candidate in result.candidates)
    assert [c.logprob for c in result.candidates] == sorted((c.logprob for c in result.candidates), reverse=True)


@pytest.mark.parametrize("order", ORDERS)
def test_greedy_takes_the_likeliest_token_at_each_mask(small: tuple[Any, Any, Any], order: str) -> None:
    """`num_beams=1`, `temperature=0` and `Greedy()` are a loop of maxima; the last mask has `top_k` candidates."""
    unmasker, model, tokenizer = small
    text = "[MASK] light [MASK] bread [MASK]"
    row, places = read(tokenizer, text)
    left = list(places)
    while left:
        scores = log_probabilities(model, [row])[0]
        place = left[0] if order == "left_to_right" else max(left, key=lambda one: float(scores[one].max()))
        row[place] = int(scores[place].argmax())
        left.remove(place)
    for options in ({"num_beams": 1}, {"temperature": 0}, {"mode": lmkit.Greedy()}):
        result = unmasker(text, order=order, **options)
        assert result.candidates[0].token_ids == tuple(row[place] for place in places)
        last = result.candidates[0].order[-1]
        assert len({way.token_ids[:last] + way.token_ids[last + 1 :] for way in result.candidates}) == 1
        assert len(result.candidates) == 5
        assert result.seed is None


def test_more_beams_than_candidates(small: tuple[Any, Any, Any]) -> None:
    """`num_beams=50` finds the true best way, of which `top_k=1` is given; the guesses are `top_k` too."""
    unmasker, model, tokenizer = small
    row, places = read(tokenizer, TWO)
    ways = all_ways(model, row, places, range(50), "left_to_right")
    result = unmasker(TWO, top_k=1, num_beams=50)
    assert [c.token_ids for c in result.candidates] == [max(ways, key=lambda way: total(ways[way][0]))]
    assert [len(slot.candidates) for slot in result.masks] == [1, 1]


def test_independent_masks_are_read_once(small: tuple[Any, Any, Any]) -> None:
    """`order="independent"` ranks the products of the guesses of `masks`, in one pass."""
    unmasker, model, tokenizer = small
    row, places = read(tokenizer, TWO)
    first, second = log_probabilities(model, [row])[0, places]
    pairs = (first[:, None] + second[None]).flatten()
    best = pairs.topk(20)
    unmasker("the [MASK] river")  # the first call tries out how the model is read
    with checkpoints.forwards(unmasker.model.bert) as seen:
        result = unmasker(TWO, top_k=20, order="independent")
    assert len(seen) == 1
    assert [c.token_ids for c in result.candidates] == [divmod(n, 50) for n in best.indices.tolist()]
    assert [c.logprob for c in result.candidates] == pytest.approx(best.values.tolist(), abs=5e-5)


# By draws


def test_draws_follow_the_joint_distribution(small: tuple[Any, Any, Any]) -> None:
    """Many draws come as often as the chain rule says, duplicates kept, each with its probability and order."""
    unmasker, model, tokenizer = small
    row, places = read(tokenizer, TWO)
    ways = all_ways(model, row, places, range(50), "most_certain")
    count = 3000
    result = unmasker(TWO, top_k=count, sample=True, order="most_certain", seed=7)
    drawn = Counter(candidate.token_ids for candidate in result.candidates)
    assert drawn.total() == count
    assert all(same(candidate, *ways[candidate.token_ids]) for candidate in result.candidates[:50])
    for way, (found, _) in ways.items():
        share = math.exp(total(found))
        assert abs(drawn[way] / count - share) < 5 * math.sqrt(share * (1 - share) / count) + 1e-3


@pytest.mark.parametrize(
    "options", [{"temperature": 0.5}, {"top_p": 0.6}, {"min_p": 0.3}, {"mode": lmkit.Sample(top_k=3)}]
)
def test_draws_are_reshaped(small: tuple[Any, Any, Any], options: dict[str, Any]) -> None:
    """Options of sampling reshape the distribution that is drawn from; probabilities told stay the model's own."""
    unmasker, model, tokenizer = small
    row, (place,) = read(tokenizer, "the [MASK] river")
    own = log_probabilities(model, [row])[0, place]
    shares = (own / options.get("temperature", 1)).softmax(-1)
    ordered = shares.sort(descending=True)
    if "top_p" in options:
        kept = ordered.indices[: int((ordered.values.cumsum(-1) < options["top_p"]).sum()) + 1]
    elif "min_p" in options:
        kept = (shares >= options["min_p"] * shares.max()).nonzero()[:, 0]
    else:
        kept = ordered.indices[: 3 if "mode" in options else 50]
    expected = torch.zeros(50).scatter(0, kept, shares[kept])
    expected /= expected.sum()
    count = 3000
    result = unmasker("the [MASK] river", top_k=count, seed=1, **options)
    drawn = Counter(candidate.token_id for candidate in result.candidates)
    for token_id, share in enumerate(expected.tolist()):
        assert abs(drawn[token_id] / count - share) <= 5 * math.sqrt(share * (1 - share) / count)
    one = result.candidates[0]
    assert one.logprob == pytest.approx(float(own[one.token_id]), abs=2e-5)


def test_draws_among_targets(small: tuple[Any, Any, Any]) -> None:
    """With targets the draw is among them, in proportion to their probabilities."""
    unmasker, model, tokenizer = small
    row, (place,) = read(tokenizer, "the [MASK] river")
    words = tokenizer.convert_tokens_to_ids(WORDS[:4])
    shares = (log_probabilities(model, [row])[0, place][words] / 2).softmax(-1).tolist()
    count = 3000
    result = unmasker("the [MASK] river", targets=WORDS[:4], top_k=count, temperature=2.0, seed=1)
    drawn = Counter(candidate.token_id for candidate in result.candidates)
    for token_id, share in zip(words, shares, strict=True):
        assert abs(drawn[token_id] / count - share) <= 5 * math.sqrt(share * (1 - share) / count)


def test_a_seed_reproduces_a_row(small: tuple[Any, Any, Any]) -> None:
    """The same seed draws the same, in a batch or alone; without one a fresh one is drawn and recorded."""
    unmasker = small[0]
    texts = [TWO, "[MASK] and [MASK]", "old [MASK]"]
    results = unmasker(texts, sample=True, seed=[1, 2, 1])
    for text, seed, result in zip(texts, [1, 2, 1], results, strict=True):
        alone = unmasker(text, sample=True, seed=seed)
        assert [c.token_ids for c in alone.candidates] == [c.token_ids for c in result.candidates]
        assert result.seed == seed
    first, second = (unmasker(TWO, temperature=1.5, top_k=20) for _ in range(2))
    assert first.seed != second.seed
    assert unmasker(TWO, temperature=1.5, top_k=20, seed=first.seed) == first
    state = torch.get_rng_state()
    unmasker(TWO, sample=True)
    assert torch.equal(state, torch.get_rng_state())


# Targets of several tokens

LONGER = {
    "bert": ["the", "old sailor", "sailorsailor", "light"],
    "roberta": ["the", "old sailor", "bakery", "light"],
    "xlm_roberta": ["the", "old sailor", "bakery", "light"],
}


def widened(name: str, text: str, words: list[str], order: str) -> tuple[dict[int, float], tuple[int, ...]]:
    """Score words in the masks of a text, which is written with as many masks as they have tokens.

    The masks behind one that is being filled in are still single.
    """
    model, tokenizer = reference(name)
    row, places = read(tokenizer, text)
    found: dict[int, float] = {}
    told: list[int] = []
    for number, word in enumerate(words):
        place = next(n for n, token_id in enumerate(row) if token_id == tokenizer.mask_token_id)
        tokens = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        row[place : place + 1] = [tokenizer.mask_token_id] * len(tokens)
        some, filled = chain(model, row, {place + n: token for n, token in enumerate(tokens)}, order)
        row[place : place + len(tokens)] = tokens
        told += [len(found) + one - place for one in filled]
        found |= {len(found) + n: some[place + n] for n in range(len(tokens))}
        assert number < len(places)
    return found, tuple(told)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", LONGER)
def test_a_target_of_several_tokens_is_scored_as_their_chain(name: str, order: str) -> None:
    """The mask becomes as many masks as the target has tokens; targets keep their order and their spelling."""
    text, targets = "My friend plays the [MASK] in the evening.", LONGER[name]
    result = wrapper(name)(text, targets=targets, order=order)
    slot = result.masks[0].candidates
    assert [candidate.fills for candidate in slot] == [(word,) for word in targets]
    assert [candidate.token for candidate in slot] == targets
    assert [candidate.text for candidate in slot] == [text.replace("[MASK]", word) for word in targets]
    assert max(len(candidate.token_ids) for candidate in slot) > 1
    for candidate in slot:
        found, filled = widened(name, text, [candidate.token], order)
        assert same(candidate, found, filled)
        assert candidate.logprob == pytest.approx(total(found), abs=5e-5)
        assert candidate.logprob_per_token == pytest.approx(total(found) / len(found), abs=5e-5)
        assert candidate.score == pytest.approx(math.exp(total(found)), rel=1e-3)
        assert len(candidate.tokens) == len(candidate.token_ids) == len(found)
        assert candidate.to_dict()["logprob_per_token"] == candidate.logprob_per_token
    assert sorted(slot, key=lambda one: -one.logprob) == list(result.candidates)


def test_which_of_both_scores_ranks_is_an_option() -> None:
    """`normalize="tokens"` ranks by the mean per token, which can favour a longer target."""
    text, targets = "Birds [MASK].", ["the", "old sailor", "sailorsailor", "light", "and the of", "water water"]
    by_total, by_mean = (wrapper("bert")(text, targets=targets, normalize=how) for how in ("none", "tokens"))
    assert by_total.masks == by_mean.masks
    slot = by_total.masks[0].candidates
    assert list(by_total.candidates) == sorted(slot, key=lambda one: -one.logprob)
    assert list(by_mean.candidates) == sorted(slot, key=lambda one: -one.logprob_per_token)
    assert by_total.candidates != by_mean.candidates


@pytest.mark.parametrize("name", LONGER)
def test_targets_of_several_tokens_in_several_masks(name: str) -> None:
    """Combinations are chains as well: the mask before is filled in, the one behind still single."""
    text = "The [MASK] plays with the [MASK] in the evening."
    targets = LONGER[name][:3]
    result = wrapper(name)(text, targets=targets, top_k=9)
    assert {candidate.fills for candidate in result.candidates} == {(one, two) for one in targets for two in targets}
    for candidate in result.candidates:
        found, filled = widened(name, text, list(candidate.fills), "left_to_right")
        assert same(candidate, found, filled)
        assert candidate.text == f"The {candidate.fills[0]} plays with the {candidate.fills[1]} in the evening."
    assert [c.logprob for c in result.candidates] == sorted((c.logprob for c in result.candidates), reverse=True)
    for number, slot in enumerate(result.masks):
        other = text.replace("[MASK]", "<mask>", 1) if number else text
        assert [c.token for c in slot.candidates] == targets
        assert [c.text.count("[MASK]") for c in slot.candidates] == [1] * 3, other


@pytest.mark.parametrize("normalize", ["none", "tokens"])
def test_independent_targets_of_several_tokens_rank_as_by_brute_force(normalize: Any) -> None:
    """However many are asked for, `order="independent"` gives the best of all combinations, by either score.

    The best mean per token may begin with a word that is none of the best at its own mask.
    """
    targets = ["the", "old sailor", "sailorsailor", "light", "and the of", "water water"]
    for text in ("[MASK] and [MASK]", "The [MASK] [MASK] old [MASK]"):
        fills = [chained(text, mask, targets) for mask in range(text.count("[MASK]"))]
        ways: dict[tuple[str, ...], list[float]] = {}
        for way in itertools.product(targets, repeat=len(fills)):
            ways[way] = [one for slot, word in zip(fills, way, strict=True) for one in slot[word]]
        worth = {way: math.fsum(one) / (len(one) if normalize == "tokens" else 1) for way, one in ways.items()}
        expected = sorted(ways, key=lambda way: -worth[way])
        for top_k in (1, 2, 3, 4, 5, 8, len(ways)):
            result = wrapper("bert")(text, targets=targets, top_k=top_k, order="independent", normalize=normalize)
            assert [candidate.fills for candidate in result.candidates] == expected[:top_k]
            for candidate in result.candidates:
                assert candidate.token_logprobs == pytest.approx(ways[candidate.fills], abs=5e-5)


def chained(text: str, mask: int, words: list[str]) -> dict[str, list[float]]:
    """Return the log-probabilities of each word's tokens at one of a text's masks, the others left as they are."""
    model, tokenizer = reference("bert")
    row, places = read(tokenizer, text)
    place = places[mask]
    found = {}
    for word in words:
        tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
        wide = [*row[:place], *[tokenizer.mask_token_id] * len(tokens), *row[place + 1 :]]
        some, _ = chain(model, wide, {place + n: token for n, token in enumerate(tokens)}, "left_to_right")
        found[word] = [some[place + n] for n in range(len(tokens))]
    return found


def test_a_batch_equals_single_calls() -> None:
    """Rows of different options, lengths and numbers of masks give what each gives alone."""
    texts = ["Birds [MASK].", "The [MASK] of [MASK] is [MASK].", "[MASK] morning the [MASK] opens the small shop."] * 2
    options = {
        "top_k": [3, 4, 5, 2, 1, 6],
        "targets": [None, ["the", "old sailor"], None, ["water", "light", "sailorsailor"], None, None],
        "order": ["left_to_right", "most_certain", "most_certain", None, "independent", None],
        "num_beams": [None, 3, None, 2, None, None],
        "temperature": [None, None, 0.8, None, None, None],
        "seed": 3,
    }
    results = wrapper("bert")(texts, **options)
    for row, (text, result) in enumerate(zip(texts, results, strict=True)):
        own = {name: value[row] if isinstance(value, list) else value for name, value in options.items()}
        alone = wrapper("bert")(text, **own)
        assert [c.token_ids for c in alone.candidates] == [c.token_ids for c in result.candidates]
        for one, other in zip(alone.candidates, result.candidates, strict=True):
            assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=2e-5)
            assert (one.text, one.fills, one.order) == (other.text, other.fills, other.order)
        assert alone.seed == result.seed


# Longer than the model


def window(row: list[int], place: int, width: int, limit: int) -> tuple[list[int], int]:
    """Cut by hand: the special tokens at both ends, and as much on both sides of some places as fits between them."""
    room = limit - 2
    first = min(max(place - (room - width) // 2, 1), len(row) - 1 - room)
    return [row[0], *row[first : first + room], row[-1]], first


@pytest.mark.parametrize("name, limit", [("bert", 128), ("roberta", 126), ("xlm_roberta", 126), ("albert", 128)])
def test_a_mask_of_a_long_text_sees_what_fits_around_it(name: str, limit: int) -> None:
    """Each mask of a long text is filled from its own window, and the slot says which part that is."""
    model, tokenizer = reference(name)
    filler = "the water and the light of the old house " * 15
    text = f"the <mask> {filler}here [MASK] is {filler}and <mask>"
    row, places = read(tokenizer, text.replace("<mask>", "[MASK]"))
    assert len(row) > 2 * limit
    result = wrapper(name)(text, top_k=4)
    for place, slot in zip(places, result.masks, strict=True):
        read_by_hand, first = window(row, place, 1, limit)
        assert len(read_by_hand) == limit
        best = log_probabilities(model, [read_by_hand])[0, place - first + 1].topk(4)
        assert [c.token_id for c in slot.candidates] == best.indices.tolist()
        assert [c.logprob for c in slot.candidates] == pytest.approx(best.values.tolist(), abs=2e-5)
        shown = re.sub(r"<mask>|\[MASK\]", "", text[slot.seen_start : slot.seen_end])
        decoded = tokenizer.decode(read_by_hand, skip_special_tokens=True)
        assert "".join(shown.lower().split()) == "".join(decoded.lower().split())
    assert (result.masks[0].seen_start, result.masks[2].seen_end) == (0, len(text))
    assert 0 < result.masks[1].seen_start < result.masks[1].start < result.masks[1].end < result.masks[1].seen_end


def test_masks_of_a_long_text_are_filled_jointly() -> None:
    """A later mask's window shows what was filled in before, where it reaches that far."""
    model, tokenizer = reference("bert")
    text = "the " * 100 + "[MASK] water [MASK] " + "light " * 100
    row, (first, second) = read(tokenizer, text)
    result = wrapper("bert")(text, top_k=2)
    for candidate in result.candidates:
        cut, start = window(row, first, 1, 128)
        one = log_probabilities(model, [cut])[0, first - start + 1, candidate.token_ids[0]]
        filled = [candidate.token_ids[0] if place == first else token for place, token in enumerate(row)]
        cut, start = window(filled, second, 1, 128)
        two = log_probabilities(model, [cut])[0, second - start + 1, candidate.token_ids[1]]
        assert candidate.token_logprobs == pytest.approx([float(one), float(two)], abs=2e-5)


def test_a_text_that_fits_is_seen_whole() -> None:
    """A text of exactly as many tokens as the model takes, and one without a limit, are seen whole."""
    fitting = "[MASK]" + " the" * 125
    assert len(reference("bert")[1](fitting)["input_ids"]) == 128
    for name, text in (("bert", fitting), ("deberta_v2", "Birds [MASK] " + "the " * 200)):
        (slot,) = wrapper(name)(text).masks
        assert (slot.seen_start, slot.seen_end) == (0, len(text))


def test_a_tokenizer_in_python_knows_what_was_seen() -> None:
    """Without offsets, the part that was seen is found by encoding beginnings of the text."""
    model, tokenizer = reference("xlm")
    assert not tokenizer.is_fast
    limit = wrapper("xlm").plan.context_length
    text = "the water and the light " * 40 + "[MASK]" + " of the old house and the river" * 40
    row, (place,) = read(tokenizer, text)
    cut, first = window(row, place, 1, limit)
    (slot,) = wrapper("xlm")(text).masks
    best = log_probabilities(model, [cut])[0, place - first + 1].topk(5)
    assert [c.token_id for c in slot.candidates] == best.indices.tolist()
    shown = text[slot.seen_start : slot.seen_end].replace("[MASK]", tokenizer.mask_token)
    assert tokenizer(shown)["input_ids"] == cut


def test_a_target_longer_than_the_model_is_an_error() -> None:
    """A target that leaves no room is an OptionError, which shows its beginning."""
    with pytest.raises(
        lmkit.OptionError, match=r"target '[the ]{59}… has 150 tokens, and the model takes 126: choose a shorter"
    ):
        wrapper("bert")("Birds [MASK].", targets=["the " * 150])


# The head


@pytest.mark.parametrize("name", checkpoints.MASKED)
def test_the_head_runs_at_mask_positions_only(name: str) -> None:
    """What is multiplied by the vocabulary's embeddings is as many places as there are masks; the model stays whole."""
    unmasker = wrapper(name)
    texts = ["Birds [MASK].", "The train was [MASK], so we [MASK] home and slept."]
    unmasker(texts[0])
    shapes: list[torch.Size] = []

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        shapes.append(output.shape)

    head = unmasker.model.get_output_embeddings()
    handle = head.register_forward_hook(note)
    unmasker(texts, order="independent")
    assert [shape[:-1].numel() for shape in shapes] == [3]
    row = torch.tensor([reference(name)[1]("the water")["input_ids"]])
    with torch.no_grad():
        logits, expected = unmasker.model(row).logits, reference(name)[0](row).logits
    handle.remove()
    assert torch.allclose(logits, expected, atol=1e-5)


class Mixing(torch.nn.Module):
    """Takes the mean of all places away from each, as no real head does."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what is left."""
        return hidden - hidden.mean(1, keepdim=True)


def test_a_model_whose_head_needs_all_places_runs_whole() -> None:
    """A head that does not give the same scores at chosen places is run at all of them."""
    tokenizer = reference("bert")[1]
    with checkpoints.fresh("bert") as unmasker:
        unmasker.model.cls.predictions.transform.LayerNorm = Mixing()
        for text in ("Birds [MASK].", "The old [MASK] told the [MASK] a story."):
            row, places = read(tokenizer, text)
            for place, slot in zip(places, unmasker(text).masks, strict=True):
                best = log_probabilities(unmasker.model, [row])[0, place].topk(5)
                assert [c.logprob for c in slot.candidates] == pytest.approx(best.values.tolist(), abs=2e-5)
        assert unmasker._scorer._reader.body is None


def test_perceiver_is_filled_in(tmp_path: Path) -> None:
    """Perceiver's body has latent places of its own, and names what it gives otherwise than all others."""
    config = hf.PerceiverConfig(
        d_model=16, d_latents=32, num_latents=8, num_blocks=1, num_self_attends_per_block=1, qk_channels=16,
        v_channels=32, num_self_attention_heads=2, num_cross_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.PerceiverForMaskedLM(config).save_pretrained(tmp_path)
    hf.PerceiverTokenizer(model_max_length=64).save_pretrained(tmp_path)
    model, tokenizer = checkpoints.plain("masked", tmp_path)
    texts = ["so [MASK] e", "a [MASK] and [MASK] more"]
    with lmkit.load("masked", str(tmp_path), "float32", "cpu") as unmasker:
        for text, result in zip(texts, unmasker(texts), strict=True):
            row, places = read(tokenizer, text)
            for place, slot in zip(places, result.masks, strict=True):
                best = log_probabilities(model, [row])[0, place].topk(5)
                assert [c.logprob for c in slot.candidates] == pytest.approx(best.values.tolist(), abs=2e-5)
