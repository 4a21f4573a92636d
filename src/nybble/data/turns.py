"""Which characters of a rendered chat the assistant says.

It is found from the chat template itself: by its {% generation %} marks, or by comparing renderings of the first
messages of a chat with one another. No marker string of any model is known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from nybble.data.formats import Chat, Message, RowError
from nybble.data.template import ChatTemplate, Rendered, Span


def render_turns(template: ChatTemplate, chat: Chat) -> Iterator[Rendered]:
    """Renderings in which each assistant turn is trained once, as the model would produce it. Raises RowError.

    A turn belongs to a rendering that begins with the turn's own. Most templates give one for all turns; where earlier
    turns change later on, as when reasoning is dropped from them, those get renderings of their own.
    """
    turns = _trained_turns(chat)
    if not turns:
        raise RowError("has no assistant turn to train on")
    texts = {turn: template.render(chat, turn + 1) for turn in turns}
    held: dict[int, tuple[int, int]] = {}  # turn -> (turn whose rendering holds it, where it ends there)
    last = turns[-1]
    for turn in reversed(turns):
        end = _shared_end(template, texts[turn], texts[last])
        if end is None:
            last, end = turn, len(texts[turn])
        held[turn] = (last, end)
    for last, members in groupby(turns, key=lambda turn: held[turn][0]):
        yield _rendering(template, chat, texts[last], {turn: held[turn][1] for turn in members})


def common_prefix(one: str, other: str) -> int:
    """How many characters two texts share from their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _trained_turns(chat: Chat) -> list[int]:
    return [
        index
        for index, message in enumerate(chat.messages)
        if message["role"] == "assistant" and index >= chat.first_trained and message.get("weight", 1) != 0
    ]


def _shared_end(template: ChatTemplate, own: str, text: str) -> int | None:
    """Where a turn whose rendering is `own` ends in `text`, if both agree up to there; None if they do not.

    What follows the turn's first end token may differ: some templates close the whole conversation with another.
    """
    ends = [*template.ending(own)[1], len(own)]
    return next((end for end in reversed(ends) if text.startswith(own[:end])), None)


def _rendering(template: ChatTemplate, chat: Chat, text: str, ends: dict[int, int]) -> Rendered:
    """`text` with the spans of the turns that it holds, given where each of them ends."""
    marks = template.marks(chat, max(ends) + 1) if template.has_marks else None
    spans: list[Span] = []
    altered = 0
    for turn, end in ends.items():
        turn_spans = _turn_spans(template, chat, turn, text[:end], marks)
        altered += not _says("".join(text[slice(*span)] for span in turn_spans), chat.messages[turn])
        spans += turn_spans
    unended = spans[-1][1] == len(text) and not template.ending(text)[1]
    return Rendered(text, tuple(spans), add_eos=unended, altered=altered)


def _turn_spans(template: ChatTemplate, chat: Chat, turn: int, spoken: str, marks: list[Span] | None) -> list[Span]:
    """What the assistant says in the turn in which `spoken` ends, and its end token.

    White space behind the end token only separates turns, so it carries no loss.
    """
    content_end, ends = template.ending(spoken)
    end = ends[-1] if ends else len(spoken)
    if marks is None:
        spans = [(_start(template, chat, turn, spoken), end)]
    else:
        before = common_prefix(template.render(chat, turn), spoken) if turn else 0
        spans = [(start, min(stop, end)) for start, stop in marks if stop > before and start < end]
        if spans and spans[-1][1] >= content_end:  # many marks leave the end token out
            spans[-1] = (spans[-1][0], end)
    if not spans:
        raise RowError(f"has nothing to train on in message {turn}: the chat template leaves the answer out")
    _check_said(spoken[spans[0][0] : content_end], chat.messages[turn], turn)
    return spans


def _start(template: ChatTemplate, chat: Chat, turn: int, spoken: str) -> int:
    """Where the answer begins: behind the generation prompt."""
    prompt = template.render(chat, turn, generation_prompt=True) if turn else ""
    if turn and spoken.startswith(prompt):
        return len(prompt)
    # The prompt opens what this turn does not have, a <think> block say. Take what precedes any answer instead: the
    # beginning that two different ones share.
    answers: list[Message] = [{"role": "assistant", "content": content} for content in "01"]
    one, other = (template.render(Chat([*chat.messages[:turn], answer], chat.tools), turn + 1) for answer in answers)
    header = one[: common_prefix(one, other)]
    if not spoken.startswith(header):
        raise RowError(f"cannot be aligned: the chat template changes what precedes message {turn} when it is added")
    return len(header)


def _check_said(said: str, message: Message, turn: int) -> None:
    if message["content"].strip() and not said.strip():
        raise RowError(f"has nothing to train on in message {turn}: the chat template leaves the answer out")
    missing = [
        call["function"]["name"] for call in message.get("tool_calls", []) if call["function"]["name"] not in said
    ]
    if missing:
        raise RowError(
            f"loses a call of {missing[0]!r} in message {turn}: the chat template does not render tool calls"
        )


def _says(said: str, message: Message) -> bool:
    """Whether a message's content is in what is said, white space aside."""
    return "".join(message["content"].split()) in "".join(said.split())
