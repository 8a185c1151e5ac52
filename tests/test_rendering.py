"""Conversations through chat templates that differ as those of real models do.

The oracle is the template itself, asked for the beginning of a conversation that ends with the turn
in question.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap_stream.calibration.conversations import Conversation, interpret
from reap_stream.calibration.encoding import TextEncoder
from reap_stream.calibration.messages import normalise_messages
from reap_stream.calibration.rendering import ChatTemplate
from reap_stream.errors import CalibrationError
from tests import chat_templates
from tests.chat_templates import with_template
from tests.corpora import VOCAB, ids_of, load, tokens_of, write_jsonl

TEMPLATES = {
    name: value
    for name, value in vars(chat_templates).items()
    if name.isupper() and isinstance(value, str)
}
USER = [{"role": "user", "content": f"Question {n}?"} for n in range(3)]


def thinking(number, content=None):
    content = f"Answer {number}." if content is None else content
    return {"role": "assistant", "content": content, "reasoning_content": f"Thought {number}!"}


def calling(number, content=""):
    call = {"name": "look", "arguments": {"where": f"here {number}"}}
    return {**thinking(number, content), "tool_calls": [call]}


RESULT = {"role": "tool", "content": "Found."}
TWO = [USER[0], thinking(0), USER[1], thinking(1)]
AGENT = [USER[0], calling(0), RESULT, thinking(1), USER[1], calling(2), RESULT, thinking(3)]


def conversation(*messages):
    return Conversation(normalise_messages(list(messages), "here"))


def rows_of(template, *messages):
    rendered = ChatTemplate(with_template(template)).render_rows(conversation(*messages), "here")
    return [row.text for row in rendered]


def asked(template, messages, **options):
    tokenizer = with_template(template)
    messages = normalise_messages(list(messages), "here")
    return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=True, **options)


@pytest.mark.parametrize("name", ["CHATML", "ITEMS"])
def test_each_turn_is_once_the_last(name):
    template = TEMPLATES[name]
    assert rows_of(template, *TWO) == [asked(template, TWO[:2]), asked(template, TWO)]
    assert "Thought 0!" not in asked(template, TWO)
    # A question that is not answered: the row before it has the reasoning.
    open_end = [*TWO, USER[2]]
    assert rows_of(template, *open_end) == [
        asked(template, TWO[:2]),
        asked(template, TWO),
        asked(template, open_end),
    ]


@pytest.mark.parametrize("name", ["CHATML", "ITEMS"])
def test_turns_between_calls_stay_together(name):
    template = TEMPLATES[name]
    assert rows_of(template, *AGENT) == [asked(template, AGENT[:4]), asked(template, AGENT)]


@pytest.mark.parametrize("name", ["CHATML", "ITEMS", "BLOCKS", "THINKING", "OPENED", "PLAIN"])
def test_no_reasoning_is_lost(name):
    text = "".join(rows_of(TEMPLATES[name], *TWO))
    for number in (0, 1):
        assert text.count(f"Thought {number}!") == 1
    if name not in ("OPENED", "PLAIN"):
        text = "".join(rows_of(TEMPLATES[name], *AGENT))
        assert set(re.findall(r"Thought (\d)!", text)) == {"0", "1", "2", "3"}


@given(
    st.lists(st.sampled_from(["user", "answer", "thought", "call"]), max_size=9),
    st.sampled_from(["CHATML", "ITEMS"]),
)
def test_rows_end_where_the_reasoning_of_a_question_ends(kinds, name):
    messages = [USER[0]]
    for number, kind in enumerate(kinds):
        messages += {
            "user": [USER[1]],
            "answer": [{"role": "assistant", "content": "Answer."}],
            "thought": [thinking(number)],
            "call": [calling(number), RESULT],
        }[kind]
    # The last turn with reasoning before each question, and the end of all.
    ends, last = [], 0
    for number, message in enumerate(messages):
        if message["role"] == "user" and last:
            ends.append(last)
            last = 0
        last = number + 1 if "reasoning_content" in message else last
    want = [asked(TEMPLATES[name], messages[:end]) for end in [*ends, len(messages)]]
    thinks = any("reasoning_content" in message for message in messages)
    assert rows_of(TEMPLATES[name], *messages) == (want if thinks else want[-1:])


def test_reasoning_that_the_prompt_opens():
    first = "<s><User>Question 0?<Assistant>Answer 0.</s>"
    assert rows_of(chat_templates.OPENED, *TWO) == [
        "<s><User>Question 0?<Assistant><think>\nThought 0!\n</think>\n\nAnswer 0.</s>",
        f"{first}<User>Question 1?<Assistant><think>\nThought 1!\n</think>\n\nAnswer 1.</s>",
    ]
    for length, row in zip((1, 3), rows_of(chat_templates.OPENED, *TWO), strict=True):
        prompt = asked(chat_templates.OPENED, TWO[:length], add_generation_prompt=True)
        assert row.startswith(prompt)


def test_reasoning_behind_a_switch():
    first = "<User>Question 0?<Assistant></think>Answer 0.<end>"
    assert rows_of(chat_templates.SWITCHED, *TWO) == [
        "<User>Question 0?<Assistant><think>Thought 0!</think>Answer 0.<end>",
        f"{first}<User>Question 1?<Assistant><think>Thought 1!</think>Answer 1.<end>",
    ]


def test_reasoning_where_an_empty_block_stands():
    first = "<user>Question 0?<assistant><think></think>Answer 0."
    assert rows_of(chat_templates.BLOCKS, *TWO) == [
        "<user>Question 0?<assistant><think>Thought 0!</think>Answer 0.",
        f"{first}<user>Question 1?<assistant><think>Thought 1!</think>Answer 1.",
    ]
    wide = chat_templates.BLOCKS.replace(
        "<think>{{ m.reasoning_content if loop.index0 > ns.last else '' }}</think>",
        r"{{ '<think>\n\n</think>\n\n' }}",
    )
    assert rows_of(wide, *TWO)[0] == (
        "<user>Question 0?<assistant><think>\nThought 0!\n</think>\n\nAnswer 0."
    )


def test_a_template_that_knows_no_reasoning_has_it_as_content():
    written = "[assistant] <think>\nThought {0}!\n</think>\n\nAnswer {0}.\n"
    assert rows_of(chat_templates.PLAIN, *TWO) == [
        f"<s>[user] Question 0?\n{written.format(0)}[user] Question 1?\n{written.format(1)}"
    ]


@pytest.mark.parametrize("content", ["", "I look."])
def test_reasoning_for_which_there_is_no_place(content):
    # Calls are printed before the content, where the prompt's opening mark does not lead.
    messages = [USER[0], calling(0, content), RESULT, thinking(1)]
    for length in (2, 4):
        (row,) = rows_of(chat_templates.OPENED, *messages[:length])
        assert "<Call>look" in row
        assert content in row
        assert "Thought 0!" not in row


@pytest.mark.parametrize("name", ["CHATML", "ITEMS", "OPENED", "BLOCKS", "THINKING"])
def test_without_reasoning_there_is_one_row_as_the_template_has_it(name):
    messages = [USER[0], {"role": "assistant", "content": "Answer."}, USER[1]]
    tokenizer = with_template(TEMPLATES[name])
    want = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rows_of(TEMPLATES[name], *messages) == [want]
    encoder = TextEncoder(tokenizer, VOCAB)
    assert encoder.rows(conversation(*messages), "here") == [conversation(*messages)]


# What a template makes of one call: arguments as an object, as JSON, by id.
CALLS = {
    "CHATML": '{call}look{"where": "here 0"}',
    "ITEMS": '<call>look(where="here 0")',
    "OPENED": '<Call>look<sep>{"where": "here 0"}</s><Result>Found.',
    "BLOCKS": '<functions.look:0>{"where": "here 0"}',
    "SHORT_IDS": 'call00000{"name": "look", "arguments": {"where": "here 0"}}<tool>call00000Found.',
    "THINKING": '<call>look{"where": "here 0"}',
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_in_the_spelling_of_the_template(name):
    turn = {"role": "assistant", "content": None, "tool_calls": calling(0)["tool_calls"]}
    (row,) = rows_of(TEMPLATES[name], USER[0], turn, RESULT)
    assert CALLS[name] in row
    assert "None" not in row


def test_arguments_are_not_printed_as_python():
    template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    )
    (row,) = rows_of(template, USER[0], calling(0))
    assert row.endswith('look{"where": "here 0"}')


def test_arguments_that_are_no_object_stay_text():
    turn = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": "ls -l"}]}
    (row,) = rows_of(chat_templates.OPENED, USER[0], turn)
    assert "<sep>ls -l</s>" in row


def test_text_beside_reasoning_and_a_call():
    (row,) = rows_of(chat_templates.THINKING, USER[0], calling(0, "I look."), RESULT)
    assert "<analysis>Thought 0!\n\nI look.<final><call>look" in row


def test_calls_that_a_template_leaves_out_are_no_silent_loss():
    turn = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {}}]}
    with pytest.raises(CalibrationError, match=r"here: .*leaves out tool calls \(look\)"):
        rows_of(chat_templates.PLAIN, USER[0], turn)


@pytest.mark.parametrize("name", ["CHATML", "PLAIN", "SHORT_IDS"])
def test_what_a_template_refuses_is_said_with_its_words(name):
    template = "{{ raise_exception('not ' + messages[0].role) }}"
    for messages in (TWO, AGENT, [USER[0]]):
        with pytest.raises(CalibrationError, match=r"here: .*refuses this conversation: not user"):
            rows_of(template, *messages)
    strange = Conversation([{"role": "narrator", "content": "x"}])
    if name != "SHORT_IDS":
        with pytest.raises(CalibrationError, match="refuses this conversation: "):
            ChatTemplate(with_template(TEMPLATES[name])).render(strange, "here")


def test_the_date_stands_still():
    template = (
        "{%- macro opening() -%}Today is {{ strftime_now('%A, %d %B %Y') }}.{%- endmacro -%}"
        "{{ opening() }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert rows_of(template, USER[0]) == ["Today is Tuesday, 01 July 2025.Question 0?"]


def test_rows_of_one_conversation_share_their_beginnings():
    rows = ChatTemplate(with_template(chat_templates.CHATML)).render_rows(
        conversation(*TWO), "here"
    )
    first, whole = rows
    assert whole.shared == 0
    assert first.text[: first.shared] == whole.text[: first.shared]
    assert first.text[first.shared] != whole.text[first.shared]
    assert first.text[first.shared :].startswith("<think>")


def test_rows_of_a_file(tmp_path):
    tokenizer = with_template(chat_templates.CHATML)
    records = [{"messages": TWO}, {"messages": AGENT}, {"messages": [USER[2], thinking(5)]}]
    path = write_jsonl(tmp_path / "a.jsonl", *records)
    want = [TWO[:2], TWO, AGENT[:4], AGENT, [USER[2], thinking(5)]]
    corpus = load(path, tokenizer=tokenizer, sequence_length=4096)
    assert tokens_of(corpus) == [ids_of(asked(chat_templates.CHATML, part)) for part in want]


def test_rows_that_are_cut_before_their_reasoning_are_not_used_twice(tmp_path):
    tokenizer = with_template(chat_templates.CHATML)
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": TWO})
    first, whole = (row.text for row in ChatTemplate(tokenizer).render_rows(conversation(*TWO), ""))
    common = next(n for n, pair in enumerate(zip(first, whole, strict=False)) if len({*pair}) > 1)
    for length in (common - 1, common, common + 1):
        corpus = load(path, tokenizer=tokenizer, sequence_length=length)
        want = [ids_of(first)[:length], ids_of(whole)[:length]]
        assert tokens_of(corpus) == (want if length > common else want[1:])
        assert corpus.notes == ()
        assert all(row.tokens.base is None for row in corpus.rows)


def test_no_special_token_is_doubled(tmp_path):
    # The tokenizer puts <s> before text, and this template prints one itself.
    tokenizer = with_template(chat_templates.PLAIN)
    path = write_jsonl(
        tmp_path / "a.jsonl",
        {"messages": [USER[0]]},
        {"text": "<s>made by a template"},
        {"text": "plain"},
    )
    rows = tokens_of(load(path, tokenizer=tokenizer))
    assert rows[0] == ids_of("<s>[user] Question 0?\n")
    assert rows[0] == tokenizer.apply_chat_template([USER[0]], return_dict=False)
    assert rows[1] == [0, *ids_of("made by a template"), 257]
    assert rows[2] == [0, *ids_of("plain"), 257]
    assert [row.count(0) for row in rows] == [1, 1, 1]


def test_thought_in_any_field_or_in_the_text_is_the_same_row():
    rows = set()
    for turn in (
        {"role": "assistant", "content": "a", "reasoning": "t"},
        {"role": "assistant", "content": "a", "thinking": "t"},
        {"role": "assistant", "content": "<think>\nt\n</think>\n\na"},
        {"from": "gpt", "value": "t</think>a"},
    ):
        said = interpret({"messages": [USER[0], turn]}, "here", chat=True)
        rows.add(ChatTemplate(with_template(chat_templates.ITEMS)).render(said, "here"))
    assert rows == {"[gMASK]<|user|>Question 0?<|assistant|><think>t</think>a"}
