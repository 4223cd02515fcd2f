"""The reference is plain transformers, told the language of each token."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import checkpoints
import lmkit
import tokenizers_tiny as tiny

hf: Any = transformers
LANGUAGES = {"en": 0, "fr": 1}
SIZES: dict[str, Any] = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}


@pytest.fixture(scope="module", params=["masked", "causal"])
def xlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Give a task and a checkpoint of XLM with language embeddings that matter."""
    where = tmp_path_factory.mktemp(request.param)
    made = tiny.xlm(where)
    extra = {"causal": True} if request.param == "causal" else {}
    config = hf.XLMConfig(
        vocab_size=len(made), n_langs=2, use_lang_emb=True, lang2id=LANGUAGES, mask_token_id=5, **extra, **SIZES
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.XLMWithLMHeadModel(config)
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.data.normal_(std=0.5)
    model.eval().save_pretrained(where)
    made.save_pretrained(where)
    return request.param, where


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_model_works_in_the_language_that_it_is_told(xlm: tuple[str, Path], language: str) -> None:
    """Fills, scores and greedy tokens are those of the model with `langs` of that language, which differ."""
    task, where = xlm
    model, tokenizer = checkpoints.plain(task, where)
    langs, found = LANGUAGES[language], dict[int, Any]()
    model.requires_grad_(requires_grad=False)
    with lmkit.load(task, str(where), "float32", "cpu", language=language) as loaded:  # type: ignore[call-overload]
        assert language in loaded.plan.reasons["language"]
        if task == "masked":
            for text in ("the [MASK] sea", "the old [MASK] told the children"):
                row = tokenizer(text.replace("[MASK]", tokenizer.mask_token), return_tensors="pt")["input_ids"]
                for number in LANGUAGES.values():
                    logits = model(row, langs=torch.full_like(row, number)).logits[0]
                    found[number] = logits[row[0] == tokenizer.mask_token_id].log_softmax(-1)[0]
                result = loaded(text, top_k=3).candidates
                assert [one.logprob for one in result] == pytest.approx(found[langs].topk(3).values.tolist(), abs=1e-5)
                assert not torch.allclose(found[0], found[1], atol=0.1)
            row = tokenizer("the sea", return_tensors="pt")["input_ids"]
            expected = []
            for place in range(1, row.shape[1] - 1):
                masked = row.clone()
                masked[0, place] = tokenizer.mask_token_id
                scores = model(masked, langs=torch.full_like(row, langs)).logits[0, place].log_softmax(-1)
                expected.append(float(scores[row[0, place]]))
            assert loaded.score("the sea").token_logprobs == pytest.approx(expected, abs=1e-5)
            return
        row = tokenizer("the old sailor told", return_tensors="pt")["input_ids"]
        for number in LANGUAGES.values():
            model.config.lang_id = number
            tokens = model.generate(row, max_new_tokens=8, do_sample=False, pad_token_id=2)[0, row.shape[1] :]
            found[number] = tokens.tolist()
        assert list(loaded("the old sailor told", max_new_tokens=8).token_ids) == found[langs]
        assert found[0] != found[1]


def test_without_a_language_it_is_refused(xlm: tuple[str, Path]) -> None:
    """`load` and `plan` name the languages; so they do for one that the checkpoint lacks."""
    for call in (lmkit.load, lmkit.plan):
        with pytest.raises(lmkit.OptionError, match=r"2 languages, and without one it works in none: .*'en', 'fr'"):
            call(xlm[0], str(xlm[1]), "float32", "cpu")  # type: ignore[operator]
        with pytest.raises(lmkit.OptionError, match=r"language='de' is not one .*: it has 'en', 'fr'"):
            call(xlm[0], str(xlm[1]), "float32", "cpu", language="de")  # type: ignore[operator]


def test_a_model_without_languages_takes_none() -> None:
    """A language that would change nothing is an error; an XLM without language embeddings loads as before."""
    with pytest.raises(lmkit.OptionError, match="the same for all: leave language= out"):
        lmkit.plan("masked", str(checkpoints.folder("bert")), language="en")
    assert "language" not in lmkit.plan("masked", str(checkpoints.folder("xlm"))).reasons


def test_xmod_works_in_a_language(tmp_path: Path) -> None:
    """X-MOD has adapters for each language, and may have a default."""
    made = tiny.roberta()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = hf.XmodConfig(vocab_size=len(made), languages=["en_XX", "fr_XX"], **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.XmodForMaskedLM(config).eval()
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.data.normal_(std=0.3)
    model.requires_grad_(requires_grad=False).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    row = made("the <mask> sea", return_tensors="pt")["input_ids"]
    found = {}
    for number, language in enumerate(("en_XX", "fr_XX")):
        logits = model(row, lang_ids=torch.tensor([number])).logits[0][row[0] == made.mask_token_id][0]
        found[language] = logits.log_softmax(-1).topk(3).values.tolist()
        with lmkit.load("masked", str(tmp_path), "float32", "cpu", language=language) as unmasker:
            fills = unmasker("the <mask> sea", top_k=3).candidates
        assert [one.logprob for one in fills] == pytest.approx(found[language], abs=1e-5)
    assert found["en_XX"] != pytest.approx(found["fr_XX"], abs=1e-3)
    with pytest.raises(lmkit.OptionError, match="'en_XX', 'fr_XX'"):
        lmkit.plan("masked", str(tmp_path))
