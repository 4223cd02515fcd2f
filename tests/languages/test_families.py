import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers

import lmkit
import tokenizers_tiny as tiny
from checkpoints import PAIRS, reference, wrapper
from lmkit.languages import Languages, Prepared, languages_of

hf: Any = transformers
TEXT = "Birds fly."


def ids_of(tokenizer: Any, prepared: Prepared) -> list[int]:
    """Return what the encoder reads of a prepared text."""
    if prepared.before is None:
        ids: list[int] = tokenizer(prepared.text)["input_ids"]
        return ids
    body = tokenizer(prepared.text, add_special_tokens=False)["input_ids"]
    return [*prepared.before, *body, *prepared.after]


# Families whose languages are tokens


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
    assert tuple(wrapper(name).languages) == tuple(found.codes)


@cache
def plbart(folder: Path, kind: str) -> Any:
    """Build a PLBart tokenizer of either of its kinds."""
    path = folder / f"{kind}.model"
    path.write_bytes(tiny.sentencepiece_model(tiny.ENGLISH))
    return hf.PLBartTokenizer(str(path), language_codes=kind)


SEAMLESS = ("__eng__", "__fra__", "__cmn__", "__cmn_Hant__", "__arb__")


def seamless() -> Any:
    """Build a SeamlessM4T tokenizer of five languages."""
    tokens, merges = tiny.word_bpe()
    vocab = tiny.numbered(["<pad>", "<unk>", "<s>", "</s>"], tokens, SEAMLESS)
    return hf.SeamlessM4TTokenizer(vocab, merges, additional_special_tokens=list(SEAMLESS))


def legacy_nllb() -> Any:
    """Build an NLLB tokenizer that writes the source language behind the text, as the first ones did."""
    tokens, merges = tiny.word_bpe()
    vocab = tiny.numbered(["<s>", "<pad>", "</s>", "<unk>"], tokens, ["eng_Latn", "fra_Latn"], ["<mask>"])
    return hf.NllbTokenizer(vocab, merges, legacy_behaviour=True)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One tokenizer of each family whose languages are tokens."""
    folder = tmp_path_factory.mktemp("plbart")
    made = {"plbart": plbart(folder, "base"), "plbart_multi": plbart(folder, "multi")}
    made |= {"seamless": seamless(), "nllb_legacy": legacy_nllb()}
    return made | {name: reference(name)[1] for name in PAIRS}


@pytest.mark.parametrize(
    "name, words, codes",
    [
        ("plbart", ("java", "en_XX"), ("java", "en_XX")),
        ("plbart", ("English", "Python"), ("en_XX", "python")),
        ("plbart_multi", ("JavaScript", "__go__"), ("javascript", "go")),
        ("seamless", ("en", "French"), ("eng", "fra")),
        ("seamless", ("ar", "zh-Hant"), ("arb", "cmn_Hant")),
        ("nllb_legacy", ("fr", "en-GB"), ("fra_Latn", "eng_Latn")),
        ("nllb", ("zh-TW", "no"), ("zho_Hant", "nob_Latn")),
        ("mbart", ("ro", "English"), ("ro_RO", "en_XX")),
        ("mbart50", ("français", "pt-BR"), ("fr_XX", "pt_XX")),
        ("m2m100", ("zho_Hans", "fil"), ("zh", "tl")),
    ],
)
def test_a_text_is_written_as_transformers_writes_it(
    tokenizers: dict[str, Any], name: str, words: Sequence[str], codes: Sequence[str]
) -> None:
    """Source ids and first token are those of the tokenizer's own `_build_translation_inputs`."""
    tokenizer = tokenizers[name]
    before = (tokenizer.src_lang, list(tokenizer.prefix_tokens), list(tokenizer.suffix_tokens))
    prepared = languages_of(tokenizer, object()).prepare(TEXT, *words, None)
    assert (tokenizer.src_lang, list(tokenizer.prefix_tokens), list(tokenizer.suffix_tokens)) == before
    found = ids_of(tokenizer, prepared)
    own = copy.deepcopy(tokenizer)
    options = {} if name == "m2m100" else {"return_tensors": None}
    expected = own._build_translation_inputs(TEXT, src_lang=codes[0], tgt_lang=codes[1], **options)
    assert (prepared.source, prepared.target) == tuple(codes)
    assert found == expected["input_ids"]
    assert prepared.forced_bos_token_id == expected["forced_bos_token_id"]


