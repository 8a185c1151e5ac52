"""Small tasks that a user gives and an assistant solves, half of them with reasoning written out."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]

_NAMES = ("Ada", "Boris", "Chloe", "Dinesh", "Elif", "Farid", "Greta", "Hana", "Ivo", "Jun", "Kofi")
_GOODS = {
    "lamp": 34, "kettle": 28, "notebook": 4, "tent": 129, "carpet": 85, "drill": 62, "chair": 47,
    "mug": 7, "blanket": 39, "clock": 18,
}  # fmt: skip
_CITIES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Osaka", "Quebec", "Tallinn", "Perth", "Turin")
_JOBS = ("baker", "surveyor", "nurse", "carpenter", "translator", "gardener", "pilot")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_WORDS = (
    "strawberry", "lighthouse", "committee", "bookkeeper", "assassination", "mississippi",
    "parallel", "possession", "balloon", "engineering", "occurrence", "tattoo",
)  # fmt: skip


def task(rng: random.Random) -> list[Message]:
    """One task, solved."""
    made: Callable[[random.Random], list[Message]] = rng.choice(
        (_shopping, _journey, _weekday, _heights, _letters, _extraction, _table, _sorting, _letter)
    )
    return made(rng)


def _ask(text: str) -> Message:
    return {"role": "user", "content": text}


def _say(text: str, reasoning: str = "") -> Message:
    message = {"role": "assistant", "content": text}
    return {**message, "reasoning_content": reasoning} if reasoning else message


def _shopping(rng: random.Random) -> list[Message]:
    bought = [(name, rng.randint(2, 6)) for name in rng.sample(sorted(_GOODS), 3)]
    listed = ", ".join(f"{count} {name}s at {_GOODS[name]} euros each" for name, count in bought)
    parts = [count * _GOODS[name] for name, count in bought]
    steps = "\n".join(
        f"{count} × {_GOODS[name]} = {part}"
        for (name, count), part in zip(bought, parts, strict=True)
    )
    total, note = sum(parts), 100 * (sum(parts) // 100 + 1)
    added = " + ".join(map(str, parts))
    return [
        _ask(f"I bought {listed}. What did I pay altogether?"),
        _say(
            f"You paid **{total} euros**.",
            f"Three products to add up.\n{steps}\nTogether {added} = {total}.",
        ),
        _ask(f"And how much do I get back from {note} euros?"),
        _say(
            f"{note - total} euros.",
            f"The sum was {total}. {note} - {total} = {note - total}.",
        ),
    ]


def _journey(rng: random.Random) -> list[Message]:
    start, stop = rng.sample(_CITIES, 2)
    hours, speed = rng.randint(2, 9), 10 * rng.randint(4, 12)
    rest = rng.choice((15, 30, 45))
    minutes = 60 * hours + rest
    begin = rng.randint(5, 11)
    end = 60 * begin + minutes
    clock = f"{end // 60}:{end % 60:02}"
    return [
        _ask(
            f"Suppose a road of {hours * speed} km leads from a village near {start} to one near "
            f"{stop}. I leave at {begin}:00, drive {speed} km an hour and rest once for {rest} "
            "minutes. When do I arrive?"
        ),
        _say(
            f"At {clock}: {hours} hours on the road and {rest} minutes of rest after {begin}:00.",
            f"Time on the road: {hours * speed} / {speed} = {hours} hours. With the rest that is "
            f"{hours} h {rest} min, or {minutes} minutes. {begin}:00 plus {minutes} minutes: "
            f"{begin} × 60 + {minutes} = {end} minutes after midnight, and {end} = "
            f"{end // 60} × 60 + {end % 60}. So {clock}.",
        ),
    ]


def _weekday(rng: random.Random) -> list[Message]:
    today, days = rng.randrange(7), rng.randint(10, 200)
    weeks, rest = divmod(days, 7)
    answer = _DAYS[(today + rest) % 7]
    return [
        _ask(f"Today is {_DAYS[today]}. Which day of the week is it in {days} days?"),
        _say(
            f"{answer}.",
            f"{days} = {weeks} × 7 + {rest}. Whole weeks change nothing, so count {rest} days on "
            f"from {_DAYS[today]}: {answer}.",
        ),
    ]


def _heights(rng: random.Random) -> list[Message]:
    order = rng.sample(_NAMES, 4)
    facts = [f"{a} is taller than {b}." for a, b in itertools.pairwise(order)]
    rng.shuffle(facts)
    tallest, second = order[0], order[1]
    return [
        _ask(f"{' '.join(facts)} Who is the second tallest?"),
        _say(
            f"{second}. From tall to short: {', '.join(order)}.",
            f"Look for somebody who is shorter than nobody: that is {tallest}. Of the others, "
            f"{second} is shorter than {tallest} alone. The chain is {' > '.join(order)}, which "
            "agrees with every sentence.",
        ),
    ]


def _letters(rng: random.Random) -> list[Message]:
    word = rng.choice(_WORDS)
    letter = max(sorted(set(word)), key=word.count)
    places = [str(n) for n, found in enumerate(word, 1) if found == letter]
    spelled = "-".join(word)
    return [
        _ask(f'How many times does the letter "{letter}" occur in "{word}"?'),
        _say(
            f"{len(places)} times, at positions {', '.join(places)}.",
            f"Spell it: {spelled}. Going through it, {letter} stands at {', '.join(places)}.",
        ),
    ]


def _people(rng: random.Random, count: int) -> list[dict[str, Any]]:
    return [
        {"name": name, "age": rng.randint(19, 71), "city": rng.choice(_CITIES), "job": job}
        for name, job in zip(rng.sample(_NAMES, count), rng.sample(_JOBS, count), strict=True)
    ]


def _sentence(person: dict[str, Any]) -> str:
    return "{name}, a {job} of {age} years, lives in {city}.".format(**person)


def _extraction(rng: random.Random) -> list[Message]:
    people = _people(rng, 3)
    oldest = max(people, key=lambda person: (person["age"], person["name"]))
    return [
        _ask(
            "Turn this into a JSON list with the keys name, age, city and job. JSON only, please."
            f"\n\n{' '.join(map(_sentence, people))}"
        ),
        _say(f"```json\n{json.dumps(people, indent=2)}\n```"),
        _ask("Now the oldest one alone, on one line."),
        _say(json.dumps(oldest)),
    ]


def _table(rng: random.Random) -> list[Message]:
    people = _people(rng, 4)
    rows = "\n".join("| {name} | {age} | {city} | {job} |".format(**p) for p in people)
    return [
        _ask("Make a Markdown table of these people:\n\n" + "\n".join(map(_sentence, people))),
        _say(f"| Name | Age | City | Job |\n|---|---|---|---|\n{rows}"),
    ]


def _sorting(rng: random.Random) -> list[Message]:
    names = rng.sample(_NAMES, 6)
    backwards = sorted(names, reverse=True)
    return [
        _ask(f"Sort these names by the alphabet: {', '.join(names)}."),
        _say("\n".join(f"{n}. {name}" for n, name in enumerate(sorted(names), 1))),
        _ask("The other way round, separated by commas, without numbers."),
        _say(", ".join(backwards)),
    ]


def _letter(rng: random.Random) -> list[Message]:
    sender, receiver = rng.sample(_NAMES, 2)
    thing, day, hour = rng.choice(sorted(_GOODS)), rng.choice(_DAYS), rng.randint(9, 18)
    city = rng.choice(_CITIES)
    return [
        _ask(
            f"Write a short, friendly message from {sender} to {receiver}: the {thing} has arrived "
            f"and can be fetched on {day} after {hour}:00, in the shop in {city}."
        ),
        _say(
            f"Hello {receiver},\n\ngood news: the {thing} has arrived. You can fetch it in our shop "
            f"in {city} on {day}, any time after {hour}:00.\n\nSee you then,\n{sender}"
        ),
        _ask("Shorter, and more formal."),
        _say(
            f"Dear {receiver},\n\nthe {thing} is ready for collection at our shop in {city} on "
            f"{day} from {hour}:00.\n\nKind regards,\n{sender}"
        ),
    ]
