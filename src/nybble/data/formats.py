"""The shapes of rows that are understood, and how each becomes a chat or plain text.

| format            | fields                                        | becomes                                        |
|-------------------|-----------------------------------------------|------------------------------------------------|
| messages          | messages [tools, system]                      | a chat                                         |
| ShareGPT          | conversations, of from/value [tools, system]  | a chat                                         |
| Alpaca            | instruction, output [input, system]           | a chat, or plain text without a chat template  |
| prompt/completion | prompt, completion: two texts [system]        | a chat, or plain text without a chat template  |
| prompt/completion | prompt, completion: lists of messages [tools] | a chat; loss on the completion                 |
| text              | text                                          | plain text; loss on all of it                  |

A message with `"weight": 0` carries no loss. Lists may also be given as JSON text, as CSV files must.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nybble.data.source import Row

Message = dict[str, Any]


class RowError(ValueError):
    """A row that cannot be used; its text says why."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages as chat templates take them; assistant turns before `first_trained` carry no loss."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    first_trained: int = 0


@dataclass(frozen=True, slots=True)
class Plain:
    """Text as it stands: `completion` carries loss, `prompt` does not."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What a row says, in the renderings that its format allows: at least one of the two."""

    format: str
    chat: Chat | None = None
    plain: Plain | None = None


@dataclass(frozen=True, slots=True)
class Format:
    name: str
    required: tuple[str, ...]
    convert: Callable[[dict[str, Any]], tuple[Chat | None, Plain | None]]


def recognize(row: Row) -> Sample:
    """The sample in a row, whose format is the first whose fields it has. Raises RowError."""
    fields = {name: value for name, value in row.fields.items() if value is not None}
    for form in FORMATS:
        if all(name in fields for name in form.required):
            chat, plain = form.convert(fields)
            return Sample(form.name, chat, plain)
    raise RowError(f"has the fields {', '.join(fields) or 'none'}, which are of no known kind of row")


def known_formats() -> str:
    """The kinds of rows and the fields that tell them, for messages."""
    return "; ".join(f"{form.name} ({', '.join(form.required)})" for form in FORMATS)


def _from_messages(fields: dict[str, Any]) -> tuple[Chat, None]:
    return _chat(fields, _messages(fields, "messages")), None


def _from_conversations(fields: dict[str, Any]) -> tuple[Chat, None]:
    return _chat(fields, _messages(fields, "conversations")), None


def _from_alpaca(fields: dict[str, Any]) -> tuple[Chat, Plain]:
    instruction, answer = _text(fields, "instruction"), _text(fields, "output")
    context = _text(fields, "input") if fields.get("input") else ""
    question = f"{instruction}\n\n{context}" if context else instruction
    return _chat(fields, _exchange(question, answer)), Plain(_alpaca_prompt(instruction, context), answer)


def _from_prompt_completion(fields: dict[str, Any]) -> tuple[Chat, Plain | None]:
    if _holds_messages(fields["prompt"]):
        prompt, completion = _messages(fields, "prompt"), _messages(fields, "completion")
        return _chat(fields, prompt + completion, first_trained=len(prompt)), None
    question, answer = _text(fields, "prompt"), _text(fields, "completion")
    return _chat(fields, _exchange(question, answer)), Plain(question, answer)


def _from_text(fields: dict[str, Any]) -> tuple[None, Plain]:
    return None, Plain("", _text(fields, "text"))


FORMATS = (
    Format("messages", ("messages",), _from_messages),
    Format("ShareGPT", ("conversations",), _from_conversations),
    Format("Alpaca", ("instruction", "output"), _from_alpaca),
    Format("prompt/completion", ("prompt", "completion"), _from_prompt_completion),
    Format("text", ("text",), _from_text),
)

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def _holds_messages(value: Any) -> bool:
    entries = _decoded(value)
    return isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _alpaca_prompt(instruction: str, context: str) -> str:
    """The wording of Stanford Alpaca's train.py."""
    given = ", paired with an input that provides further context" if context else ""
    part = f"### Input:\n{context}\n\n" if context else ""
    return (
        f"Below is an instruction that describes a task{given}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{instruction}\n\n{part}### Response:\n"
    )


def _chat(fields: dict[str, Any], messages: list[Message], *, first_trained: int = 0) -> Chat:
    if fields.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(fields, "system")}, *messages]
        first_trained += 1 if first_trained else 0
    tools = _decoded(fields.get("tools")) or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError(f"'tools' is not a list of JSON schemas but {tools!r:.60}")
    return Chat(messages, _without_none(tools), first_trained)


def _messages(fields: dict[str, Any], name: str) -> list[Message]:
    entries = _decoded(fields[name])
    if not isinstance(entries, list) or not entries:
        raise RowError(f"{name!r} is not a list of messages but {entries!r:.60}")
    return [_message(entry, f"{name}[{index}]") for index, entry in enumerate(entries)]


def _message(entry: Any, where: str) -> Message:
    """`entry` with role and content, tool calls as objects, and without the empty fields that Arrow tables add."""
    if not isinstance(entry, dict):
        raise RowError(f"{where} is not an object but {entry!r:.60}")
    message: Message = _without_none(entry)
    if "from" in message and "value" in message:
        message = _from_sharegpt(message, where)
    if not isinstance(message.get("role"), str):
        raise RowError(f"{where} has no role; it has the fields {', '.join(message) or 'none'}")
    message["content"] = _content(message.get("content", ""), where)
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call, where) for call in message["tool_calls"]]
    return message


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker, value = message["from"], message["value"]
    if speaker not in _SHAREGPT_ROLES:
        raise RowError(f"{where} is from {speaker!r}; known are {', '.join(_SHAREGPT_ROLES)}")
    rest = {name: item for name, item in message.items() if name not in ("from", "value")}
    if speaker != "function_call":
        return {"role": _SHAREGPT_ROLES[speaker], "content": value, **rest}
    calls = _decoded(value)
    return {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call as templates expect it: arguments an object, where OpenAI's format has JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise RowError(f"{where} has a tool call without a function's name: {call!r:.60}")
    function = {**function, "arguments": _decoded(function.get("arguments", {}))}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def _content(value: Any, where: str) -> str:
    """Text, or the texts of a list of parts, joined."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RowError(f"{where} has content that is not text: {value!r:.60}")
    return "".join(str(text) for text in texts)


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise RowError(f"{name!r} is not text but {value!r:.60}")
    return value


def _decoded(value: Any) -> Any:
    """The object or list in a JSON text; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _without_none(value: Any) -> Any:
    """Arrow gives every object the fields of all of them; those that an object lacks hold None."""
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