@pytest.mark.parametrize("name, target", [("mbart", "ro_RO"), ("plbart", "java"), ("plbart_multi", "go")])
def test_a_start_token_that_is_the_target_is_not_forced_again(
    tokenizers: dict[str, Any], name: str, target: str
) -> None:
    """A decoder that was taught to start with the language gets it once; another target is still told."""
    known = languages_of(tokenizers[name], object())
    config = hf.GenerationConfig(decoder_start_token_id=known.codes[target])
    found = languages_of(tokenizers[name], object(), config)
    assert known.prepare(TEXT, "en_XX", target, None).forced_bos_token_id == known.codes[target]
    assert found.prepare(TEXT, "en_XX", target, None).forced_bos_token_id is None
    assert found.prepare(TEXT, target, "en_XX", None).forced_bos_token_id == known.codes["en_XX"]


def test_programming_languages_are_no_others(tokenizers: dict[str, Any]) -> None:
    """PLBart's `java` is Java by name, and Javanese is not among its languages."""
    found = languages_of(tokenizers["plbart_multi"], object())
    assert dict(found.names) == {
        "java": "Java", "python": "Python", "en_XX": "English", "javascript": "JavaScript", "php": "PHP",
        "ruby": "Ruby", "go": "Go",
    }  # fmt: skip
    for word in ("Javanese", "jv", "C++"):
        with pytest.raises(lmkit.LanguageError, match="is not a language of this checkpoint"):
            found.prepare(TEXT, word, "python", None)


