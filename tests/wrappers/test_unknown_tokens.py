"""Tokens that a tokenizer has and its model does not: no forward pass sees one, on a device that it would end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import checkpoints
import lmkit

VERBS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "call": ("llama", lambda model: model("She <new>")),
    "score of a text": ("llama", lambda model: model.score("She <new>")),
    "ranked texts": ("llama", lambda model: model.rank("She", ["<new>", "it"])),
    "translation": ("t5", lambda model: model("She <new>")),
    "score of a translation": ("t5", lambda model: model.score("She", "<new>")),
    "source of a score": ("t5", lambda model: model.score("<new>", "She")),
    "masks": ("bert", lambda model: model("<new> [MASK].")),
    "score of a masked model": ("bert", lambda model: model.score("She <new>")),
}


def widened(model: Any, tokenizer: Any) -> None:
    """Give the tokenizer a token that the model has no embedding for."""
    spare = model.get_input_embeddings().num_embeddings - len(tokenizer)
    tokenizer.add_tokens([*(f"<spare {n}>" for n in range(spare)), "<new>"])


@pytest.mark.parametrize("verb", VERBS)
def test_a_token_without_an_embedding_is_refused(verb: str, tmp_path: Path) -> None:
    """By every verb it is an OptionError that names the token, before any forward pass."""
    name, ask = VERBS[verb]
    where = checkpoints.changed(name, tmp_path / name, widened)
    with checkpoints.fresh(name, where) as loaded:
        with checkpoints.forwards(loaded.model) as passes, pytest.raises(lmkit.OptionError, match="the token '<new>'"):
            ask(loaded)
        assert not passes


def test_padding_without_an_embedding_is_not_used(tmp_path: Path) -> None:
    """A token for padding that the model does not know fills no row: what stands there is hidden anyway."""

    def edit(model: Any, tokenizer: Any) -> None:
        tokenizer.add_special_tokens({"pad_token": "<filler>"})
        model.generation_config.pad_token_id = 10**6

    texts = checkpoints.texts("llama")
    with checkpoints.fresh("llama", checkpoints.changed("llama", tmp_path / "llama", edit)) as loaded:
        found = loaded(texts, max_new_tokens=6)
        scores = loaded.score(texts)
    plain = checkpoints.wrapper("llama")
    assert [one.token_ids for one in found] == [one.token_ids for one in plain(texts, max_new_tokens=6)]
    assert [one.logprob for one in scores] == pytest.approx([one.logprob for one in plain.score(texts)], abs=1e-4)
