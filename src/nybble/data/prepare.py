"""From the `data` section to examples ready to train on, with a report of what became of the rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nybble.data import cache
from nybble.data.chat import Renderer
from nybble.data.config import DataConfig
from nybble.data.encode import Encoded, Encoder
from nybble.data.example import Example, divided, joined
from nybble.data.formats import RowError, known_formats, recognize
from nybble.data.packing import pack
from nybble.data.source import SHOWN_PROBLEMS, Row, Source, split_files
from nybble.data.template import Rendered
from nybble.errors import UserError, listed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of the rows.

    `samples`: one a row, or more where a chat template needs it; `truncated`: cut to max_length; `dropped`: left
    without a trained token by the cut; `altered`: answers that the chat template renders otherwise than they are
    written, as when it drops reasoning; `tokens`, `target_tokens`, `longest`: of what is kept, without padding;
    `sequences`: examples after packing; `padding_share`: of the positions in packed sequences; `duplicates`: held-out
    rows that are also training rows; `ended`: kept samples that train an end token.
    """

    rows: int
    samples: int
    truncated: int
    dropped: int
    tokens: int
    target_tokens: int
    longest: int
    sequences: int
    ended: int
    bos_doubled: bool
    bos_missing: bool
    formats: dict[str, int] = field(default_factory=dict)
    altered: int = 0
    duplicates: int = 0
    padding_share: float = 0.0

    @property
    def eos_trained(self) -> bool:
        """Whether every sample that was not cut trains the token that ends it, and at least one does."""
        return self.ended >= max(1, self.samples - self.truncated)


@dataclass(frozen=True, slots=True)
class PreparedData:
    """`chat_template`: the text of the template used, to be saved with the adapter; None if there is none.

    `from_cache`: an earlier run tokenized them.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    report: DataReport
    validation_report: DataReport | None
    chat_template: str | None
    from_cache: bool = False


def prepare_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, model_max_length: int | None, progress: bool = False
) -> PreparedData:
    """Read, render, tokenize, cut, split and pack as `config` says. Held-out examples are never packed.

    With `config.cache`, what an earlier run made of the same data is taken over.
    Raises UserError for a `max_length` above the model's, for rows that cannot be used, and when nothing is left.
    """
    max_length = config.length_within(model_max_length)
    renderer = Renderer(
        tokenizer,
        template_file=config.chat_template,
        train_on=config.train_on,
        use_chat_template=config.use_chat_template,
    )
    encoder = Encoder(tokenizer, max_length)
    sources = find_sources(config)
    key = _cache_key(config, encoder, sources, tokenizer, renderer.template) if config.cache else None
    if key and (kept := cache.read(key)):
        return _from_tensors(*kept, chat_template=renderer.template)
    train_rows, held_out = _read_splits(config, sources)
    train, report = _examples(train_rows, renderer, encoder, progress=progress)
    validation: list[Example] = []
    validation_report = None
    if held_out:
        validation, validation_report = _examples(held_out, renderer, encoder, seen=train_rows, progress=progress)
    if config.packing:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        train = pack(train, max_length, pad_token_id=pad)
        report = _after_packing(report, train)
    data = PreparedData(train, validation, report, validation_report, renderer.template)
    if key:
        cache.write(key, *_as_tensors(data))
    return data


def split_held_out(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows, both in the order of the data.

    Rows are ranked by a seeded hash of what they say, so identical rows fall on one side, and a row stays on its side
    when others are added (but for those near the border).
    """
    ranks = [_fingerprint(row, seed) for row in rows]
    count = max(1, round(fraction * len(rows)))
    border = sorted(ranks)[count - 1]
    train = [row for row, rank in zip(rows, ranks, strict=True) if rank > border]
    held_out = [row for row, rank in zip(rows, ranks, strict=True) if rank <= border]
    if not train:
        raise UserError(
            f"holds out all of the {len(rows)} rows",
            where="data.validation_fraction",
            fix="Use a smaller one, or more rows.",
        )
    return train, held_out


def find_sources(config: DataConfig) -> tuple[Source, Source | None]:
    """Where training rows are, and where held-out rows are if they have a place of their own."""
    train = Source.find(config.path, split=config.split, subset=config.subset, max_rows=config.max_rows)
    if config.validation_path and config.validation_fraction:
        raise UserError("is set beside data.validation_path", where="data.validation_fraction", fix="Use one of them.")
    if config.validation_fraction:
        return train, None
    if config.validation_path:
        split = config.validation_split or ("validation" if Path(config.validation_path).is_dir() else config.split)
        return train, Source.find(config.validation_path, split=split, subset=config.subset)
    if config.validation_split:
        return train, Source.find(config.path, split=config.validation_split, subset=config.subset)
    folder = Path(config.path).expanduser()
    if config.split == "train" and folder.is_dir() and split_files(folder, "validation"):
        return train, Source.find(config.path, split="validation")
    return train, None


def _read_splits(config: DataConfig, sources: tuple[Source, Source | None]) -> tuple[list[Row], list[Row]]:
    train, held_out = sources
    rows = train.rows()
    if config.validation_fraction:
        return split_held_out(rows, config.validation_fraction, config.seed)
    return rows, held_out.rows() if held_out else []


