"""The reference is a plain forward with all that `tokenizer(text, text_pair)` gives."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

import checkpoints
import lmkit
import tokenizers_tiny as tiny
from checkpoints import reference, wrapper

hf: Any = transformers
FAMILIES = ["bert", "electra", "deberta", "deberta_v2", "roberta", "xlm_roberta", "albert", "distilbert", "xlm"]
PAIRS = [
    ("The old [MASK] told the children a story.", "Birds fly."),
    ("Birds fly.", "The old sailor told the [MASK] a story."),
    ("[MASK] fly.", "water [MASK]"),
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}

TYPES = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
FUNNEL = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1], "num_decoder_layers": 1}


def encoded(tokenizer: Any, *texts: str) -> Any:
    """Return what the tokenizer makes of texts, as tensors."""
    return tokenizer(*(text.replace("[MASK]", tokenizer.mask_token) for text in texts), return_tensors="pt")


def scores(model: Any, inputs: Any) -> torch.Tensor:
    """Return the log-softmax of a plain pass, `(tokens, vocabulary)`."""
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits[0].log_softmax(-1)
    return found


def places(tokenizer: Any, inputs: Any) -> list[int]:
    """Return where the masks are."""
    return [int(place) for place in (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]]


def by_hand(model: Any, tokenizer: Any, *texts: str) -> list[tuple[list[int], list[float]]]:
    """Return per mask the five likeliest tokens and their log-probabilities."""
    inputs = encoded(tokenizer, *texts)
    best = [scores(model, inputs)[place].topk(5) for place in places(tokenizer, inputs)]
    return [(one.indices.tolist(), one.values.tolist()) for one in best]


def check(result: lmkit.Unmasking, expected: Sequence[tuple[list[int], list[float]]]) -> None:
    """Compare the guesses of each mask with the reference."""
    assert len(result.masks) == len(expected)
    for slot, (token_ids, logprobs) in zip(result.masks, expected, strict=True):
        assert [one.token_id for one in slot.candidates] == token_ids
        assert [one.logprob for one in slot.candidates] == pytest.approx(logprobs, rel=2e-5, abs=4e-5)


def told() -> Any:
    """Build a tokenizer whose template gives single texts other types than 0."""
    inner = tiny.wordpiece().backend_tokenizer
    first, second = "[CLS]:2 $A:1 [SEP]:0", "$B:0 [SEP]:2"
    ids = [(token, inner.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    inner.post_processor = TemplateProcessing(single=first, pair=f"{first} {second}", special_tokens=ids)
    named = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return hf.TokenizersBackend(tokenizer_object=inner, mask_token="[MASK]", **named, **TYPES)


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Give per family a wrapper, the model and the tokenizer, whose configuration asks for types."""
    made: dict[str, Any] = {}
    albert = [*tiny.scored(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]), *tiny.unigram()]
    funnel = tiny.numbered(["<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "<s>", "</s>"], tiny.word_pieces())
    of = {
        "funnel": (hf.FunnelTokenizer(funnel, **TYPES), FUNNEL),
        "albert": (
            hf.AlbertTokenizer(albert, mask_token=tiny.mask("[MASK]"), **TYPES),
            {"embedding_size": 16, **SIZES},
        ),
        "bert": (told(), {"type_vocab_size": 3, **SIZES}),
        "roberta": (hf.BertTokenizer(tiny.wordpiece().get_vocab()), {"type_vocab_size": 1, **SIZES}),
    }
    for name, (tokenizer, sizes) in of.items():
        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            config = hf.AutoConfig.for_model(name, vocab_size=len(tokenizer), pad_token_id=0, **sizes)
            model = hf.AutoModelForMaskedLM.from_config(config)
            for weight in model.parameters():
                if weight.ndim > 1:
                    torch.nn.init.normal_(weight, std=0.3)
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name] = lmkit.load("masked", str(folder), "float32", "cpu"), *checkpoints.plain("masked", folder)
    yield made
    for unmasker, _, _ in made.values():
        unmasker.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pair_is_read_as_its_tokenizer_writes_it(name: str) -> None:
    """Masks in either text, or in both, have the guesses of a plain pass, whatever else is in the batch."""
    model, tokenizer = reference(name)
    texts, pairs = zip(*PAIRS, strict=True)
    for result, pair in zip(wrapper(name)(texts, text_pair=list(pairs)), PAIRS, strict=True):
        check(result, by_hand(model, tokenizer, *pair))
    mixed = wrapper(name)(
        ["Birds [MASK].", "Birds [MASK].", "Birds [MASK]."], text_pair=[None, "water", "Birds [MASK]"]
    )
    for result, pair in zip(mixed, [(), ("water",), ("Birds [MASK]",)], strict=True):
        check(result, by_hand(model, tokenizer, "Birds [MASK].", *pair))


@pytest.mark.parametrize("name", ["funnel", "albert", "bert"])
def test_types_are_those_that_the_tokenizer_gives(typed: dict[str, Any], name: str) -> None:
    """Whatever types a tokenizer gives single texts and pairs, as Funnel's 2 for the first token, the model reads."""
    unmasker, model, tokenizer = typed[name]
    for texts in [("The old [MASK] told the children a story.",), *PAIRS]:
        inputs = encoded(tokenizer, *texts)
        assert inputs["token_type_ids"].max() == (len(texts) - 1 if name == "albert" else 2)
        check(unmasker(texts[0], text_pair=None if len(texts) == 1 else texts[1]), by_hand(model, tokenizer, *texts))
        if len(texts) > 1 or name == "bert":  # Funnel counts its first token to both texts
            untyped = scores(model, {key: one for key, one in inputs.items() if key != "token_type_ids"})
            assert (scores(model, inputs) - untyped).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["funnel", "albert", "bert"])
