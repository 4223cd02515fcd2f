"""Read facts out of made-up sentences as objects, with a grammar and without, and count what is right of each field."""

import contextlib
import datetime as dt
import random
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter, ValidationError

import lmkit
import smollm2

ROWS, FIELDS = 40, ("name", "age", "city", "joined")
NAMES = "Ada Ben Clara Dan Emma Finn Grace Hugo Ida Jack Kate Liam Mia Noah Olga Paul Rosa Sam Tess Uwe".split()
CITIES = "Lisbon Oslo Rome Paris Vienna Dublin Prague Athens Madrid Warsaw".split()
TOLD = "{name} is {age} years old, lives in {city}, and joined us on {joined}."
SIGNED = "On {joined}, {name} from {city}, aged {age}, signed up."
ASK = "Write as JSON with name, age, city and joined (YYYY-MM-DD): "


@dataclass(frozen=True)
class Person:
    """What a sentence says of someone."""

    name: str
    age: int
    city: str
    joined: dt.date


READ = TypeAdapter(Person)


def chat(sentence: str) -> list[dict[str, str]]:
    """Ask for the facts of a sentence, behind an example that shows how."""
    example = Person("Tom", 33, "Berlin", dt.date(2019, 5, 20))
    shown = [("user", ASK + TOLD.format(**asdict(example))), ("assistant", READ.dump_json(example).decode())]
    return [{"role": role, "content": content} for role, content in [*shown, ("user", ASK + sentence)]]


def main() -> None:
    """Ask both ways, and print how many are objects, and how many of each field are right."""
    draw, people, free = random.Random(0), list[Person](), dict[int, Person]()  # noqa: S311 - rows, not secrets
    for _ in range(ROWS):
        day = dt.date(draw.randint(2001, 2025), draw.randint(1, 12), draw.randint(1, 28))
        people.append(Person(draw.choice(NAMES), draw.randint(18, 80), draw.choice(CITIES), day))
    chats = [chat((TOLD, SIGNED)[number % 2].format(**asdict(person))) for number, person in enumerate(people)]
    with lmkit.load("causal", smollm2.path(), "float32") as generator:
        for number, result in enumerate(generator.chat(chats, max_new_tokens=80)):
            with contextlib.suppress(ValidationError):
                free[number] = READ.validate_json(result.text)
        results = generator.chat(chats, output=Person, max_new_tokens=80)
    held = {number: result.value for number, result in enumerate(results) if not result.value_error}
    for way, found in (("without a grammar", free), ("output=Person", held)):
        right = {name: sum(getattr(found[n], name) == getattr(people[n], name) for n in found) for name in FIELDS}
        print(f"{way}: {len(found)} of {ROWS} are objects; right are {right}")


if __name__ == "__main__":
    main()
