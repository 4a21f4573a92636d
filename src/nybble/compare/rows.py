"""Which held-out rows choose learning rates and checkpoints, and which give the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from nybble.data.config import DataConfig
from nybble.data.example import Example
from nybble.data.prepare import PreparedData, find_sources, prepare_data
from nybble.data.source import split_files
from nybble.errors import UserError


@dataclass(frozen=True)
class ComparedRows:
    """data: to train on, with the rows that choose as its held-out ones (none if nothing is chosen); test: results.

    validation_source, test_source: where they come from, in words.
    """

    data: PreparedData
    test: Sequence[Example]
    validation_source: str
    test_source: str

    @cached_property
    def duplicates(self) -> int:
        """How many of the test rows are training rows too, token for token, so that losses on them flatter."""
        trained = set[int]().union(*map(_samples, self.data.train))
        return sum(not trained.isdisjoint(_samples(example)) for example in self.test)


def prepare_rows(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_max_length: int | None,
    test: str | None,
    chooses: bool,
    progress: bool = False,
) -> ComparedRows:
    """Rows of `config`; test rows are those named by `test`, or a test file beside the data's, or held-out rows.

    chooses: whether something is chosen by held-out rows, a learning rate or a checkpoint. If so, and test rows have
    no place of their own, every second held-out row is one. If not, all held-out rows are.
    """
    data = prepare_data(config, tokenizer, model_max_length=model_max_length, progress=progress)
    place = test or _test_file(config)
    if place is not None:
        own = _only(config, place)
        rows = prepare_data(own, tokenizer, model_max_length=model_max_length, progress=progress).train
        if chooses and not data.validation:
            raise _lacks("validation", config)
        kept = data if chooses else _without_held_out(data)
        return ComparedRows(kept, rows, f"held-out rows of {config.path}" if chooses else "none", place)
    if not data.validation:
        raise _lacks("held-out", config)
    if not chooses:
        source = f"all held-out rows of {config.path}"
        return ComparedRows(_without_held_out(data), data.validation, "none: nothing was chosen by them", source)
    choosing, judging = _halves(data.validation)
    if not judging:
        raise UserError("one held-out row cannot both choose and judge", where=config.path, fix="Hold out more.")
    every_second = "every second held-out row of {}, beginning with the {}"
    return ComparedRows(
        replace(data, validation=choosing),
        judging,
        every_second.format(config.path, "first"),
        every_second.format(config.path, "second"),
    )


def require_held_out_rows(data: DataConfig, test: str | None) -> None:
    """Raise UserError, before anything is loaded, if no row could tell arms apart."""
    folder = Path(data.path).expanduser()
    named = data.validation_fraction or data.validation_path or data.validation_split or test
    if not named and not (folder.is_dir() and split_files(folder, "validation")):
        raise _lacks("held-out", data)


def digest_rows(data: DataConfig, test: str | None) -> dict[str, str]:
    """Of the files with training, validation and test rows, so that others at the same place are told from them.

    Left out are rows of the hub, and files that cannot be read: whoever needs their rows says more about it.
    """
    try:
        train, held_out = find_sources(data)
        place = test or _test_file(data)
        judging = find_sources(_only(data, place))[0] if place else held_out or train
    except UserError:
        return {}
    sources = {"training rows": train, "validation rows": held_out or train, "test rows": judging}
    return {name: digest for name, source in sources.items() if source.files and (digest := source.digest())}


def _samples(example: Example) -> set[int]:
    """What tells the samples of an example apart from others."""
    tokens = example.input_ids[: sum(example.lengths)].split_with_sizes(list(example.lengths))
    return {hash(sample.numpy().tobytes()) for sample in tokens}


def _halves(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Those of every second row, and the others. What one row gives, as turns of a chat, stays together."""
    numbers = {row: number for number, row in enumerate(dict.fromkeys(example.row for example in examples))}
    halves: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        halves[numbers[example.row] % 2].append(example)
    return halves


def _test_file(config: DataConfig) -> str | None:
    """A test file in the data's folder, unless that is what is held out already."""
    folder = Path(config.path).expanduser()
    if config.validation_path or config.validation_split or config.validation_fraction or not folder.is_dir():
        return None
    found = split_files(folder, "test")
    return str(found[0]) if len(found) == 1 and found != split_files(folder, "validation") else None


def _only(config: DataConfig, place: str) -> DataConfig:
    """All rows at `place`, one a sequence."""
    elsewhere = {"path": place, "split": "test", "validation_path": None, "validation_fraction": 0.0}
    return config.model_copy(update=elsewhere | {"validation_split": None, "packing": False, "max_rows": None})


def _without_held_out(data: PreparedData) -> PreparedData:
    return replace(data, validation=(), validation_report=None)


def _lacks(rows: str, data: DataConfig) -> UserError:
    fix = "Set data.validation_path or data.validation_fraction, or put a valid.jsonl beside train.jsonl."
    return UserError(f"holds out no rows to compare arms by (no {rows} rows)", where=data.path, fix=fix)
