"""Questions whose answers are known, one a row of a file.

| row      | fields                                                                                               |
|----------|------------------------------------------------------------------------------------------------------|
| question | `question`, and `answer`: what is to be said, or a list of texts of which any will do                |
| choice   | `question`, `choices`: a list of texts, and `answer`: the right one's text, or its number from 0     |
| training | any row that can be trained on and ends in an answer (`nybble.data.formats`): its last answer counts |

`question` is a text, or a list of messages that ends before the answer; `system` may stand beside it. The model sees it
as it saw its training rows: by the chat template, or without one as plain text, followed by the answer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nybble.data.chat import Renderer
from nybble.data.config import DataConfig
from nybble.data.encode import Encoder
from nybble.data.example import Example
from nybble.data.formats import RowError, Sample, recognize
from nybble.data.source import SHOWN_PROBLEMS, Row, Source, split_files
from nybble.data.template import Rendered
from nybble.errors import UserError, listed


@dataclass(frozen=True, slots=True)
class OpenQuestion:
    """To be answered in the model's own words. tokens: of the prompt, up to where the answer begins."""

    where: str
    text: str
    tokens: tuple[int, ...]
    expected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """To be answered by the likeliest of `choices`; `candidates` are the whole sequences, loss on the choice alone."""

    where: str
    text: str
    choices: tuple[str, ...]
    candidates: tuple[Example, ...]
    right: int


@dataclass(frozen=True, slots=True)
class Questions:
    """chat_template: what they were rendered with, None if as plain text."""

    open: tuple[OpenQuestion, ...]
    choice: tuple[ChoiceQuestion, ...]
    chat_template: str | None

    def __len__(self) -> int:
        return len(self.open) + len(self.choice)


def read_questions(
    path: str, tokenizer: PreTrainedTokenizerBase, data: DataConfig, *, max_positions: int | None
) -> Questions:
    """The questions in a file, in a folder's test or else validation split, or in `data.split` of a hub dataset.

    `data` says how they are rendered, and how many are read. Raises UserError that lists the rows that cannot be used.
    """
    renderer = Renderer(tokenizer, template_file=data.chat_template, use_chat_template=data.use_chat_template)
    reader = _Reader(renderer, Encoder(tokenizer, max_positions or sys.maxsize))
    found: list[OpenQuestion | ChoiceQuestion] = []
    problems: list[str] = []
    for row in Source.find(path, split=_split(path, data), subset=data.subset, max_rows=data.max_rows).rows():
        try:
            found.append(reader.question(row))
        except RowError as error:
            problems.append(f"{row.where} {error}")
    if problems:
        fix = "Rows need the fields question and answer, choices beside them, or those of a row to train on."
        raise UserError(listed("rows that are no questions:", problems, most=SHOWN_PROBLEMS), where=path, fix=fix)
    return Questions(
        tuple(question for question in found if isinstance(question, OpenQuestion)),
        tuple(question for question in found if isinstance(question, ChoiceQuestion)),
        renderer.template,
    )


class _Reader:
    def __init__(self, renderer: Renderer, encoder: Encoder) -> None:
        self._renderer = renderer
        self._encoder = encoder

    def question(self, row: Row) -> OpenQuestion | ChoiceQuestion:
        """Raises RowError."""
        fields = {name: value for name, value in row.fields.items() if value is not None}
        if "choices" in fields:
            return self._choice(row, fields)
        if "question" in fields:
            expected = _texts(fields, "answer")
            sample = _asked(fields, expected[0], row.where)
        else:
            sample = recognize(row)
            expected = (_answer_of(sample),)
        asked = self._encode([self._renderer.render_question(sample)])[0]
        return OpenQuestion(row.where, _question_of(sample), tuple(asked.input_ids.tolist()), expected)

    def _choice(self, row: Row, fields: dict[str, Any]) -> ChoiceQuestion:
        choices = _texts(fields, "choices")
        right = _right(fields, choices)
        samples = [_asked(fields, choice, row.where) for choice in choices]
        # Of the renderings of a chat the last one holds its last answer.
        rendered = [self._renderer.render(sample)[-1] for sample in samples]
        candidates = self._encode([_without_end(*pair) for pair in zip(rendered, choices, strict=True)])
        return ChoiceQuestion(row.where, _question_of(samples[0]), choices, tuple(candidates), right)

    def _encode(self, rendered: Sequence[Rendered]) -> list[Example]:
        encoded = list(self._encoder.encode([(0, text) for text in rendered]))
        if any(sample.truncated for sample in encoded):
            raise RowError(f"is longer than the {self._encoder.max_length} tokens that the model can read")
        return [sample.example for sample in encoded]


def _split(path: str, data: DataConfig) -> str:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return data.split
    return "test" if split_files(folder, "test") else "validation"


def _asked(fields: dict[str, Any], answer: str, where: str) -> Sample:
    """The question with one answer, as the sample that could be trained on."""
    if "question" not in fields:
        raise RowError("has choices but no question")
    question = fields["question"]
    completion = answer if isinstance(question, str) else [{"role": "assistant", "content": answer}]
    beside = {name: fields[name] for name in ("system", "tools") if name in fields}
    return recognize(Row({"prompt": question, "completion": completion} | beside, where))


def _without_end(rendered: Rendered, choice: str) -> Rendered:
    """The rendering with loss on the choice alone.

    The end of the turn is left out: models that were tuned to answer in sentences find the end after one word so
    unlikely (SmolLM2-135M: -14 nats after "Paris") that it would decide, and other harnesses leave it out as well.
    """
    start, end = rendered.spans[-1]
    at = rendered.text.find(choice.strip(), start, end)
    span = (start, at + len(choice.strip()) if at >= 0 else end)
    return replace(rendered, spans=(span,), add_eos=False)


def _texts(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    """The texts of a field that holds one or several; numbers are taken as they are written."""
    value = fields.get(name)
    values = _as_list(value)
    texts = tuple(str(item) for item in values if isinstance(item, str | int | float) and not isinstance(item, bool))
    if not values or len(texts) < len(values) or not all(text.strip() for text in texts):
        raise RowError(f"{name!r} is no text and no list of texts but {value!r:.60}")
    return texts


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _right(fields: dict[str, Any], choices: tuple[str, ...]) -> int:
    """The number of the right choice. An `answer` that is a number may be one of `choices` if these are numbers too.

    Raises RowError for an answer that is none of them, or could be two.
    """
    answer, given = fields.get("answer"), _as_list(fields["choices"])
    found = {choices.index(answer)} if answer in choices else set()
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        found |= {given.index(answer)} if answer in given else set()
        found |= {answer} if isinstance(answer, int) and 0 <= answer < len(choices) else set()
    if len(found) == 1:
        return found.pop()
    if found:
        raise RowError(f"'answer' may be the choice {answer} or choice number {answer}: write the choice as a text")
    raise RowError(f"'answer' is none of its choices and no number from 0 to {len(choices) - 1}, but {answer!r:.60}")


def _question_of(sample: Sample) -> str:
    if sample.chat:
        return str(sample.chat.messages[-2]["content"]) if len(sample.chat.messages) > 1 else ""
    assert sample.plain is not None
    return sample.plain.prompt


def _answer_of(sample: Sample) -> str:
    if sample.chat:
        return str(sample.chat.messages[-1]["content"])
    assert sample.plain is not None
    return sample.plain.completion
