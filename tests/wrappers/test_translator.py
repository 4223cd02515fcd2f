import copy
import json
import shutil
from functools import cache
from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from checkpoints import PAIRS, SEQ2SEQ, reference, texts, wrapper

CODES = list(PAIRS)


def read_by(name: str, text: str | list[str], **options: Any) -> list[list[int]]:
    """Return the source ids that the encoder reads, padding left out."""
    translator = wrapper(name)
    with checkpoints.forwards(translator.model.get_encoder()) as seen:
        translator(text, max_new_tokens=1, **options)
    ids, mask = seen[0]["input_ids"], seen[0]["attention_mask"]
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("turned", [False, True])
def test_a_source_reads_as_the_tokenizer_writes_it(name: str, *, turned: bool) -> None:
    """The encoder's input is what the tokenizer gives with `src_lang=` set, whatever languages come before."""
    source, target = reversed(PAIRS[name]) if turned else PAIRS[name]
    tokenizer = copy.deepcopy(reference(name)[1])
    tokenizer.src_lang = source
    text = texts(name)[0]
    assert read_by(name, text, source=source, target=target) == [tokenizer(text)["input_ids"]]


@pytest.mark.parametrize("name", CODES)
def test_a_target_is_the_first_token_of_the_decoder(name: str) -> None:
    """The answer begins with the target's token, forced as in `generate`, unless its start token is that already."""
    tokenizer = reference(name)[1]
    source, target = PAIRS[name]
    result = wrapper(name)(texts(name)[0], source=source, target=target, max_new_tokens=6)
    start = reference(name)[0].generation_config.decoder_start_token_id
    assert [start, *result.token_ids].count(checkpoints.target_token(name)) == 1
    assert checkpoints.target_token(name) in (start, result.token_ids[0])
    assert list(result.token_ids) == checkpoints.generated(name, texts(name)[:1], max_new_tokens=6)[0]
    assert (result.source_language, result.target_language) == (source, target)
    assert target not in result.text
    assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", CODES)
def test_languages_may_differ_per_row(name: str) -> None:
    """Each row of a call has its own source and target, and is what it is alone."""
    here, there = PAIRS[name]
    prompts = texts(name)[:3]
    sources, targets = [here, there, here], [there, here, here]
    results = wrapper(name)(prompts, source=sources, target=targets, max_new_tokens=8)
    for prompt, result, source, target in zip(prompts, results, sources, targets, strict=True):
        alone = wrapper(name)(prompt, source=source, target=target, max_new_tokens=8)
        assert result.token_ids == alone.token_ids
        assert (result.source_language, result.target_language) == (source, target)
    assert results[0].token_ids[0] != results[1].token_ids[0]


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_the_tokenizer_is_not_changed(name: str) -> None:
    """Calls in several languages leave the tokenizer's languages, special tokens and post-processor alone."""

    def state(tokenizer: Any) -> Any:
        names = ("src_lang", "tgt_lang", "prefix_tokens", "suffix_tokens", "padding_side")
        fast = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None
        return (
            [copy.deepcopy(getattr(tokenizer, n, None)) for n in names],
            dict(tokenizer.special_tokens_map),
            fast,
            tokenizer("a b")["input_ids"],
        )

    translator = wrapper(name)
    before = state(translator.tokenizer)
    config = translator.model.generation_config.to_dict()
    options = checkpoints.languages(name)
    translator(texts(name)[:2], max_new_tokens=2, **options)
    if name in PAIRS:
        translator("Birds fly.", max_new_tokens=2, source=options["target"], target=options["source"])
    translator(texts(name)[0], max_new_tokens=2, num_beams=2, **checkpoints.languages(name))
    assert state(translator.tokenizer) == before
    assert translator.model.generation_config.to_dict() == config


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("missing", ["source", "target"])
def test_a_missing_language_lists_the_choices(name: str, missing: str) -> None:
    """A checkpoint that is told languages wants both; the error names the missing one and the choices."""
    options = checkpoints.languages(name)
    del options[missing]
    with pytest.raises(lmkit.LanguageError, match=f"needs {missing}=, one of: ") as caught:
        wrapper(name)("Birds fly.", **options)
    assert isinstance(caught.value, ValueError)
    assert all(f"'{code}'" in str(caught.value) for code in PAIRS[name])


