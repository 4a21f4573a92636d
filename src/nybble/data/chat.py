"""Samples as the text that a model sees, and the spans of it that carry loss.

A span is a pair of character positions. Which characters the assistant speaks is found from the chat template itself:
by its `{% generation %}` marks, or by comparing renderings of the first messages of a chat with one another.
No marker string of any model is known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from nybble.data.formats import Chat, Plain, RowError, Sample
from nybble.errors import UserError

Span = tuple[int, int]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A sample as text. `add_bos` and `add_eos` ask for these tokens in front and behind, unless the text has them."""

    text: str
    spans: tuple[Span, ...]
    add_bos: bool
    add_eos: bool


class Renderer:
    """Turns samples into text by a tokenizer's chat template, or by the template in a file.

    `template` is the template's text, None where there is none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template_file: str | None = None,
        train_on: str = "assistant",
        use_chat_template: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._given = _read_template(template_file) if template_file else None
        self.template: str | None = self._given or _own_template(tokenizer)
        self._has_marks = self.template is not None and _GENERATION_MARK.search(self.template) is not None
        self._train_on = train_on
        self._prefer_chat = use_chat_template and self.template is not None
        self._special = special_texts(tokenizer)

    def render(self, sample: Sample) -> list[Rendered]:
        """One rendering, or several where earlier turns are rendered otherwise later on. Raises RowError, UserError."""
        if sample.chat and (self._prefer_chat or not sample.plain):
            return self._render_chat(sample.chat)
        assert sample.plain is not None
        return [self._render_plain(sample.plain)]

    def _render_plain(self, plain: Plain) -> Rendered:
        text = plain.prompt + plain.completion
        start = 0 if self._train_on == "all" else len(plain.prompt)
        return Rendered(text, ((start, len(text)),), add_bos=True, add_eos=True)

    def _render_chat(self, chat: Chat) -> list[Rendered]:
        if self.template is None:
            raise UserError(
                "the tokenizer has no chat template, and the data are chats",
                where="data.chat_template",
                fix="Give a file with a Jinja chat template, or the instruction-tuned version of the model.",
            )
        if self._train_on == "all":
            text = self._text(chat, len(chat.messages))
            return [self._rendered(text, [(0, len(text))])]
        turns = _trained_turns(chat)
        if not turns:
            raise RowError("has no assistant turn to train on")
        return list(self._render_turns(chat, turns))

    def _render_turns(self, chat: Chat, turns: list[int]) -> Iterator[Rendered]:
        """Each turn is trained once, in a rendering that begins with the turn's own.

        That is the text in which the model would produce it. Most templates give one rendering for all turns; where
        earlier turns change later on, as when reasoning is dropped from them, those get renderings of their own.
        """
        texts = {turn: self._text(chat, turn + 1) for turn in turns}
        held: dict[int, tuple[int, int]] = {}  # turn -> (turn whose rendering holds it, where it ends there)
        last = turns[-1]
        for turn in reversed(turns):
            end = self._shared_end(texts[turn], texts[last])
            if end is None:
                last, end = turn, len(texts[turn])
            held[turn] = (last, end)
        for last, members in groupby(turns, key=lambda turn: held[turn][0]):
            text = texts[last]
            marks = self._marks(chat, last + 1) if self._has_marks else None
            yield self._rendered(
                text, [span for turn in members for span in self._spans(chat, turn, text[: held[turn][1]], marks)]
            )

    def _shared_end(self, own: str, text: str) -> int | None:
        """Where a turn whose rendering is `own` ends in `text`, if both agree up to there; None if they do not.

        What follows the turn's first end token may differ: some templates close the whole conversation with another.
        """
        ends = [*self._ending(own)[1], len(own)]
        return next((end for end in reversed(ends) if text.startswith(own[:end])), None)

    def _ending(self, text: str) -> tuple[int, list[int]]:
        """Where the special tokens and white space in which `text` ends begin, and the position behind each token."""
        position = len(text.rstrip())
        ends: list[int] = []
        while token := next((token for token in self._special if text.endswith(token, 0, position)), None):
            ends.insert(0, position)
            position = len(text[: position - len(token)].rstrip())
        return position, ends

    def _spans(self, chat: Chat, turn: int, spoken: str, marks: list[Span] | None) -> list[Span]:
        """What the assistant says in the turn in which `spoken` ends, and its end token.

        White space behind the end token only separates turns, so it carries no loss.
        """
        content_end, ends = self._ending(spoken)
        end = ends[-1] if ends else len(spoken)
        if marks is None:
            spans = [(self._start(chat, turn, spoken), end)]
        else:
            before = common_prefix(self._text(chat, turn), spoken) if turn else 0
            spans = [(start, min(stop, end)) for start, stop in marks if before <= start < end]
            if spans and spans[-1][1] >= content_end:  # many marks leave the end token out
                spans[-1] = (spans[-1][0], end)
        if not spans or spans[-1][0] >= end:
            raise RowError(f"has nothing to train on in message {turn}: the chat template leaves the answer out")
        return spans

    def _start(self, chat: Chat, turn: int, spoken: str) -> int:
        """Where the answer begins: behind the generation prompt."""
        prompt = self._text(chat, turn, generation_prompt=True) if turn else ""
        if turn and spoken.startswith(prompt):
            return len(prompt)
        # The prompt opens what this turn does not have, a <think> block say. Take what precedes any answer instead:
        # the beginning that two different ones share.
        one, other = (
            self._text(Chat([*chat.messages[:turn], {"role": "assistant", "content": answer}], chat.tools), turn + 1)
            for answer in "01"
        )
        header = one[: common_prefix(one, other)]
        if not spoken.startswith(header):
            raise RowError(
                f"cannot be aligned: the chat template changes what precedes message {turn} when it is added"
            )
        return len(header)

    def _marks(self, chat: Chat, count: int) -> list[Span]:
        """The spans that the template marks by {% generation %}, each that of a run of tokens."""
        encoded = self._apply(
            chat,
            count,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )
        tokens = zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True)
        runs = [list(run) for marked, run in groupby(tokens, key=lambda token: token[0]) if marked]
        return [(run[0][1][0], run[-1][1][1]) for run in runs]

    def _rendered(self, text: str, spans: list[Span]) -> Rendered:
        unended = spans[-1][1] == len(text) and not self._ending(text)[1]
        return Rendered(text, tuple(spans), add_bos=False, add_eos=unended)

    def _text(self, chat: Chat, count: int, *, generation_prompt: bool = False) -> str:
        return str(self._apply(chat, count, tokenize=False, add_generation_prompt=generation_prompt))

    def _apply(self, chat: Chat, count: int, **options: Any) -> Any:
        """The template applied to the first `count` messages."""
        try:
            return self._tokenizer.apply_chat_template(
                chat.messages[:count], tools=chat.tools, chat_template=self._given, **options
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RowError(f"is refused by the chat template: {error}") from error


def common_prefix(one: str, other: str) -> int:
    """How many characters two texts share from their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts of the tokens that the tokenizer keeps out of ordinary text: ends of turns, of text, and so on."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _trained_turns(chat: Chat) -> list[int]:
    return [
        index
        for index, message in enumerate(chat.messages)
        if message["role"] == "assistant" and index >= chat.first_trained and message.get("weight", 1) != 0
    ]


def _read_template(file: str) -> str:
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("no such file", where=f"data.chat_template: {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=f"data.chat_template: {file}") from None
    if not text.strip():
        raise UserError("is empty", where=f"data.chat_template: {file}")
    return text


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # it has none
        return None
