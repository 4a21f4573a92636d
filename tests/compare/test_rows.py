"""Which rows give the results."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from nybble.compare.rows import prepare_rows
from nybble.data.config import DataConfig
from tests.tiny import tiny_tokenizer


def test_test_rows_of_a_hub_dataset_are_its_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, subset: str | None, split: str) -> datasets.Dataset:
        asked.append((path, subset, split))
        return datasets.Dataset.from_list([{"text": f"Row {n} of {split}."} for n in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "One of training."}) + "\n")
    config = DataConfig(path=str(tmp_path), cache=False)
    rows = prepare_rows(config, tiny_tokenizer(), model_max_length=64, test="owner/data", chooses=False)
    assert asked == [("owner/data", None, "test")]
    assert len(rows.test) == 3


FORGETFUL = """
{%- for message in messages -%}
{{ message.role }}: {{ message.content if loop.last else message.content.split("</think>")[-1] }}
{% endfor -%}
{%- if add_generation_prompt %}assistant: {% endif -%}
"""


def test_turns_of_one_chat_do_not_both_choose_and_judge(tmp_path: Path) -> None:
    """A template that drops reasoning from earlier turns makes an example of each turn."""
    (tmp_path / "template.jinja").write_text(FORGETFUL)
    for split, number in (("train", 3), ("valid", 5)):
        turns = [
            ("user", "One?"),
            ("assistant", "Hm.</think>Two."),
            ("user", "And?"),
            ("assistant", "Ah.</think>Three."),
        ]
        messages = [{"role": role, "content": content} for role, content in turns]
        lines = [
            json.dumps({"messages": [*messages[:-1], {"role": "assistant", "content": f"{i}"}]}) for i in range(number)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    config = DataConfig(path=str(tmp_path), cache=False, chat_template=str(tmp_path / "template.jinja"))
    rows = prepare_rows(config, tiny_tokenizer(), model_max_length=256, test=None, chooses=True)
    assert len(rows.data.validation) + len(rows.test) == 10
    assert {example.row for example in rows.data.validation} == {0, 2, 4}
    assert {example.row for example in rows.test} == {1, 3}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_test_rows_that_are_trained_on_are_counted(tmp_path: Path, packing: bool, beside: bool) -> None:
    lines = [json.dumps({"text": f"Row {number} of some."}) for number in range(6)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:4]))
    (tmp_path / ("test.jsonl" if beside else "valid.jsonl")).write_text("\n".join(lines[1:3] + lines[4:]))
    config = DataConfig(path=str(tmp_path), cache=False, packing=packing, max_length=64)
    rows = prepare_rows(config, tiny_tokenizer(), model_max_length=64, test=None, chooses=False)
    assert (len(rows.test), rows.duplicates) == (4, 2)
