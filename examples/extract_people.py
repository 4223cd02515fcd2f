"""Read facts out of sentences as objects, with a grammar and without, and count what is right.

The sentences are made from a table, so the right answers are known. Without a grammar the model's text is read as JSON,
if it is JSON; with one, every text is.
"""

from __future__ import annotations

import datetime as dt
import random
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

import lmkit
import smollm2

ROWS = 40
NAMES = "Ada Ben Clara Dan Emma Finn Grace Hugo Ida Jack Kate Liam Mia Noah Olga Paul Rosa Sam Tess Uwe".split()
CITIES = "Lisbon Oslo Rome Paris Vienna Dublin Prague Athens Madrid Warsaw".split()
SENTENCES = (
    "{name} is {age} years old, lives in {city}, and joined us on {joined}.",
    "On {joined}, {name} from {city}, aged {age}, signed up.",
    "We have known {name} since {joined}; at {age}, {name} still lives in {city}.",
    "{city} is the home of {name}, who is {age} and became a member on {joined}.",
)


@dataclass(frozen=True)
class Person:
    """What a sentence says of someone."""

    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=120)]
    city: Annotated[str, Field(max_length=20)]
    joined: dt.date


READ: TypeAdapter[Person] = TypeAdapter(Person)


def table() -> list[tuple[str, Person]]:
    """Make sentences, and what they say."""
    draw, rows = random.Random(0), []  # noqa: S311 - rows of a table, not secrets
    for number in range(ROWS):
        day = dt.date(draw.randint(2001, 2025), draw.randint(1, 12), draw.randint(1, 28))
        person = Person(draw.choice(NAMES), draw.randint(18, 80), draw.choice(CITIES), day)
        rows.append((SENTENCES[number % len(SENTENCES)].format(**asdict(person)), person))
    return rows


def chat(sentence: str) -> list[dict[str, str]]:
    """Ask for the facts of a sentence, behind an example that shows how."""
    example = Person("Tom", 33, "Berlin", dt.date(2019, 5, 20))
    told = SENTENCES[0].format(**asdict(example))
    ask = "Write as JSON with name, age, city and joined (YYYY-MM-DD): "
    return [
        {"role": "user", "content": ask + told},
        {"role": "assistant", "content": READ.dump_json(example).decode()},
        {"role": "user", "content": ask + sentence},
    ]


def free(text: str) -> Person | None:
    """Read a text that may be anything."""
    try:
        return READ.validate_json(text)
    except ValidationError:
        return None


def right(found: list[Person | None], rows: list[tuple[str, Person]]) -> dict[str, float]:
    """Return how many of each field are right."""
    names = [field.name for field in fields(Person)]
    pairs = [(one, person) for one, (_, person) in zip(found, rows, strict=True)]
    return {name: sum(getattr(one, name, None) == getattr(person, name) for one, person in pairs) for name in names}


def main() -> None:
    """Ask both ways, and print the table."""
    rows = table()
    chats: Any = [chat(sentence) for sentence, _ in rows]
    with lmkit.load("causal", smollm2.path(), "float32") as generator:
        plain = [free(result.text) for result in generator(chats, max_new_tokens=80)]
        held = [None if one.value_error else one.value for one in generator(chats, output=Person, max_new_tokens=80)]
    print("                ", *(f"{field.name:>8}" for field in fields(Person)), f"{'objects':>8}")
    for told, found in (("without a grammar", plain), ("output=Person", held)):
        counts = [*right(found, rows).values(), ROWS - found.count(None)]
        print(f"{told:17}", *(f"{count / ROWS:8.0%}" for count in counts))


if __name__ == "__main__":
    main()
