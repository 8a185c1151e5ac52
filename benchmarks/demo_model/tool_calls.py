"""Conversations that call tools, made by a seeded generator: the demo's third domain."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CITIES = (
    "Lisbon", "Oslo", "Nairobi", "Lima", "Osaka", "Quebec", "Tallinn", "Perth", "Cairo", "Turin",
    "Bergen", "Havana", "Riga", "Porto", "Seoul", "Malaga",
)  # fmt: skip
PEOPLE = ("Ada", "Boris", "Chloe", "Dinesh", "Elif", "Farid", "Greta", "Hana", "Ivo", "Jun")
GOODS = ("lamp", "kettle", "bicycle", "notebook", "tent", "violin", "carpet", "printer", "drill")
UNITS = (("metre", "mile", "foot"), ("litre", "gallon", "cup"), ("kilogram", "pound", "ounce"))
DEGREES = ("celsius", "fahrenheit")
LANGUAGES = ("French", "Swahili", "Korean", "Portuguese", "Estonian", "Arabic")
FOLDERS = ("reports", "invoices", "photos", "drafts", "contracts", "logs")
CURRENCIES = ("EUR", "NOK", "JPY", "KES", "CAD", "PEN")


@dataclass(frozen=True)
class Tool:
    """A function the assistant may call.

    Attributes:
        name: of the function.
        description: what it does.
        parameters: name → JSON type.
        fill: random arguments.
        ask: the user's words for them.
        result: what the function returns.
        answer: the assistant's words for it.
    """

    name: str
    description: str
    parameters: dict[str, str]
    fill: Callable[[random.Random], dict[str, Any]]
    ask: tuple[str, ...]
    result: Callable[[random.Random, dict[str, Any]], dict[str, Any]]
    answer: tuple[str, ...]

    def schema(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": parameters,
        }
        return {"type": "function", "function": function}


def _date(rng: random.Random) -> str:
    return f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


TOOLS = (
    Tool(
        "get_weather", "Current weather of a city.", {"city": "string", "unit": "string"},
        lambda r: {"city": r.choice(CITIES), "unit": r.choice(DEGREES)},
        ("What is the weather in {city}? Use {unit}.", "How warm is it in {city} now, in {unit}?"),
        lambda r, _: {"temperature": r.randint(-20, 38), "sky": r.choice(("clear", "rain", "fog"))},
        ("In {city} it is {temperature} degrees {unit}, {sky}.",),
    ),
    Tool(
        "convert_units", "Convert a value between units.",
        {"value": "number", "source": "string", "target": "string"},
        lambda r: dict(zip(("source", "target"), r.sample(r.choice(UNITS), 2), strict=True), value=r.randint(1, 900)),
        ("Convert {value} {source} to {target}.", "How many {target} are {value} {source}?"),
        lambda r, a: {"result": round(a["value"] * r.uniform(0.2, 4.0), 2)},
        ("{value} {source} are {result} {target}.",),
    ),
    Tool(
        "send_message", "Send a short message to a person.", {"to": "string", "text": "string"},
        lambda r: {"to": r.choice(PEOPLE), "text": f"Meet me in {r.choice(CITIES)} on {_date(r)}."},
        ("Tell {to} this: {text}", 'Send {to} the message "{text}"'),
        lambda r, _: {"status": r.choice(("sent", "queued"))},
        ("The message to {to} is {status}.",),
    ),
    Tool(
        "find_product", "Search the shop.", {"name": "string", "max_price": "integer"},
        lambda r: {"name": r.choice(GOODS), "max_price": r.randint(5, 400)},
        ("Find a {name} for less than {max_price} euros.", "Is there a {name} under {max_price}?"),
        lambda r, a: {"price": r.randint(1, a["max_price"]), "stock": r.randint(0, 40)},
        ("There is a {name} for {price} euros, {stock} in stock.",),
    ),
    Tool(
        "create_event", "Put an event into the calendar.",
        {"title": "string", "date": "string", "hour": "integer"},
        lambda r: {"title": f"Call {r.choice(PEOPLE)}", "date": _date(r), "hour": r.randint(7, 20)},
        ('Put "{title}" into my calendar on {date} at {hour}.', 'Plan "{title}": {date}, {hour} h.'),
        lambda r, _: {"event_id": r.randint(1000, 9999)},
        ('"{title}" stands in your calendar on {date} at {hour}, number {event_id}.',),
    ),
    Tool(
        "translate", "Translate a text.", {"text": "string", "language": "string"},
        lambda r: {"text": f"The {r.choice(GOODS)} is in {r.choice(CITIES)}.",
                   "language": r.choice(LANGUAGES)},
        ("Translate into {language}: {text}", "How does one say in {language}: {text}"),
        lambda r, _: {"confidence": round(r.uniform(0.5, 1.0), 2)},
        ("The translation into {language} is ready, confidence {confidence}.",),
    ),
    Tool(
        "list_files", "List files of a folder.", {"folder": "string", "limit": "integer"},
        lambda r: {"folder": r.choice(FOLDERS), "limit": r.randint(1, 20)},
        ("Show the first {limit} files of {folder}.", "What is in {folder}? {limit} files are enough."),
        lambda r, a: {"files": [f"{a['folder'][:-1]}-{r.randint(1, 99)}.txt" for _ in range(3)]},
        ("The folder {folder} has among others: {files}.",),
    ),
    Tool(
        "exchange_rate", "Exchange rate of two currencies.",
        {"amount": "integer", "base": "string", "quote": "string"},
        lambda r: {"amount": r.randint(1, 5000), "base": r.choice(CURRENCIES),
                   "quote": r.choice(CURRENCIES)},
        ("What are {amount} {base} in {quote}?", "Change {amount} {base} into {quote}."),
        lambda r, _: {"rate": round(r.uniform(0.01, 90), 3)},
        ("At a rate of {rate}, {amount} {base} become {quote}.",),
    ),
)  # fmt: skip


def conversation(seed: int) -> dict[str, Any]:
    """One record with `messages` and `tools`, the same for the same seed."""
    rng = random.Random(seed)
    offered = rng.sample(TOOLS, rng.randint(1, 3))
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": "Use the tools. Answer in one sentence."})
    for _ in range(rng.randint(1, 2)):
        tool = rng.choice(offered)
        arguments = tool.fill(rng)
        result = tool.result(rng, arguments)
        call = {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
        messages += [
            {"role": "user", "content": rng.choice(tool.ask).format(**arguments)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": json.dumps(result)},
            {"role": "assistant", "content": rng.choice(tool.answer).format(**arguments, **result)},
        ]
    return {"messages": messages, "tools": [tool.schema() for tool in offered]}
