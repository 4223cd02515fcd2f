import subprocess
import sys
from typing import Any

import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier

import lmkit
from checkpoints import reference, wrapper
from lmkit.languages import languages_of
from lmkit.languages.detect import Detector
from lmkit.languages.names import Resolver

TEXTS = {
    "en": "The train was late again, so we walked home.",
    "de": "Der Zug hatte wieder Verspätung, also gingen wir nach Hause.",
    "fr": "Le train était encore en retard, alors nous sommes rentrés à pied.",
    "es": "El tren llegó tarde otra vez, así que volvimos a casa andando.",
    "uk": "Поїзд знову запізнився, тому ми пішли додому пішки.",
    "ja": "電車がまた遅れたので、歩いて家に帰りました。",
    "ar": "تأخر القطار مرة أخرى، لذلك مشينا إلى المنزل.",
}
NLLB = {
    "en": "eng_Latn", "de": "deu_Latn", "fr": "fra_Latn", "es": "spa_Latn", "uk": "ukr_Cyrl", "ja": "jpn_Jpan",
    "ar": "arb_Arab",
}  # fmt: skip


@pytest.mark.parametrize("language", TEXTS)
def test_a_detected_source_is_that_source(language: str) -> None:
    """`source="detect"` gives the translation that the right source gives, and the result says which it was."""
    options: Any = {"target": "en", "max_new_tokens": 4}
    expected = wrapper("nllb")(TEXTS[language], source=NLLB[language], **options)
    result = wrapper("nllb")(TEXTS[language], source="detect", **options)
    assert result.source_language == expected.source_language == NLLB[language]
    assert result.token_ids == expected.token_ids
    assert result.prompt_tokens == expected.prompt_tokens


def test_each_row_is_detected_for_itself() -> None:
    """Rows of one call may be in different languages, and a row may name its own."""
    results = wrapper("m2m100")(list(TEXTS.values()), source="detect", target="fr", max_new_tokens=2)
    assert [result.source_language for result in results] == list(TEXTS)
    some = wrapper("m2m100")([TEXTS["de"], TEXTS["es"]], source=["detect", "en"], target="fr", max_new_tokens=2)
    assert [result.source_language for result in some] == ["de", "en"]


@pytest.mark.parametrize("text", ["", "  \n", "---", "?!", "🙂"])
@pytest.mark.parametrize("name", ["m2m100", "t5"])
def test_what_is_only_copied_needs_no_source(name: str, text: str) -> None:
    """A text without a letter or a digit is copied as with a source; where the model would read it, it needs one."""
    translator = wrapper(name)
    first, copied = translator([TEXTS["en"], text], source="detect", target="de", max_new_tokens=2)
    assert (first.source_language, copied.source_language, copied.target_language) == ("en", None, "de")
    assert copied.text == text
    assert copied.generated_tokens == 0
    refused = r"source='detect' finds no language in .* Pass its source, one of: "
    if text.strip():
        with pytest.raises(lmkit.LanguageError, match=refused):
            translator(text, source="detect", target="de", split="none")
    else:
        assert translator(text, source="detect", target="de", split="none").text == text
    with pytest.raises(lmkit.LanguageError, match=refused):
        translator.score(text, "Vögel", source="detect", target="de")
    with pytest.raises(lmkit.LanguageError, match="target='Klingon' is not a language"):
        translator(text, source="detect", target="Klingon")


def test_a_t5_detects_whatever_the_target() -> None:
    """Each language that has presets can be the target of a detected source."""
    for target, text in (("de", TEXTS["en"]), ("fr", TEXTS["en"])):
        assert wrapper("t5")(text, source="detect", target=target, max_new_tokens=1).target_language == target


@pytest.mark.parametrize("text", ["12 345", "7"])
def test_nothing_to_detect_is_an_error(text: str) -> None:
    """A text that speaks for no language is a LanguageError that shows it and asks for the source."""
    with pytest.raises(lmkit.LanguageError, match=r"source='detect' finds no language in .* Pass its source, one of: "):
        wrapper("m2m100")([TEXTS["en"], text], source="detect", target="fr")
    errors = list(
        wrapper("m2m100").map(
            [TEXTS["en"], text, TEXTS["de"]], source="detect", target="fr", max_new_tokens=2, on_error="return"
        )
    )
    assert [type(error) for error in errors] == [lmkit.Translation, lmkit.LanguageError, lmkit.Translation]


def test_only_the_checkpoint_s_languages_are_found() -> None:
    """A text is taken for the likeliest language of the checkpoint, as the detector ranks all of them."""
    detector = Detector(Resolver(["en_XX", "de_DE", "nl_XX"]))
    everything = LanguageIdentifier.from_model_file(MODEL_FILE)
    assert set(detector.languages) == {"en_XX", "de_DE", "nl_XX"}
    for text in [*TEXTS.values(), "Hallo", "seven", "Dit is een boek"]:
        ranked = [label for label, _ in everything.rank(text) if label in {"en", "de", "nl"}]
        found = detector(text)
        assert found is None or found.startswith(ranked[0])


@pytest.mark.parametrize(
    "text, code", [("火车又晚点了，我们只好走路回家。", "zho_Hans"), ("火車又誤點了，我們只好走路回家。", "zho_Hant")]
)
def test_the_script_of_chinese_is_found(text: str, code: str) -> None:
    """Chinese is Traditional or Simplified where the checkpoint has both, and just Chinese elsewhere."""
    assert Detector(Resolver(["eng_Latn", "zho_Hans", "zho_Hant"]))(text) == code
    assert Detector(Resolver(["en", "zh", "ja"]))(text) == "zh"


def test_a_t5_reads_the_detected_prefix() -> None:
    """A prefix in words is that of the detected language."""
    model, tokenizer = reference("t5")
    prepared = languages_of(tokenizer, model.config).prepare(TEXTS["en"], "detect", "de", None)
    assert (prepared.source, prepared.prefix) == ("en", "translate English to German: ")


@pytest.mark.parametrize("name, target", [("marian", "fr"), ("marian_group", "fra"), ("bart", None)])
def test_detection_where_no_source_is_told_is_an_error(name: str, target: str | None) -> None:
    """A checkpoint that is not told its source refuses to have it detected."""
    with pytest.raises(lmkit.LanguageError, match=r"this checkpoint is not told the source language. Leave it out"):
        wrapper(name)("Birds fly.", source="detect", target=target)


def test_a_checkpoint_of_languages_that_the_detector_lacks() -> None:
    """Where the detector knows none of the languages, that is the error."""
    with pytest.raises(lmkit.LanguageError, match="the detector knows none of this checkpoint's languages"):
        Detector(Resolver(["ltg_Latn_", "kbp_Latn"]))


WITHOUT = """
import sys
sys.modules["py3langid"] = None
from lmkit import MissingExtraError
from lmkit.languages.detect import Detector
from lmkit.languages.names import Resolver
try:
    Detector(Resolver(["en"]))
except MissingExtraError as error:
    assert 'pip install "lmkit[detect]"' in str(error), error
else:
    raise AssertionError
"""


def test_a_missing_detector_names_its_extra() -> None:
    """Without the package, detection is an error with the install line."""
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=60)