def test_scores_of_texts_have_these_types_too(typed: dict[str, Any], name: str) -> None:
    """Each token's log-probability is that of a plain pass with a mask in its place."""
    unmasker, model, tokenizer = typed[name]
    inputs = encoded(tokenizer, "Birds fly.")
    row, expected = inputs["input_ids"].clone(), []
    for place in range(1, row.shape[1] - 1):
        inputs["input_ids"] = row.clone()
        inputs["input_ids"][0, place] = tokenizer.mask_token_id
        expected.append(float(scores(model, inputs)[place, row[0, place]]))
    assert unmasker.score("Birds fly.").token_logprobs == pytest.approx(expected, rel=2e-5, abs=4e-5)


def test_masks_of_both_texts_are_filled_jointly() -> None:
    """A target's tokens have the type of their mask, and the probabilities of the chain rule."""
    model, tokenizer = reference("bert")
    targets = ["sailorsailor", "water"]
    result = wrapper("bert")("The [MASK] fly.", text_pair="a [MASK].", targets=targets)
    for way in result.candidates:
        first, second = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in way.fills)
        left = [*first, *second]
        assert list(way.token_ids) == left
        masks = [" ".join(["[MASK]"] * len(first)), "[MASK]"]
        expected = []
        inputs = encoded(tokenizer, f"The {masks[0]} fly.", f"a {masks[1]}.")
        for number in range(len(first)):
            place = places(tokenizer, inputs)[0]
            expected.append(float(scores(model, inputs)[place, first[number]]))
            inputs["input_ids"][0, place] = first[number]
        done = inputs["input_ids"][0, : places(tokenizer, inputs)[0]].tolist()
        inputs = encoded(tokenizer, f"The {masks[0]} fly.", f"a {' '.join(['[MASK]'] * len(second))}.")
        inputs["input_ids"][0, : len(done)] = torch.tensor(done)
        for token_id in second:
            place = places(tokenizer, inputs)[0]
            expected.append(float(scores(model, inputs)[place, token_id]))
            inputs["input_ids"][0, place] = token_id
        assert way.token_logprobs == pytest.approx(expected, rel=2e-5, abs=4e-5)
    assert {way.fills for way in result.candidates} <= {(one, other) for one in targets for other in targets}


