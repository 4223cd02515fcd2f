import contextlib
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from babel import Locale, UnknownLocaleError
from babel.core import get_global
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as M2M100
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as MBART50
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB

import lmkit
from checkpoints import wrapper
from lmkit.languages.names import Names, Resolver

CODES: dict[str, list[str]] = {"m2m100": M2M100["m2m100"], "mbart50": MBART50, "nllb": NLLB}
SHARED = [
    {"ace_Arab", "ace_Latn"}, {"bjn_Arab", "bjn_Latn"}, {"kas_Arab", "kas_Deva"}, {"knc_Arab", "knc_Latn"},
    {"taq_Latn", "taq_Tfng"}, {"zho_Hans", "zho_Hant"}, {"aka_Latn", "twi_Latn"}, {"ajp_Arab", "apc_Arab"},
]  # fmt: skip
"""Codes of NLLB that share a name or an ISO 639 code: two scripts of one language, Twi in Akan, Levantine Arabic."""
UNKNOWN = {"prp", "ajt", "smd", "cls", "latgalīšu", "Xitsonga", "башҡорт"}
"""Words that Babel's newer CLDR has, and the one of language_data not."""


@cache
def resolver(name: str) -> Resolver:
    """Return the resolver of a family."""
    return Resolver(CODES[name])


def words_of(code: str) -> set[str]:
    """Return what CLDR, read by Babel, calls a code's language: ISO 639-1 to 3, English name, name of its own."""
    aliases = get_global("language_aliases")
    base = code.split("_", 1)[0]
    short = aliases.get(base, base)
    words = {base, short, *(long for long, other in aliases.items() if other == short and len(long) == 3)}
    names = {str(Locale("en").languages.get(short) or "")}
    if short in Locale("en").languages:
        with contextlib.suppress(UnknownLocaleError):  # it has no locale of that language
            names.add(str(Locale(short).languages.get(short) or ""))
    return words | names - {""}


@pytest.mark.parametrize("name", CODES)
def test_every_language_is_found_by_its_codes_and_names(name: str) -> None:
    """Babel's codes, English name and autonym of each language mean that code, or one that shares the word."""
    count = 0
    for code in CODES[name]:
        for word in words_of(code) - UNKNOWN:
            found = resolver(name).find(word)
            assert found == code or {found, code} in SHARED or (word, found) == ("fat", "aka_Latn"), (code, word, found)
            count += 1
    assert count > 4 * len(CODES[name]) - 100


@pytest.mark.parametrize("name", CODES)
def test_every_listed_name_means_its_code(name: str) -> None:
    """The names that a list of languages shows differ, and each means its code in any case."""
    names = Names(CODES[name])
    assert len(set(names.values())) == len(names) == len(CODES[name])
    for code, called in names.items():
        assert resolver(name).find(called) == resolver(name).find(called.upper()) == code
        assert called != code


@pytest.mark.parametrize(
    "word, m2m100, mbart50, nllb",
    [
        ("fr", "fr", "fr_XX", "fra_Latn"),
        ("fra", "fr", "fr_XX", "fra_Latn"),
        ("fre", "fr", "fr_XX", "fra_Latn"),
        ("French", "fr", "fr_XX", "fra_Latn"),
        ("français", "fr", "fr_XX", "fra_Latn"),
        ("fra_Latn", "fr", "fr_XX", "fra_Latn"),
        ("fr_XX", "fr", "fr_XX", "fra_Latn"),
        ("pt-BR", "pt", "pt_XX", "por_Latn"),
        ("en-GB", "en", "en_XX", "eng_Latn"),
        ("American English", "en", "en_XX", "eng_Latn"),
        ("zh", "zh", "zh_CN", "zho_Hans"),
        ("Chinese", "zh", "zh_CN", "zho_Hans"),
        ("zh-Hant", None, None, "zho_Hant"),
        ("zh-TW", None, None, "zho_Hant"),
        ("Chinese (Traditional)", None, None, "zho_Hant"),
        ("繁體中文", None, None, "zho_Hant"),
        ("zh-SG", "zh", "zh_CN", "zho_Hans"),
        ("yue", None, None, "yue_Hant"),
        ("no", "no", None, "nob_Latn"),
        ("nb", "no", None, "nob_Latn"),
        ("nn", None, None, "nno_Latn"),
        ("Norwegian", "no", None, "nob_Latn"),
        ("sr", "sr", None, "srp_Cyrl"),
        ("sr-Cyrl", "sr", None, "srp_Cyrl"),
        ("sr-Latn", None, None, None),
        ("Serbian (Latin)", None, None, None),
        ("ar", "ar", "ar_AR", "arb_Arab"),
        ("Egyptian Arabic", None, None, "arz_Arab"),
        ("fa", "fa", "fa_IR", "pes_Arab"),
        ("Dari", "fa", "fa_IR", "prs_Arab"),
        ("ku", None, None, "kmr_Latn"),
        ("ps", "ps", "ps_AF", "pbt_Arab"),
        ("qu", None, None, "quy_Latn"),
        ("ff", "ff", None, "fuv_Latn"),
        ("nso", "ns", None, "nso_Latn"),
        ("Filipino", "tl", "tl_XX", "tgl_Latn"),
        ("tw", None, None, "twi_Latn"),
        ("iw", "he", "he_IL", "heb_Hebr"),
        ("uk", "uk", "uk_UA", "ukr_Cyrl"),
        ("be", "be", None, "bel_Cyrl"),
        ("__fr__", "fr", "fr_XX", "fra_Latn"),
        (" ENGLISH ", "en", "en_XX", "eng_Latn"),
        ("javascript", None, None, None),
        ("Frenchy", None, None, None),
        ("xx", None, None, None),
        ("", None, None, None),
    ],
)
def test_what_a_word_means(word: str, m2m100: str | None, mbart50: str | None, nllb: str | None) -> None:
    """A word means the code of the same language, in the script that it asks for or that is likely, or none."""
    assert [resolver(name).find(word) for name in CODES] == [m2m100, mbart50, nllb]