def test_seamless_translates_text_as_generate_does(tmp_path: Path) -> None:
    """A SeamlessM4T loads as text to text, offers what its generation config writes, and gives `generate`'s tokens."""
    tokenizer = seamless()
    stack = {"layers": 2, "ffn_dim": 64, "attention_heads": 4}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in stack.items()}
    small = {f"t2u_{part}_{name}": 1 for part in ("encoder", "decoder") for name in stack}
    config = hf.SeamlessM4TConfig(
        vocab_size=len(tokenizer), hidden_size=32, max_position_embeddings=128, speech_encoder_layers=1,
        speech_encoder_attention_heads=2, speech_encoder_intermediate_size=16, t2u_vocab_size=50, **sizes, **small,
    )  # fmt: skip
    model = hf.SeamlessM4TForTextToText(config).eval()
    written = {token.strip("_"): tokenizer.convert_tokens_to_ids(token) for token in SEAMLESS[:4]}
    ids = {"bos_token_id": 2, "decoder_start_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    model.generation_config = hf.GenerationConfig(text_decoder_lang_to_code_id=written, **ids)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    translator = lmkit.load("seq2seq", str(tmp_path), "float32", "cpu")
    assert set(translator.languages) == set(written)
    for target, code in (("French", "fra"), ("zh-TW", "cmn_Hant")):
        result = translator(TEXT, source="en", target=target, max_new_tokens=8, suppress_tokens=[3])
        inputs = tokenizer(TEXT, src_lang="eng", return_tensors="pt")
        options = {"max_new_tokens": 7, "suppress_tokens": [3], "do_sample": False, "num_beams": 1}
        expected = model.generate(**inputs, tgt_lang=code, **options)[0, 1:]  # the language's token is no new one there
        assert list(result.token_ids) == expected.tolist()
        assert (result.source_language, result.target_language) == ("eng", code)


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


# Families that are told in words, or not at all


@pytest.mark.parametrize(
    "name, scheme",
    [
        ("t5", "prefixes"),
        ("mt5", "none"),
        ("bart", "none"),
        ("pegasus", "none"),
        ("marian", "pair"),
        ("marian_group", "tags"),
    ],
)
def test_the_scheme_of_a_family(name: str, scheme: str) -> None:
    """A family is told its languages by tokens, tags, prefixes or not at all."""
    model, tokenizer = reference(name)
    assert languages_of(tokenizer, model.config).scheme == scheme


def test_a_pair_is_checked_and_said() -> None:
    """A Marian pair takes its own two languages in any spelling, or none, and the result names them."""
    translator = wrapper("marian")  # en to fr
    assert dict(translator.languages) == {"en": "English", "fr": "French"}
    expected = translator(TEXT, max_new_tokens=4)
    assert (expected.source_language, expected.target_language) == ("en", "fr")
    for source, target in (("en", "fr"), ("English", "fra"), ("eng_Latn", None), (None, "fr-CA")):
        result = translator(TEXT, source=source, target=target, max_new_tokens=4)
        assert (result.source_language, result.target_language) == ("en", "fr")
        assert result.token_ids == expected.token_ids


@pytest.mark.parametrize("options", [{"target": "de"}, {"source": "fr", "target": "en"}, {"source": "Ukrainian"}])
def test_a_pair_refuses_other_languages(options: dict[str, str]) -> None:
    """A Marian pair does not translate from or to any other language: an error that says what it does."""
    with pytest.raises(lmkit.LanguageError, match="is not what this checkpoint translates, which is 'en' to 'fr' only"):
        wrapper("marian")(TEXT, **options)


class Told:
    """A tokenizer that says its pair, or only its name."""

    def __init__(self, **said: Any) -> None:
        self.__dict__ |= {"unk_token_id": 0, "convert_tokens_to_ids": lambda _: 0} | said


@pytest.mark.parametrize(
    "said, pair",
    [
        ({"source_lang": "en", "target_lang": "de"}, ("en", "de")),
        ({"name_or_path": "Helsinki-NLP/opus-mt-en-de"}, ("en", "de")),
        ({"name_or_path": "/hub/models--Helsinki-NLP--opus-mt-tc-big-en-fr/snapshots/1a2b"}, ("en", "fr")),
        ({"name_or_path": "somewhere/else"}, (None, None)),
    ],
)
def test_where_a_pair_is_said(said: dict[str, Any], pair: tuple[str | None, str | None]) -> None:
    """The tokenizer says a Marian's pair, or else its name."""
    assert languages_of(Told(**said), object()).pair == pair


def test_a_group_of_sources_takes_any_language() -> None:
    """Where the source is a group, such as `roa`, any language is taken, by its standard tag; no other word is."""
    found = languages_of(Told(source_lang="roa", target_lang="en"), object())
    assert found.prepare(TEXT, "French", "en", None).source == "fr"
    assert found.prepare(TEXT, None, None, None).source == "roa"
    with pytest.raises(lmkit.LanguageError, match=r"source='Frenchy' is not the code or the name of a language"):
        found.prepare(TEXT, "Frenchy", "en", None)


@pytest.mark.parametrize("word", ["fra", "fr", "French", "français", "fr_XX", ">>fra<<"])
def test_a_marian_group_writes_the_tag(word: str) -> None:
    """The tag before a Marian group's text is the checkpoint's, however the target is spelt."""
    tokenizer = reference("marian_group")[1]
    prepared = languages_of(tokenizer, object()).prepare(TEXT, None, word, None)
    assert ids_of(tokenizer, prepared) == tokenizer(f">>fra<< {TEXT}")["input_ids"]
    assert (prepared.source, prepared.target, prepared.prefix) == ("en", "fra", ">>fra<< ")


def test_a_tag_by_hand_is_read_as_a_target_is() -> None:
    """A tag that stands in the text chooses the target; a target beside it is a contradiction."""
    found = languages_of(reference("marian_group")[1], object())
    by_hand = found.prepare(f" >>fr<<{TEXT}", "en", None, None)
    assert by_hand == found.prepare(TEXT, "en", "fra", None)
    with pytest.raises(lmkit.LanguageError, match=r"'>>fr<<', and target='fra' was given too"):
        found.prepare(f">>fr<< {TEXT}", None, "fra", None)
    with pytest.raises(lmkit.LanguageError, match="is not what this checkpoint translates"):
        found.prepare(TEXT, "de", "fra", None)


MADLAD = ["<2en>", "<2de>", "<2zh>", "<2zh_Latn>", "<2translate>"]


def madlad() -> Languages:
    """Return the languages of a T5 whose vocabulary has MADLAD's tokens."""
    pieces = [*tiny.scored(["<pad>", "</s>", "<unk>"]), *tiny.unigram(), *tiny.scored(MADLAD)]
    return languages_of(hf.T5Tokenizer(pieces, extra_ids=0), object())


def test_madlad_is_told_by_a_token_in_the_text() -> None:
    """MADLAD's languages are its `<2de>` tokens; the source may be left out."""
    found = madlad()
    assert list(found.codes) == ["en", "de", "zh", "zh_Latn"]
    prepared = found.prepare(TEXT, None, "German", None)
    assert (prepared.text, prepared.prefix, prepared.target) == (f"<2de> {TEXT}", "<2de> ", "de")
    assert prepared.source is None
    assert found.prepare(TEXT, "eng", "zh-Latn", None).text == f"<2zh_Latn> {TEXT}"
    assert found.prepare(TEXT, "eng", "de", None).source == "en"
    assert found.prepare(f"<2de> {TEXT}", None, None, None) == prepared
    with pytest.raises(lmkit.LanguageError, match="target='fr' is not a language of this checkpoint"):
        found.prepare(TEXT, None, "fr", None)


def test_a_t5_takes_names_too() -> None:
    """Names choose the prefix that the config has for the pair."""
    model, tokenizer = reference("t5")
    found = languages_of(tokenizer, model.config)
    prepared = found.prepare(TEXT, "English", "Deutsch", None)
    assert prepared == found.prepare(TEXT, "en", "de", None)
    assert (prepared.prefix, prepared.text) == ("translate English to German: ", f"translate English to German: {TEXT}")


@pytest.mark.parametrize(
    "told", [("en", "de", None), (None, None, "translation_en_to_de")], ids=["languages", "preset"]
)
def test_a_prefix_by_hand_is_not_written_twice(told: tuple[str | None, ...]) -> None:
    """A text that begins with the prefix asked for is read once with it; one with another's prefix is an error."""
    model, tokenizer = reference("t5")
    found = languages_of(tokenizer, model.config)
    prefix = "translate English to German: "
    prepared = found.prepare(prefix + TEXT, *told)
    assert ids_of(tokenizer, prepared) == tokenizer(prefix + TEXT)["input_ids"]
    assert prepared == found.prepare(TEXT, *told)
    other = next(name for name in found.presets if name != "translation_en_to_de" and found.presets[name].get("prefix"))
    refused = lmkit.LanguageError if told[0] else lmkit.OptionError
    with pytest.raises(refused, match=f"the prefix of '{other}', but 'translation_en_to_de' is asked for"):
        found.prepare(found.presets[other]["prefix"] + TEXT, *told)


def test_the_prompt_of_a_text_with_its_prefix() -> None:
    """A T5 reads as many tokens of a text with its prefix as transformers writes, and translates what is behind it."""
    folder = str(Path(__file__).parents[2] / "examples" / "checkpoints" / "numbers-t5")
    text = "translate English to German: seventeen"
    with lmkit.load("seq2seq", folder, "float32", "cpu") as translator:
        expected = len(hf.AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
        ways: list[Any] = [{"source": "en", "target": "de"}, {"preset": "translation_en_to_de"}]
        for told in ways:
            for split in ("none", "paragraph", "sentence"):
                result = translator(text, split=split, **told)
                assert (result.prompt_tokens, result.text) == (expected, "siebzehn"), (told, split)


@pytest.mark.parametrize("name", ["t5", "m2m100", "marian", "marian_group", "bart"])
def test_what_is_no_word_is_no_language(name: str) -> None:
    """A number or bytes in the place of a language is a LanguageError, whatever the family."""
    for which, value in (("source", 3), ("target", b"fr")):
        with pytest.raises(lmkit.LanguageError, match=f"{which}={value!r} is not a language: pass a code or a name"):
            languages_of(reference(name)[1], reference(name)[0].config).prepare(TEXT, **{
                "source": None, "target": None, "preset": None, which: value
            })  # fmt: skip


def test_what_is_no_word_is_no_preset() -> None:
    """A number or bytes in the place of a preset is an OptionError, also where there are no presets."""
    for name in ("t5", "m2m100"):
        for value in (3, b"summarization"):
            preset: Any = value
            with pytest.raises(lmkit.OptionError, match=f"preset={value!r} is not accepted: it takes a name"):
                languages_of(reference(name)[1], reference(name)[0].config).prepare(TEXT, None, None, preset)


@pytest.mark.parametrize(
    "word, code",
    [
        ("Francais", "fr"),
        ("francáis", "fr"),
        ("espanol", "es"),
        ("Portugues", "pt"),
        ("Turkce", "tr"),
        ("cestina", "cs"),
    ],
)
def test_accents_may_be_left_out_of_a_name(word: str, code: str) -> None:
    """A name without its accents, or with wrong ones, means what it means with them."""
    found = languages_of(reference("m2m100")[1], object())
    assert found.prepare(TEXT, "en", word, None).target == code


@pytest.mark.parametrize("word", ["tata", "kreyol", "norstina"])
def test_a_name_that_is_two_languages_without_accents_is_none(word: str) -> None:
    """What only accents tell apart is not guessed: `kreyòl` is Haitian, `kréyol` Louisiana Creole."""
    with pytest.raises(lmkit.LanguageError, match="is not a language of this checkpoint"):
        languages_of(reference("m2m100")[1], object()).prepare(TEXT, "en", word, None)


@pytest.mark.parametrize("name, detects", [("m2m100", True), ("t5", True), ("marian_group", False)])
def test_an_unknown_source_mentions_detection_where_there_is_some(name: str, *, detects: bool) -> None:
    """The message of an unknown source ends with 'detect' where that is accepted, that of a target never does."""
    found = languages_of(reference(name)[1], reference(name)[0].config)
    target = next(iter(found.codes))
    for word in ("Detekt", "Detect"):
        with pytest.raises(lmkit.LanguageError) as caught:
            found.prepare(TEXT, word, target, None)
        assert str(caught.value).endswith(", or 'detect'.") == detects
        with pytest.raises(lmkit.LanguageError) as caught:
            found.prepare(TEXT, "en", word, None)
        assert "'detect'" not in str(caught.value)


# Threads


def test_targets_of_eight_threads_stay_apart() -> None:
    """Eight threads that alternate targets on one number translator each get answers in their own language."""
    folder = Path(__file__).parents[2] / "examples" / "checkpoints" / "numbers-m2m100"
    expected = {"German": ("deu_Latn", "siebzehn"), "fr": ("fra_Latn", "dix-sept"), "spa": ("spa_Latn", "diecisiete")}
    with lmkit.load("seq2seq", str(folder), "float32", "cpu") as translator:
        ids = {code: translator.tokenizer.convert_tokens_to_ids(code) for code in translator.languages}

        def translate(thread: int) -> list[tuple[str, Any]]:
            words = [list(expected)[(thread + turn) % len(expected)] for turn in range(6)]
            return [(word, translator("seventeen", source="en", target=word)) for word in words]

        with ThreadPoolExecutor(8) as pool:
            found = [pair for pairs in pool.map(translate, range(8)) for pair in pairs]
        assert len(found) == 48
        for word, result in found:
            code, text = expected[word]
            assert (result.target_language, result.token_ids[0], result.text) == (code, ids[code], text)
        mixed = translator(["seventeen"] * 3, source="English", target=list(expected))
        assert [result.text for result in mixed] == [text for _, text in expected.values()]