@pytest.mark.parametrize(
    "name, wrong, right",
    [
        ("mbart", "fr_X", "fr_XX"),
        ("mbart50", "en_X", "en_XX"),
        ("m2m100", "frr", "fr"),
        ("nllb", "fra_Latin", "fra_Latn"),
        ("t5", "dee", "de"),
        ("marian_group", "frx", "fra"),
    ],
)
@pytest.mark.parametrize("which", ["source", "target"])
def test_a_wrong_language_names_the_nearest(name: str, wrong: str, right: str, which: str) -> None:
    """A language that the checkpoint does not speak is a LanguageError with the nearest and all choices."""
    if (name, which) == ("marian_group", "source"):
        which = "target"  # a Marian group's source is English, which is another error
    default = {"t5": {"source": "en", "target": "de"}}.get(name, checkpoints.languages(name))
    with pytest.raises(lmkit.LanguageError) as caught:
        wrapper(name)("Birds fly.", **(default | {which: wrong}))
    assert f"{which}={wrong!r} is not a language of this checkpoint." in str(caught.value)
    assert f"Did you mean {right!r}?" in str(caught.value)
    assert all(f"'{code}'" in str(caught.value) for code in wrapper(name).languages)


@pytest.mark.parametrize("name", ["bart", "pegasus", "mt5"])
@pytest.mark.parametrize("which", ["source", "target"])
def test_a_checkpoint_that_is_not_told_languages_refuses_them(name: str, which: str) -> None:
    """A model of one job takes no language: passing one is an error, not ignored."""
    assert dict(wrapper(name).languages) == {}
    with pytest.raises(lmkit.LanguageError, match=f"{which}='fr'.*Leave them out"):
        wrapper(name)("Birds fly.", **{which: "fr"})
    result = wrapper(name)("Birds fly.", max_new_tokens=1)
    assert (result.source_language, result.target_language) == (None, None)


def test_marian_groups_are_told_by_a_tag() -> None:
    """The target of a Marian group is the tag `>>fra<<` before the text, by `target=` or by hand."""
    tokenizer = reference("marian_group")[1]
    expected = [tokenizer(">>spa<< Birds fly.")["input_ids"]]
    assert read_by("marian_group", "Birds fly.", target="spa") == expected
    assert read_by("marian_group", ">>spa<< Birds fly.") == expected
    by_hand = wrapper("marian_group")(">>spa<< Birds fly.", max_new_tokens=1)
    assert by_hand.target_language == "spa"
    assert set(wrapper("marian_group").languages) == {"fra", "spa", "ita"}


def test_marian_groups_need_a_target() -> None:
    """A Marian group without a target, or with a tag it does not know, is an error with the choices."""
    with pytest.raises(lmkit.LanguageError, match="needs target=, one of: 'fra', 'spa', 'ita'"):
        wrapper("marian_group")("Birds fly.")
    with pytest.raises(lmkit.LanguageError, match="target='deu' is not a language"):
        wrapper("marian_group")(">>deu<< Birds fly.")


# Presets


def by_task_parameters(task: str, text: str, **changes: Any) -> tuple[list[int], list[int]]:
    """Return a T5's source ids and tokens as `generate` with the checkpoint's task parameters gives them."""
    model, tokenizer = reference("t5")
    values = dict(model.config.task_specific_params[task])
    ids = tokenizer(values.pop("prefix") + text, return_tensors="pt")["input_ids"]
    settings = values | {"do_sample": False} | changes
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return ids[0].tolist(), checkpoints.until_end(found[0, 1:].tolist(), checkpoints.ends(model))