def _cache_key(
    config: DataConfig,
    encoder: Encoder,
    sources: tuple[Source, Source | None],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
) -> str | None:
    digests = [source.digest() for source in sources if source]
    if None in digests:
        return None
    # Data and template count by what they hold, wherever they lie.
    settings = config.model_dump(mode="json", exclude={"path", "validation_path", "chat_template", "cache"})
    decided = settings | {"data": digests, "max_length": encoder.max_length}
    return cache.cache_key(decided, tokenizer, template)


def _as_tensors(data: PreparedData) -> tuple[dict[str, Tensor], dict[str, Any]]:
    parts = {"train": joined(data.train), "validation": joined(data.validation)}
    tensors = {f"{part}.{name}": tensor for part, held in parts.items() for name, tensor in held.items()}
    held_out = data.validation_report
    return tensors, {"report": asdict(data.report), "validation_report": asdict(held_out) if held_out else None}


def _from_tensors(tensors: dict[str, Tensor], facts: dict[str, Any], *, chat_template: str | None) -> PreparedData:
    train, validation = (
        divided({name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)})
        for part in ("train.", "validation.")
    )
    held_out = facts["validation_report"]
    reports = DataReport(**facts["report"]), DataReport(**held_out) if held_out else None
    return PreparedData(train, validation, *reports, chat_template, from_cache=True)


def _examples(
    rows: Sequence[Row],
    renderer: Renderer,
    encoder: Encoder,
    *,
    seen: Sequence[Row] = (),
    progress: bool,
) -> tuple[list[Example], DataReport]:
    formats: Counter[str] = Counter()
    rendered = _render(_tracked(rows, "Rendering", progress), renderer, formats)
    encoded = list(_tracked(encoder.encode(rendered), "Tokenizing", progress, total=len(rendered)))
    _refuse_untrained(encoded, rows)
    kept = [sample.example for sample in encoded if sample.example.target_tokens]
    if not kept:
        raise UserError(
            f"none of the {len(encoded)} samples has a trained token within {encoder.max_length} tokens: "
            "all labels are masked",
            where="data.max_length",
            fix="Raise it, or shorten the prompts: the answers begin behind it.",
        )
    report = _report(rows, encoded, kept, encoder.adds_bos)
    duplicates = _duplicates(rows, seen)
    altered = sum(text.altered for _, text in rendered)
    return kept, replace(report, formats=dict(formats), duplicates=duplicates, altered=altered)


def _render(rows: Iterable[Row], renderer: Renderer, formats: Counter[str]) -> list[tuple[int, Rendered]]:
    rendered: list[tuple[int, Rendered]] = []
    problems: list[str] = []
    for index, row in enumerate(rows):
        try:
            sample = recognize(row)
            texts = renderer.render(sample)
            for text in texts:
                text.text.encode()  # JSON can say half a character, which no tokenizer takes
            rendered += [(index, text) for text in texts]
            formats[sample.format] += 1
        except RowError as error:
            problems.append(f"{row.where} {error}")
        except UnicodeEncodeError as error:
            problems.append(f"{row.where} has {error.object[error.start]!a}, which is half a character")
    if problems:
        raise UserError(
            listed("rows that cannot be trained on:", problems, most=SHOWN_PROBLEMS),
            where="data",
            fix=f"Mend or remove them. Rows may be {known_formats()}.",
        )
    return rendered


def _refuse_untrained(encoded: Sequence[Encoded], rows: Sequence[Row]) -> None:
    bare = [sample.example.row for sample in encoded if not sample.truncated and not sample.example.target_tokens]
    if bare:
        problems = [f"{rows[index].where} has no token to train on: its answer or text is empty" for index in bare]
        raise UserError(
            listed("rows that cannot be trained on:", problems, most=SHOWN_PROBLEMS),
            where="data",
            fix="Mend or remove them.",
        )


def _report(rows: Sequence[Row], encoded: Sequence[Encoded], kept: Sequence[Example], adds_bos: bool) -> DataReport:
    return DataReport(
        rows=len(rows),
        samples=len(encoded),
        truncated=sum(sample.truncated for sample in encoded),
        dropped=len(encoded) - len(kept),
        tokens=sum(len(example) for example in kept),
        target_tokens=sum(example.target_tokens for example in kept),
        longest=max(len(example) for example in kept),
        sequences=len(kept),
        ended=sum(sample.ends for sample in encoded),
        bos_doubled=any(sample.leading_bos > 1 for sample in encoded),
        bos_missing=adds_bos and any(sample.leading_bos == 0 for sample in encoded),
    )


def _duplicates(rows: Sequence[Row], seen: Sequence[Row]) -> int:
    known = {_fingerprint(row) for row in seen}
    return sum(_fingerprint(row) in known for row in rows) if known else 0


def _after_packing(report: DataReport, packed: Sequence[Example]) -> DataReport:
    positions = sum(len(sequence) for sequence in packed)
    return replace(report, sequences=len(packed), padding_share=1 - report.tokens / positions)


def _fingerprint(row: Row, seed: int | None = None) -> bytes:
    text = json.dumps([seed, row.fields], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _tracked(items: Iterable[T], what: str, progress: bool, total: int | None = None) -> Iterator[T]:
    console = Console(stderr=True)  # standard output is for figures
    return iter(
        track(items, what, total=total, transient=True, console=console, disable=not (progress and console.is_terminal))
    )
