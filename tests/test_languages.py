from typing import Any

import pytest

from checkpoints import PAIRS, reference, wrapper
from lmkit.languages import languages_of


@pytest.mark.parametrize("name, count", [("mbart", 25), ("mbart50", 52), ("m2m100", 100), ("nllb", 202)])
def test_all_codes_of_a_family_are_spoken(name: str, count: int) -> None:
    """Every language that transformers lists for a family is one of the checkpoint's, with its own token."""
    model, tokenizer = reference(name)
    found = languages_of(tokenizer, model.config)
    assert found.scheme == "codes"
    assert len(found.codes) == len(set(found.codes.values())) == count
    for code, token_id in found.codes.items():
        token = f"__{code}__" if name == "m2m100" else code
        assert tokenizer.convert_ids_to_tokens(token_id) == token
    assert set(PAIRS[name]) <= set(found.codes)
    assert wrapper(name).languages == tuple(found.codes)


@pytest.mark.parametrize(
    "name, scheme",
    [
        ("t5", "prefixes"),
        ("mt5", "none"),
        ("bart", "none"),
        ("pegasus", "none"),
        ("marian", "none"),
        ("marian_group", "tags"),
    ],
)
def test_the_scheme_of_a_family(name: str, scheme: str) -> None:
    """A family is told its languages by tokens, tags, prefixes or not at all."""
    model, tokenizer = reference(name)
    assert languages_of(tokenizer, model.config).scheme == scheme


def test_codes_that_the_vocabulary_lacks_are_left_out() -> None:
    """A code whose token is unknown is not offered, for it would reach the model as the unknown token."""
    model, tokenizer = reference("m2m100")

    class Lacking:
        """The tokenizer with one more code than its vocabulary has tokens."""

        def __init__(self) -> None:
            self.lang_code_to_token = {**tokenizer.lang_code_to_token, "tlh": "__tlh__"}

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    found = languages_of(Lacking(), model.config)
    assert "tlh" not in found.codes
    assert "fr" in found.codes


@pytest.mark.parametrize("name", ["mbart", "nllb"])
def test_reading_the_languages_does_not_change_the_tokenizer(name: str) -> None:
    """Looking at a tokenizer's languages leaves its source language where it was."""
    model, tokenizer = reference(name)
    before = (tokenizer.src_lang, tokenizer("a b")["input_ids"])
    languages_of(tokenizer, model.config)
    assert (tokenizer.src_lang, tokenizer("a b")["input_ids"]) == before