@pytest.mark.parametrize("text", texts("t5")[:2])
def test_a_preset_is_generate_with_the_task_parameters(text: str) -> None:
    """A preset brings its prefix, beams, lengths and penalties, as `generate` with those parameters."""
    read, expected = by_task_parameters("summarization", text)
    result = wrapper("t5")(text, preset="summarization")
    assert list(result.token_ids) == expected
    assert result.generated_tokens >= 29
    assert result.prompt == f"summarize: {text}"
    assert result.source == text
    assert read_by("t5", text, preset="summarization") == [read]


def test_a_pair_of_languages_is_the_preset_of_its_name() -> None:
    """`source="en", target="de"` means `translation_en_to_de`, with the same tokens."""
    text = texts("t5")[0]
    _, expected = by_task_parameters("translation_en_to_de", text, max_length=40)
    by_pair = wrapper("t5")(text, source="en", target="de", max_new_tokens=39)
    by_preset = wrapper("t5")(text, preset="translation_en_to_de", max_new_tokens=39)
    assert list(by_pair.token_ids) == list(by_preset.token_ids) == expected
    assert by_pair.prompt == f"translate English to German: {text}"
    assert (by_pair.source_language, by_pair.target_language) == ("en", "de")


def test_an_explicit_option_wins_over_a_preset() -> None:
    """The mode and the length that the caller gives replace the preset's."""
    text = texts("t5")[0]
    greedy = {"num_beams": 1, "early_stopping": False, "length_penalty": 1.0}
    _, expected = by_task_parameters("summarization", text, max_length=11, min_length=0, **greedy)
    result = wrapper("t5")(text, preset="summarization", num_beams=1, max_new_tokens=10)
    assert list(result.token_ids) == expected
    assert result.completions[0].score is None


PRESETS: dict[str, dict[str, Any]] = {
    "beams": {
        "early_stopping": True, "length_penalty": 2.0, "max_length": 30, "min_length": 12, "no_repeat_ngram_size": 2,
        "num_beams": 4,
    },
    "greedy": {"max_length": 25, "min_length": 10, "repetition_penalty": 1.8, "num_beams": 1},
    "prefixed": {
        "prefix": "birds and ", "num_beams": 3, "length_penalty": 0.1, "early_stopping": "never", "max_length": 20,
    },
    "drawn": {"do_sample": True, "temperature": 0.5, "top_k": 3, "max_length": 20},
    "odd": {"num_beams": 2, "diversity_penalty": 0.5, "num_beam_groups": 2, "max_length": 8, "output_scores": False},
}  # fmt: skip


@cache
def presetting() -> Any:
    """Load a BART whose config names presets."""
    where = checkpoints.ROOT / "bart-presets"
    shutil.copytree(checkpoints.folder("bart"), where)
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config | {"task_specific_params": PRESETS}))
    return checkpoints.fresh("bart", where)


@pytest.mark.parametrize("changes", [{}, {"num_beams": 2}, {"num_beams": 1}], ids=str)
@pytest.mark.parametrize("name", ["beams", "greedy", "prefixed"])
def test_every_value_of_a_preset_is_honoured(name: str, changes: dict[str, Any]) -> None:
    """A preset's prefix, beams, lengths and penalties do what they do in `generate`, also beside other beams."""
    text = texts("bart")[1]
    values = PRESETS[name] | changes
    settings = {key: value for key, value in values.items() if key != "prefix"}
    if values["num_beams"] == 1:
        settings |= {"early_stopping": False, "length_penalty": 1.0}
    expected = checkpoints.generated("bart", [values.get("prefix", "") + text], max_new_tokens=None, **settings)[0]
    result = presetting()(text, preset=name, **changes)
    assert list(result.token_ids) == expected


