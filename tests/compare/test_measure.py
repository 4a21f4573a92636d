"""What is asked of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from nybble.compare import measure
from nybble.compare.measure import SHOWN_SAMPLES, AskedRows
from nybble.data.config import DataConfig
from nybble.data.prepare import prepare_data
from nybble.models.config import ModelConfig
from tests.tiny import tiny_tokenizer

Ask = Callable[..., AskedRows]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    def of(rows: list[dict[str, Any]], *, most: int = 9, **settings: Any) -> AskedRows:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(path=str(file), cache=False, **settings)
        return AskedRows.of_rows(
            prepare_data(config, tiny_tokenizer(), model_max_length=512).train, tiny_tokenizer(), most
        )

    return of


def chat(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]}


def test_the_last_answer_is_asked_for_behind_what_precedes_it(ask: Ask) -> None:
    asked = ask([chat("Hi", "Hello", "And?", "Well.", "Bye"), {"prompt": "What is 1?", "completion": "Odd."}])
    assert asked.scored
    prompts, expected = asked.texts(tiny_tokenizer())
    assert prompts == (
        "user\nHi\nassistant\nHello\nuser\nAnd?\nassistant",
        "user\nWhat is 1?\nassistant",
    )
    assert expected == ("Well.", "Odd.")


def test_plain_prompts_have_answers_too(ask: Ask) -> None:
    asked = ask([{"prompt": "1 + 1 = ", "completion": "2"}], use_chat_template=False)
    assert asked.scored
    assert asked.texts(tiny_tokenizer()) == (("1 + 1 =",), ("2",))


def test_answers_that_were_cut_are_left_out_and_so_is_what_is_too_much(ask: Ask) -> None:
    rows = [chat(f"What is {n}?", "It is odd. " * (20 if n == 0 else 1)) for n in range(5)]
    asked = ask(rows, most=3, max_length=64)
    prompts, expected = asked.texts(tiny_tokenizer())
    assert [prompt.splitlines()[1] for prompt in prompts] == ["What is 1?", "What is 2?", "What is 3?"]
    assert set(expected) == {"It is odd."}


@pytest.mark.parametrize("settings", [{}, {"train_on": "all"}])
def test_texts_have_none(ask: Ask, settings: dict[str, Any]) -> None:
    row = chat("Hi, how are you?", "I am well.") if settings else {"text": "The quick brown fox jumps over it."}
    asked = ask([row] * 9, **settings)
    assert not asked.scored
    assert len(asked) == SHOWN_SAMPLES
    prompt, text = asked.prompts[0], asked.prompts[0] + asked.expected[0]
    assert len(prompt) == len(text) // 2
    assert len(ask([row] * 9, most=2, **settings)) == 2
    assert len(ask([row] * 9, most=0, **settings)) == 0


@pytest.mark.parametrize("trusted", [False, True])
def test_merging_runs_code_of_the_model_where_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    given: dict[str, Any] = {}

    def merge(*_: object, **options: Any) -> SimpleNamespace:
        given.update(options)
        return SimpleNamespace(measured={})

    monkeypatch.setattr(measure, "merge_checkpoint", merge)
    for name in ("Checkpoint", "read_adapter", "measure_on"):
        monkeypatch.setattr(measure, name, Mock())
    model = ModelConfig(name="m", trust_remote_code=trusted)
    assert measure.merge_results(model, tmp_path, [], tmp_path, batch_size=1, progress=False) == ()
    assert given["trust_remote_code"] is trusted
