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
