"""Each shape of row becomes the chat or text it stands for; others are refused with what was found."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nybble.data.formats import Chat, Plain, RowError, recognize
from nybble.data.source import Row

EXCHANGE = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "it"}]
SYSTEM = {"role": "system", "content": "Be quick."}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"first": 1}}}


def chat_of(**fields: Any) -> Chat:
    chat = recognize(Row(fields, "here")).chat
    assert chat is not None
    return chat


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": EXCHANGE}, Chat(EXCHANGE)),
        ({"messages": json.dumps(EXCHANGE), "tools": json.dumps(TOOLS)}, Chat(EXCHANGE, TOOLS)),
        ({"messages": EXCHANGE, "system": "Be quick.", "tools": []}, Chat([SYSTEM, *EXCHANGE])),
        ({"messages": [SYSTEM, *EXCHANGE], "system": "Not this."}, Chat([SYSTEM, *EXCHANGE])),
        ({"messages": None, "conversations": EXCHANGE}, Chat(EXCHANGE)),
        ({"prompt": EXCHANGE[:1], "completion": EXCHANGE[1:]}, Chat(EXCHANGE, None, 1)),
        (
            {"prompt": EXCHANGE[:1], "completion": EXCHANGE[1:], "system": "Be quick."},
            Chat([SYSTEM, *EXCHANGE], None, 2),
        ),
    ],
)
def test_chats(fields: dict[str, Any], expected: Chat) -> None:
    sample = recognize(Row(fields, "here"))
    assert sample.chat == expected
    assert sample.plain is None


def test_sharegpt_speakers_become_roles() -> None:
    turns = [("system", "Be quick."), ("human", "Say"), ("gpt", "it"), ("observation", "3")]
    chat = chat_of(conversations=[{"from": speaker, "value": value} for speaker, value in turns])
    assert chat.messages == [SYSTEM, *EXCHANGE, {"role": "tool", "content": "3"}]
    called = {"from": "function_call", "value": '{"name": "add", "arguments": {"first": 1}}'}
    assert chat_of(conversations=[called]).messages == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


def test_tool_calls_get_arguments_as_objects() -> None:
    call = {"id": "1", **CALL, "function": {"name": "add", "arguments": '{"first": 1}'}}
    chat = chat_of(messages=[EXCHANGE[0], {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert chat.messages[1]["tool_calls"] == [{"id": "1", **CALL}]
    assert chat.messages[1]["content"] == ""


def test_the_empty_fields_of_arrow_tables_are_dropped() -> None:
    padded = [message | {"tool_calls": None, "name": None} for message in EXCHANGE]
    assert chat_of(messages=padded, tools=None).messages == EXCHANGE


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "Sa"}, {"type": "text", "text": "y"}]
    assert chat_of(messages=[{"role": "user", "content": parts}, EXCHANGE[1]]).messages == EXCHANGE


def test_alpaca_is_a_chat_and_a_text() -> None:
    bare = recognize(Row({"instruction": "Say", "input": "", "output": "it"}, "here"))
    assert bare.format == "Alpaca"
    assert bare.chat == Chat(EXCHANGE)
    assert bare.plain is not None
    assert bare.plain.prompt.endswith("### Instruction:\nSay\n\n### Response:\n")
    assert bare.plain.completion == "it"
    full = recognize(Row({"instruction": "Say", "input": "this", "output": "it", "system": "Be quick."}, "here"))
    assert full.chat == Chat([SYSTEM, {"role": "user", "content": "Say\n\nthis"}, EXCHANGE[1]])
    assert full.plain is not None
    assert "### Input:\nthis\n\n### Response:\n" in full.plain.prompt


def test_texts() -> None:
    pair = recognize(Row({"prompt": "[1, 2]", "completion": "it"}, "here"))
    assert pair.plain == Plain("[1, 2]", "it")  # though it could be read as a list
    assert pair.chat is not None
    assert pair.chat.messages[0]["content"] == "[1, 2]"
    assert recognize(Row({"text": "all", "meta": 1}, "here")).plain == Plain("", "all")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "a", "answer": "b"}, "fields question, answer, which are of no known kind of row"),
        ({}, "fields none"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": "hello"}, "not a list of messages but 'hello'"),
        ({"messages": ["hello"]}, r"messages\[0\] is not an object"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has no role; it has the fields content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content that is not text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "without a function's name"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from 'alien'; known are human"),
        ({"messages": EXCHANGE, "tools": "add"}, "not a list of JSON schemas"),
        ({"prompt": "a", "completion": 3}, "'completion' is not text but 3"),
    ],
)
def test_other_rows_are_refused_with_what_was_found(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        recognize(Row(fields, "here"))