def test_a_preset_that_draws_samples() -> None:
    """A preset with `do_sample` samples with its temperature, unless the caller chooses a mode."""
    result = presetting()(texts("bart")[1], preset="drawn", seed=3)
    plain = presetting()(texts("bart")[1], temperature=0.5, top_k=3, max_new_tokens=19, seed=3)
    assert result.seed == 3
    assert result.token_ids == plain.token_ids
    assert presetting()("Birds.", preset="drawn", num_beams=1).seed is None


def test_what_a_preset_cannot_have_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Values that lmkit has no option for are named in the log, once per model, those that change nothing left out."""
    for _ in range(2):
        presetting()("Birds.", preset="odd")
        presetting()("Birds.", preset="beams", max_new_tokens=2, min_new_tokens=0)
    words = [record.getMessage() for record in caplog.records if record.name == "lmkit"]
    left = "'diversity_penalty=0.5', 'num_beam_groups=2'"
    assert words == [f"the checkpoint's preset also asks for {left}, which lmkit cannot do: it is left out."]


def test_an_option_of_none_is_not_given() -> None:
    """`max_new_tokens=None` leaves the preset's length, as leaving it out does."""
    ends = [reference("t5")[1].eos_token_id]
    result = wrapper("t5")("Birds.", preset="summarization", num_beams=1, max_new_tokens=None, suppress_tokens=ends)
    assert result.generated_tokens == 199  # its max_length, less the start token


def test_presets_are_listed() -> None:
    """`presets` names what `preset=` takes, and `languages` the codes of its pairs."""
    assert set(wrapper("t5").presets) == {
        "summarization", "translation_en_to_de", "translation_en_to_fr", "translation_en_to_ro",
    }  # fmt: skip
    assert set(wrapper("t5").languages) == {"en", "de", "fr", "ro"}
    assert wrapper("m2m100").presets == ()


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("t5", {"preset": "summarisation"}, "Did you mean 'summarization'?"),
        ("bart", {"preset": "summarization"}, "This checkpoint has: none."),
        ("t5", {"preset": "summarization", "target": "de"}, "preset='summarization' and the language 'de' contradict"),
    ],
)
def test_a_wrong_preset_says_why(name: str, options: dict[str, Any], words: str) -> None:
    """An unknown preset names the nearest; one beside a language names both."""
    with pytest.raises(lmkit.OptionError) as caught:
        wrapper(name)("Birds fly.", **options)
    assert words in str(caught.value)


def test_a_pair_without_a_preset_lists_the_pairs() -> None:
    """A direction that a T5 was not trained for is a LanguageError with those it has."""
    with pytest.raises(lmkit.LanguageError, match=r"'de' to 'fr'.*'translation_en_to_de'") as caught:
        wrapper("t5")("Vögel.", source="de", target="fr")
    assert "summarization" not in str(caught.value)


@pytest.mark.parametrize("which", ["source", "target"])
def test_half_a_pair_is_an_error(which: str) -> None:
    """One language of a T5's pair is not enough, and the error names the other."""
    other = {"source": "target", "target": "source"}[which]
    with pytest.raises(lmkit.LanguageError, match=f"needs {other}="):
        wrapper("t5")("Birds fly.", **{which: "en"})


def test_a_t5_without_languages_reads_the_text_as_it_is() -> None:
    """Without preset and languages the text is the caller's, prefix included."""
    text = "translate English to German: Birds fly."
    assert read_by("t5", text) == [reference("t5")[1](text)["input_ids"]]
    assert wrapper("mt5").presets == ()


# Length


@pytest.mark.parametrize("name", ["bart", "m2m100", "mbart", "marian", "pegasus"])
def test_a_source_longer_than_the_encoder_is_an_error(name: str) -> None:
    """A source that is not to be split and that the encoder cannot take is an InputTooLongError with both lengths."""
    text = "the old sailor " * 60
    length = len(checkpoints.encoded(name, text))
    with pytest.raises(lmkit.InputTooLongError, match=rf"row 0 has {length} tokens.* takes 128\b"):
        wrapper(name)(text, split="none", **checkpoints.languages(name))


