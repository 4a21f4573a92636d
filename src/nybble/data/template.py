"""A chat template: the tokenizer's own, or one from a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from nybble.data.formats import Chat, RowError
from nybble.errors import UserError

Span = tuple[int, int]  # positions of characters, the second one excluded

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A sample as text, and the spans of it that carry loss.

    `add_bos` and `add_eos` ask for these tokens in front and behind, unless the text has them. `altered`: answers that
    the template renders otherwise than they are written, as when it drops reasoning.
    """

    text: str
    spans: tuple[Span, ...]
    add_bos: bool = False
    add_eos: bool = False
    altered: int = 0


class ChatTemplate:
    """Renders chats. `text` is the template itself; `has_marks`: its {% generation %} marks what the assistant says."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, *, given: bool) -> None:
        self.text = text
        self.has_marks = _GENERATION_MARK.search(text) is not None
        self._tokenizer = tokenizer
        self._given = text if given else None  # a tokenizer may choose between templates of its own
        self._special = special_texts(tokenizer)

    @classmethod
    def find(cls, tokenizer: PreTrainedTokenizerBase, file: str | None) -> ChatTemplate | None:
        """The template in `file`, else the tokenizer's, else None. Raises UserError if `file` cannot be read."""
        if file is not None:
            return cls(tokenizer, _read(file), given=True)
        try:
            return cls(tokenizer, str(tokenizer.get_chat_template()), given=False)
        except ValueError:  # it has none
            return None

    def render(self, chat: Chat, count: int, *, generation_prompt: bool = False) -> str:
        """The first `count` messages as text. Raises RowError with the template's reason where it refuses them."""
        return str(self._apply(chat, count, tokenize=False, add_generation_prompt=generation_prompt))

    def marks(self, chat: Chat, count: int) -> list[Span]:
        """What the template marks in that text, a span for each run of tokens."""
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

    def ending(self, text: str) -> tuple[int, list[int]]:
        """Where the special tokens and white space in which `text` ends begin, and the position behind each token."""
        position = len(text.rstrip())
        ends: list[int] = []
        while token := next((token for token in self._special if text.endswith(token, 0, position)), None):
            ends.insert(0, position)
            position = len(text[: position - len(token)].rstrip())
        return position, ends

    def _apply(self, chat: Chat, count: int, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                chat.messages[:count], tools=chat.tools, chat_template=self._given, **options
            )
        # Templates are programs: what they do to unexpected messages ends in any of these.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RowError(f"is refused by the chat template: {error}") from error


def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts of the tokens that the tokenizer keeps out of ordinary text: ends of turns, of text, and so on."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _read(file: str) -> str:
    where = f"data.chat_template: {file}"
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("no such file", where=where) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=where) from None
    if not text.strip():
        raise UserError("is empty", where=where)
    return text
