"""Questions from every kind of row, as the model is to see them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.data.config import DataConfig
from nybble.errors import UserError
from nybble.evaluation.questions import ChoiceQuestion, OpenQuestion, Questions, read_questions
from tests.tiny import BOS, tiny_tokenizer

Read = Callable[..., Questions]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def from_rows(*rows: dict[str, Any], tokenizer: Any = None, limit: int = 512, **data: Any) -> Questions:
        file = tmp_path / "asked.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(path="unused", **data)
        return read_questions(str(file), tokenizer or tiny_tokenizer(), config, max_positions=limit)

    return from_rows


def prompt(question: OpenQuestion, tokenizer: Any = None) -> str:
    return str((tokenizer or tiny_tokenizer()).decode(question.tokens))


def said(question: ChoiceQuestion) -> list[str]:
    """What of each candidate is scored."""
    tokenizer = tiny_tokenizer()
    return [str(tokenizer.decode(candidate.input_ids[candidate.trained])) for candidate in question.candidates]


def test_questions_in_all_shapes(read: Read) -> None:
    asked = "<|im_start|>user\nWhat is 1?<|im_end|>\n<|im_start|>assistant\n"
    chat = [{"role": "user", "content": "What is 1?"}]
    answer = [{"role": "assistant", "content": "It is odd."}]
    rows: list[dict[str, Any]] = [
        {"question": "What is 1?", "answer": "It is odd."},
        {"question": chat, "answer": "It is odd."},
        {"messages": chat + answer},
        {"prompt": "What is 1?", "completion": "It is odd."},
        {"instruction": "What is 1?", "output": "It is odd."},
    ]
    found = read(*rows)
    assert [prompt(question) for question in found.open] == [asked] * 5
    assert {question.expected for question in found.open} == {("It is odd.",)}
    assert {question.text for question in found.open} == {"What is 1?"}
    assert len(found) == 5
    several = read({"question": "q", "answer": ["one", 2], "system": "Be brief."}).open[0]
    assert several.expected == ("one", "2")
    assert prompt(several).startswith("<|im_start|>system\nBe brief.")


def test_only_the_last_answer_of_a_chat_is_asked_for(read: Read) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "Well.")]
    found = read({"messages": [{"role": role, "content": content} for role, content in turns]}).open[0]
    assert found.expected == ("Well.",)
    assert prompt(found).endswith("Hello<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")


def test_plain_text_where_there_is_no_chat_template(read: Read) -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    tokenizer.chat_template = None
    found = read({"question": "1 + 1 = ", "answer": "2"}, tokenizer=tokenizer)
    assert prompt(found.open[0], tokenizer) == f"{BOS}1 + 1 = "
    assert found.chat_template is None
    chosen = read({"question": "1 + 1 = ", "choices": ["2", "3"], "answer": 0}, tokenizer=tokenizer).choice[0]
    assert [str(tokenizer.decode(candidate.input_ids)) for candidate in chosen.candidates] == [
        f"{BOS}1 + 1 = 2",
        f"{BOS}1 + 1 = 3",
    ]


def test_choices(read: Read) -> None:
    rows = [
        {"question": "Which?", "choices": ["fox", "dog", "cat"], "answer": "dog"},
        {"question": "Which?", "choices": ["fox", "dog", "cat"], "answer": 2},
        {"question": "Which?", "choices": [5, 1], "answer": "1"},
    ]
    found = read(*rows).choice
    assert [question.right for question in found] == [1, 2, 1]
    assert said(found[0]) == ["fox", "dog", "cat"]


def test_a_number_among_choices_that_are_numbers(read: Read) -> None:
    rows = [
        {"question": "Which?", "choices": [0.5, 2.5], "answer": 2.5},
        {"question": "Which?", "choices": [7, 8, 9], "answer": 7},
        {"question": "Which?", "choices": [7, 8, 9], "answer": 2},
        {"question": "Which?", "choices": [5, 1], "answer": 1},  # the choice 1, which is number 1 too
        {"question": "Which?", "choices": ["1", "2", "3"], "answer": 1},  # choices are texts: it counts them
        {"question": "Which?", "choices": [3, 1, 2], "answer": "2"},
    ]
    assert [question.right for question in read(*rows).choice] == [1, 0, 2, 1, 1, 2]
    with pytest.raises(UserError, match="may be the choice 2 or choice number 2: write the choice as a text"):
        read({"question": "Which?", "choices": [1, 2, 3], "answer": 2})


def test_all_problems_are_listed(read: Read) -> None:
    with pytest.raises(UserError) as caught:
        read(
            {"question": "q", "choices": ["a", "b"], "answer": "c"},
            {"question": "q", "choices": ["a", "b"], "answer": 2},
            {"choices": ["a", "b"], "answer": 1},
            {"question": "q", "answer": ""},
            {"messages": [{"role": "user", "content": "no answer"}]},
        )
    assert str(caught.value).count("asked.jsonl, line") == 5
    assert "is none of its choices" in str(caught.value)
    assert "has choices but no question" in str(caught.value)
    assert "does not end in a question and its answer" in str(caught.value)
    with pytest.raises(UserError, match="longer than the 16 tokens"):
        read({"question": "long " * 20, "answer": "a"}, limit=16)


def test_a_folder_is_asked_from_its_test_split(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": name, "answer": "a"}) + "\n")
    config = DataConfig(path="unused")
    found = read_questions(str(tmp_path), tiny_tokenizer(), config, max_positions=None)
    assert [question.text for question in found.open] == ["test"]
    (tmp_path / "test.jsonl").unlink()
    found = read_questions(str(tmp_path), tiny_tokenizer(), config, max_positions=None)
    assert [question.text for question in found.open] == ["valid"]