def test_a_result_has_both_texts() -> None:
    """Texts as given, both filled, and each mask's place in its own."""
    result = wrapper("bert")("Old  [MASK] fly", text_pair="<mask>: a ✈ [MASK].", targets=["water"])
    assert (result.text, result.text_pair) == ("Old  [MASK] fly", "<mask>: a ✈ [MASK].")
    (best,) = result.candidates
    assert (best.text, best.text_pair, best.fills) == ("Old  water fly", "water: a ✈ water.", ("water",) * 3)
    assert str(result) == str(best) == "Old  water fly\nwater: a ✈ water."
    masks = [(slot.in_pair, slot.start, slot.end, slot.seen_start, slot.seen_end) for slot in result.masks]
    assert masks == [(False, 5, 11, 0, 15), (True, 0, 6, 0, 19), (True, 12, 18, 0, 19)]
    alone = result.masks[1].candidates[0]
    assert (alone.text, alone.text_pair) == ("Old  [MASK] fly", "water: a ✈ [MASK].")
    assert {"text_pair", "in_pair"} <= {*result.to_dict(), *result.to_dict()["masks"][0]}
    assert "a ✈" in result._repr_html_()
    single = wrapper("bert")("Old [MASK]")
    assert (single.text_pair, single.candidates[0].text_pair, single.masks[0].in_pair) == (None, None, False)


@pytest.mark.parametrize("verb", ["map", "stream"])
def test_every_verb_takes_a_pair(verb: str) -> None:
    """One text stands behind each that `map` reads; and that a stream is given."""
    texts = ["Birds [MASK].", "The old [MASK]"]
    found = list(getattr(wrapper("bert"), verb)(texts, text_pair="water"))
    for result, text in zip(found, texts, strict=True):
        check(result, by_hand(*reference("bert"), text, "water"))


LONG = "water " * 100


@pytest.mark.parametrize(
    "name, text, options, error, words",
    [
        ("modernbert", "a [MASK]", {"text_pair": "b"}, lmkit.OptionError, "row 0 has a text_pair, .* no special token"),
        ("bert", "a", {"text_pair": "b"}, lmkit.OptionError, "row 0 has no mask: .* Given: 'a' and 'b'"),
        ("bert", "a [MASK]", {"text_pair": 3}, lmkit.OptionError, "text_pair=3 is not accepted: .* takes a text"),
        (
            "bert", f"{LONG}[MASK]", {"text_pair": LONG}, lmkit.InputTooLongError,
            "row 0 has 204 tokens, the model takes 128: a pair is not read in parts; shorten its texts, or leave",
        ),
        (
            "bert", f"{'water ' * 124}[MASK]", {"text_pair": "", "targets": ["water water water water"]},
            lmkit.InputTooLongError, "row 0 has 130 tokens, the model takes 128",
        ),
    ],
)  # fmt: skip
def test_a_pair_that_cannot_be_read_says_why(
    name: str, text: str, options: Any, error: type[Exception], words: str
) -> None:
    """A tokenizer without pairs, a pair without a mask, one that is too long as it is or filled."""
    with pytest.raises(error, match=words):
        wrapper(name)(text, **options)


def test_a_type_that_the_model_lacks_is_refused(typed: dict[str, Any]) -> None:
    """BERT's tokenizer gives the second text type 1, and RoBERTa's embeddings have one type: no index goes too far."""
    unmasker, model, tokenizer = typed["roberta"]
    check(unmasker("a [MASK]"), by_hand(model, tokenizer, "a [MASK]"))
    with pytest.raises(
        lmkit.OptionError, match="the type 1, and the model has the types below 1 only: leave text_pair"
    ):
        unmasker("a [MASK]", text_pair="b")
