"""Records of the data sets that people calibrate on, and what each means, written by hand."""

from __future__ import annotations

import json


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = {
    "name": "weather",
    "description": "Now.",
    "parameters": {
        "city": {"type": "str", "description": "Where."},
        "days": {"type": "int, optional", "description": "How many.", "default": 3},
    },
}
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Now.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where."},
                "days": {"type": "integer", "description": "How many.", "default": 3},
            },
            "required": ["city"],
        },
    },
}
STEP = {"role": "assistant", "content": "Look.", "tool_calls": [call("bash", command="ls")]}

# Name of a set, a record of it, the messages it means, the tools.
CHATS = [
    (
        "theblackcat102/evol-codealpaca-v1",
        {"instruction": "Sort.", "output": "sorted(x)"},
        [user("Sort."), assistant("sorted(x)")],
        None,
    ),
    (
        "open-r1/Mixture-of-Thoughts",
        {
            "messages": [user("2+2?"), assistant("<think>\nTwo twos.\n</think>\n\n4")],
            "num_tokens": 9,
            "source": "math",
        },
        [user("2+2?"), assistant("4", reasoning_content="Two twos.")],
        None,
    ),
    (
        "Salesforce/xlam-function-calling-60k",
        {
            "id": 7,
            "query": "Weather in Paris?",
            "answers": json.dumps([{"name": "weather", "arguments": {"city": "Paris", "days": 2}}]),
            "tools": json.dumps([WEATHER]),
        },
        [
            user("Weather in Paris?"),
            assistant("", tool_calls=[call("weather", city="Paris", days=2)]),
        ],
        [WEATHER_TOOL],
    ),
    (
        "SWE-bench/SWE-smith-trajectories, list",
        {
            "messages": [
                {
                    "role": "system",
                    "content": [{"type": "text", "text": "You act."}],
                    "agent": "main",
                },
                {"role": "user", "content": [{"type": "text", "text": "Fix it."}]},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "Look."}],
                    "tool_calls": [
                        {
                            "id": "toolu_1",
                            "type": "function",
                            "function": {"name": "bash", "arguments": '{"command": "ls"}'},
                        }
                    ],
                },
                {
                    "role": "tool",
                    "content": [{"type": "text", "text": "a.py", "cache_control": None}],
                    "tool_call_ids": ["toolu_1"],
                },
            ],
            "instance_id": "x",
            "resolved": True,
        },
        [system("You act."), user("Fix it."), STEP, {"role": "tool", "content": "a.py"}],
        None,
    ),
    (
        "SWE-bench/SWE-smith-trajectories, JSON",
        {"messages": json.dumps([user("Fix it."), STEP]), "patch": ""},
        [user("Fix it."), STEP],
        None,
    ),
    (
        "ise-uiuc/Magicoder-Evol-Instruct-110K",
        {"instruction": "Sort.", "response": "sorted(x)"},
        [user("Sort."), assistant("sorted(x)")],
        None,
    ),
    (
        "m-a-p/CodeFeedback-Filtered-Instruction",
        {"query": "Sort.", "answer": "sorted(x)", "resource": "evol", "lang": "python"},
        [user("Sort."), assistant("sorted(x)")],
        None,
    ),
    (
        "allenai/tulu-3-sft-mixture",
        {"id": "1", "messages": [user("a"), assistant("b"), user("c")], "source": "s"},
        [user("a"), assistant("b"), user("c")],
        None,
    ),
    (
        "allenai/tulu-3-sft-personas-math",
        {"id": "1", "prompt": "a", "messages": [user("a"), assistant("b")], "constraints": []},
        [user("a"), assistant("b")],
        None,
    ),
    (
        "euclaise/WritingPrompts_curated",
        {"post_title": "T", "prompt": "A dragon.", "body": "Once.", "post_score": 3},
        [user("A dragon."), assistant("Once.")],
        None,
    ),
    (
        "cais/mmlu",
        {"question": "2+2?", "subject": "some_algebra", "choices": ["3", "4"], "answer": 1},
        [user("A multiple choice question about some algebra.\n\n2+2?\nA. 3\nB. 4")],
        None,
    ),
    (
        "HuggingFaceH4/ultrachat_200k",
        {"prompt": "no", "prompt_id": "1", "messages": [user("a"), assistant("b")]},
        [user("a"), assistant("b")],
        None,
    ),
    (
        "mlabonne/open-perfectblend",
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "source": "s",
        },
        [user("a"), assistant("b")],
        None,
    ),
    (
        "BAAI/Infinity-Instruct",
        {
            "id": 1,
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ],
            "label": {"ability_en": ["x"]},
        },
        [system("s"), user("a"), assistant("b")],
        None,
    ),
    (
        "kunishou/databricks-dolly-15k-ja",
        {"index": "1", "category": "qa", "instruction": "何?", "input": "文", "output": "答"},
        [user("何?\n\n文"), assistant("答")],
        None,
    ),
    (
        "databricks/databricks-dolly-15k",
        {"instruction": "What?", "context": "", "response": "That.", "category": "qa"},
        [user("What?"), assistant("That.")],
        None,
    ),
    (
        "AI-MO/NuminaMath-1.5",
        {"problem": "x=1?", "solution": "x is 1.", "answer": "1", "source": "olympiads"},
        [user("x=1?"), assistant("x is 1.")],
        None,
    ),
    (
        "openai/gsm8k",
        {"question": "2+2?", "answer": "4"},
        [user("2+2?"), assistant("4")],
        None,
    ),
    (
        "Open-Orca/OpenOrca",
        {"id": "1", "system_prompt": "Be brief.", "question": "a", "response": "b"},
        [system("Be brief."), user("a"), assistant("b")],
        None,
    ),
    (
        "ultrafeedback, chosen with its prompt",
        {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a")]},
        [user("a"), assistant("b")],
        None,
    ),
    (
        "trl, conversational prompt and completion",
        {"prompt": [system("s"), user("a")], "completion": [assistant("b")]},
        [system("s"), user("a"), assistant("b")],
        None,
    ),
    (
        "llama-factory, calls as turns of their own",
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": '{"name": "w", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "Sun."},
                {"from": "gpt", "value": "It is sunny."},
            ],
            "system": "Help.",
            "tools": "[]",
        },
        [
            system("Help."),
            user("Weather?"),
            assistant("", tool_calls=[call("w", a=1)]),
            {"role": "tool", "content": "Sun."},
            assistant("It is sunny."),
        ],
        None,
    ),
    (
        "dolphin-r1 style, reasoning in a field of the message",
        {"messages": [user("a"), {"role": "assistant", "reasoning": "Hm.", "content": "b"}]},
        [user("a"), assistant("b", reasoning_content="Hm.")],
        None,
    ),
    (
        "alpaca with its text",
        {"instruction": "a", "input": None, "output": "b", "text": "### Instruction: a"},
        [user("a"), assistant("b")],
        None,
    ),
    (
        "answers as texts",
        {"query": "a", "answers": ["b", "c"], "passages": {}},
        [user("a"), assistant("b")],
        None,
    ),
]

TEXTS = [
    ("allenai/c4", {"text": "Some text.", "timestamp": "t", "url": "u"}, "Some text."),
    ("wikimedia/wikipedia", {"id": "1", "url": "u", "title": "T", "text": "T is."}, "T is."),
    ("NeelNanda/pile-10k", {"text": "Some text.", "meta": {"a": "b"}}, "Some text."),
    ("bigcode/the-stack-smol", {"content": "x = 1\n", "lang": "Python", "size": 6}, "x = 1\n"),
    ("NuminaMath without its problem", {"solution": "x is 1.", "source": "s"}, "x is 1."),
]