@pytest.mark.parametrize("name", ["bart", "m2m100", "mbart", "marian"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_truncated_source_keeps_its_special_tokens(name: str, side: str) -> None:
    """Cutting keeps language and end tokens in place, fills the encoder and says `truncated`."""
    text = " ".join(f"the sailor {n}" for n in range(60))
    whole = checkpoints.encoded(name, text)
    before = {"bart": 1, "m2m100": 1, "mbart": 0, "marian": 0}[name]
    after = {"bart": 1, "m2m100": 1, "mbart": 2, "marian": 1}[name]
    body = whole[before : len(whole) - after]
    room = 128 - before - after
    kept = body[-room:] if side == "left" else body[:room]
    options: dict[str, Any] = checkpoints.languages(name) | {"truncate": side}
    assert read_by(name, text, **options) == [[*whole[:before], *kept, *whole[-after:]]]
    assert wrapper(name)(text, max_new_tokens=1, **options).truncated
    assert not wrapper(name)("Birds fly.", max_new_tokens=1, **options).truncated


def test_a_model_of_relative_positions_takes_any_length() -> None:
    """T5 has no longest input."""
    assert wrapper("t5")("the old sailor " * 100, max_new_tokens=1).prompt_tokens > 200


# Results and verbs


def test_a_translation_says_what_it_came_from() -> None:
    """The result has the source as given, one segment over the whole, and the fields of a generation."""
    result = wrapper("m2m100")("Birds fly.", source="en", target="fr", max_new_tokens=5)
    assert isinstance(result, lmkit.Translation)
    assert result.source == "Birds fly."
    assert [(s.source_start, s.source_end, s.start, s.end) for s in result.segments] == [
        (0, len("Birds fly."), 0, len(result.text))
    ]
    assert str(result) == result.text


@pytest.mark.parametrize("text", ["", " \n\t "])
@pytest.mark.parametrize("name", ["t5", "m2m100", "marian", "marian_group", "bart"])
def test_a_blank_text_stays_blank(name: str, text: str) -> None:
    """The model, which would make something up, does not run; an empty list gives an empty list."""
    told, before = checkpoints.languages(name), wrapper(name).stats.forwards
    for split in ("none", "sentence", None):
        result = wrapper(name)(text, split=split, **told)
        assert (result.text, result.token_ids, result.finish_reason) == (text, (), "eos")
    assert "".join(chunk.text for chunk in wrapper(name).stream(text, split="none", **told)) == text
    assert wrapper(name).stats.forwards == before
    assert wrapper(name)([], **told) == []


def test_a_prefix_alone_leaves_a_text_blank() -> None:
    """A tag or a preset's prefix before nothing is told to nobody: the text stays blank."""
    assert wrapper("marian_group")(">>fra<<  ", split="none").text == ""
    assert wrapper("t5")(" ", preset="summarization").text == " "
    assert wrapper("t5")("summarize:  ", preset="summarization", split="none").text.strip() == ""


def test_streams_and_map_take_languages() -> None:
    """`stream` and `map` translate as a call does."""
    options = {"source": "en", "target": "fr", "max_new_tokens": 8}
    expected = [r.text for r in wrapper("m2m100")(texts("m2m100"), **options)]
    chunks = list(wrapper("m2m100").stream(texts("m2m100"), **options))
    rows = ["".join(c.text for c in chunks if c.index == n) for n in range(len(expected))]
    assert rows == expected
    assert [r.text for r in wrapper("m2m100").map(texts("m2m100"), **options)] == expected


@pytest.mark.parametrize("given", [3, ["fine", None], {"a": "b"}, [["nested"]]], ids=str)
def test_something_else_than_a_text_is_an_error(given: Any) -> None:
    """What is not a text is an OptionError that says which row."""
    with pytest.raises(lmkit.OptionError, match=r"row [01] is .*, not a text"):
        wrapper("t5")(given)