@pytest.mark.parametrize(
    "word, code",
    [
        ("pt", "pt_BR"), ("pt-AO", "pt_PT"), ("European Portuguese", "pt_PT"), ("Portuguese (Brazil)", "pt_BR"),
        ("fr-BE", "fr"), ("Canadian French", "fr_CA"), ("sr", "srp_Cyrl"), ("Serbian (Latin)", "srp_Latn"),
        ("sh", "srp_Latn"), ("zh-TW", "zh_tw"), ("zh-Hans", "zh_cn"), ("ZH-CN", "zh_cn"), ("no", "nob"), ("hr", None),
    ],
)  # fmt: skip
def test_regions_and_scripts_choose_between_codes(word: str, code: str | None) -> None:
    """Where a checkpoint has several codes of a language, the nearest by CLDR is meant."""
    codes = ["pt_PT", "pt_BR", "fr", "fr_CA", "srp_Latn", "srp_Cyrl", "nno", "nob", "zh_cn", "zh_tw"]
    assert Resolver(codes).find(word) == code


@given(st.sampled_from(NLLB), st.sampled_from(["nllb", "m2m100", "mbart50"]))
def test_no_language_becomes_another(code: str, name: str) -> None:
    """What a code means elsewhere has, by Babel's aliases, the same language, or is one of a stated few."""
    aliases = get_global("language_aliases") | {"nb": "no", "pbt": "ps", "quy": "qu", "fuv": "ff", "ns": "nso"}
    found = resolver(name).find(code)
    if found is not None:
        here, there = (aliases.get(c.split("_")[0], c.split("_")[0]).split("_")[0] for c in (code, found))
        assert aliases.get(here, here) == aliases.get(there, there)


@given(st.text(max_size=12))
def test_any_text_is_a_code_or_none(word: str) -> None:
    """No text breaks the resolver, and what it returns is one of the codes."""
    assert resolver("m2m100").find(word) in {*CODES["m2m100"], None}


@pytest.mark.parametrize(
    "name, word, near",
    [
        ("m2m100", "nn", "'no'?"),
        ("m2m100", "zh-Hant", "'zh'?"),
        ("m2m100", "sr-Latn", "'sr', 'bs' or 'hr'?"),
        ("m2m100", "Frnech", "'fr'?"),
        ("m2m100", "fra_Latin", "'fr'?"),
        ("nllb", "Ukrianian", "'ukr_Cyrl'"),
        ("nllb", "srp_Latn", "'srp_Cyrl', "),
    ],
)
def test_an_unknown_language_names_near_ones_first(name: str, word: str, near: str) -> None:
    """The error says what was given, then relatives and words that look like it, then all codes."""
    translator = wrapper(name)
    with pytest.raises(lmkit.LanguageError) as caught:
        translator("Birds fly.", source=next(iter(translator.languages)), target=word)
    message = str(caught.value)
    assert message.startswith(f"target={word!r} is not a language of this checkpoint. Did you mean {near}")
    assert message.endswith(f"It speaks: {', '.join(map(repr, translator.languages))}.")


def test_the_list_of_languages_is_a_mapping_that_does_not_change() -> None:
    """`languages` has codes as keys and English names as values, and reads like a dict."""
    found = wrapper("mbart50").languages
    assert "de_DE" in found
    assert "German" not in found
    assert found["de_DE"] == "German"
    assert repr(found) == f"Names({dict(found)})"
    with pytest.raises(KeyError):
        found["German"]
    with pytest.raises(TypeError):
        found["xx"] = "Xish"


WITHOUT = """
import sys
sys.modules["langcodes"] = sys.modules["language_data"] = None
import lmkit
from lmkit.languages.names import Names, Resolver
found, names = Resolver(["fr_XX", "de_DE"]), Names(["fr_XX", "de_DE"])
assert (found.find("fr_XX"), found.find("FR-xx")) == ("fr_XX", "fr_XX")
assert list(names) == ["fr_XX", "de_DE"] and "fr_XX" in names and repr(names) == "Names(['fr_XX', 'de_DE'])"
for use in (lambda: found.find("French"), lambda: names["fr_XX"]):
    try:
        use()
    except lmkit.MissingExtraError as error:
        assert 'pip install "lmkit[translate]"' in str(error), error
    else:
        raise AssertionError
assert found.near("fr") == ["fr_XX"]
"""


def test_codes_need_no_library() -> None:
    """Without langcodes the checkpoint's own codes work, and names are an error with the install line."""
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=60)


def test_the_library_is_loaded_when_a_name_is_read() -> None:
    """Importing lmkit's languages loads neither langcodes nor its data."""
    code = "import sys, lmkit.languages; print(sorted({'langcodes', 'language_data', 'py3langid'} & set(sys.modules)))"
    done: Any = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
