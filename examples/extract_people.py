"""Read facts out of sentences as objects, with a grammar and without, and count the objects that are right."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

import lmkit
import smollm2

NAMES = "Ada Ben Clara Dan Emma Finn Grace Hugo Ida Jack".split()
CITIES = "Lisbon Oslo Rome Paris Vienna Dublin Prague".split()
SENTENCES = ("{name} is {age} years old and lives in {city}.", "{city} is the home of {name}, who is {age}.")


@dataclass(frozen=True)
class Person:
    """What a sentence says of someone."""

    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=120)]
    city: Annotated[str, Field(max_length=20)]


READ: TypeAdapter[Person] = TypeAdapter(Person)


def chat(sentence: str) -> list[dict[str, str]]:
    """Ask for the facts of a sentence, behind an example that shows how."""
    example, ask = Person("Tom", 33, "Berlin"), "Write as JSON with name, age and city: "
    told, answer = SENTENCES[0].format(**asdict(example)), READ.dump_json(example).decode()
    turns = [("user", ask + told), ("assistant", answer), ("user", ask + sentence)]
    return [{"role": role, "content": content} for role, content in turns]


def read(text: str) -> Person | None:
    """Read a text that may be anything."""
    with contextlib.suppress(ValidationError):
        return READ.validate_json(text)
    return None


def main() -> None:
    """Ask both ways, and count."""
    people = list(map(Person, NAMES, itertools.count(20, 3), itertools.cycle(CITIES)))
    chats = [chat(SENTENCES[n % 2].format(**asdict(person))) for n, person in enumerate(people)]
    with lmkit.load("causal", smollm2.path(), "float32") as generator:
        free = [read(result.text) for result in generator.chat(chats, max_new_tokens=60)]
        held = [result.value for result in generator.chat(chats, output=Person, max_new_tokens=60)]
    for told, found in (("without a grammar", free), ("with output=Person", held)):
        right = sum(one == person for one, person in zip(found, people, strict=True))
        print(f"{told}: {len(found) - found.count(None)} of {len(people)} are objects, {right} all right")


if __name__ == "__main__":
    main()
