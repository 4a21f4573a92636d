"""What a comparison asks of a trained model, and what merging it costs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from nybble.adapters.saved import read_adapter
from nybble.compare.merge_check import measure_on
from nybble.compare.result import MergeResult
from nybble.data.example import Example
from nybble.evaluation.ask import generate_texts, text_of
from nybble.export.merged import merge_checkpoint
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.dtypes import resolve_device
from nybble.models.load import LoadedModel

# Of what is asked, in the report; and of texts, which have no answer to be scored by, all that is asked.
SHOWN_SAMPLES = 5
# Of a row that is text from its beginning, this much is given and the rest is to be gone on with.
_TEXT_PROMPT_TOKENS = 48


@dataclass(frozen=True)
class AskedRows:
    """prompts, expected: tokens. scored: whether `expected` is what there is to say, rather than how a text goes on."""

    prompts: list[list[int]]
    expected: list[list[int]]
    scored: bool

    @classmethod
    def of_rows(cls, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, most: int) -> AskedRows:
        """The last answers of the first rows that have one, `most` at most; where none has, the first rows' texts."""
        starts = ((row, start, stop) for row in rows for start, stop in [_last_answer(row)])
        whole = (found for found in starts if _is_whole(*found, tokenizer))
        if found := list(islice(whole, most)):
            prompts = [row.input_ids[:start].tolist() for row, start, _ in found]
            return cls(prompts, [row.input_ids[start:stop].tolist() for row, start, stop in found], scored=True)
        texts = [
            (row.input_ids.tolist(), min(_TEXT_PROMPT_TOKENS, len(row) // 2))
            for row in rows[: min(most, SHOWN_SAMPLES)]
        ]
        return cls([text[:start] for text, start in texts], [text[start:] for text, start in texts], scored=False)

    def __len__(self) -> int:
        return len(self.prompts)

    def ask(
        self,
        loaded: LoadedModel,
        *,
        chat_template: str | None,
        max_new_tokens: int,
        done: Callable[[int], None] = lambda _: None,
    ) -> tuple[str, ...]:
        """What the model says to each prompt, greedily."""
        said = generate_texts(
            loaded.model,
            loaded.tokenizer,
            self.prompts,
            chat_template=chat_template,
            max_new_tokens=max_new_tokens,
            done=done,
        )
        return tuple(answer.text.strip() for answer in said)

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Prompts and what is expected."""
        prompts, expected = (
            tuple(text_of(tokenizer, tokens).strip() for tokens in part) for part in (self.prompts, self.expected)
        )
        return prompts, expected


def merge_results(
    model: ModelConfig, adapter: Path, examples: Sequence[Example], folder: Path, *, batch_size: int, progress: bool
) -> tuple[MergeResult, ...]:
    """Merge the adapter into each base there is for it, below `folder`, and measure; the merged models are removed."""
    target = folder / "merged"
    shutil.rmtree(target, ignore_errors=True)
    try:
        report = merge_checkpoint(
            Checkpoint.open(model.name, model.revision, trust_remote_code=model.trust_remote_code),
            read_adapter(adapter),
            target,
            device=resolve_device(),
            measure=measure_on(model, adapter, examples, batch_size=batch_size),
            progress=progress,
            trust_remote_code=model.trust_remote_code,
        )
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return tuple(
        MergeResult(base, found.adapter_loss, found.merged_loss, found.largest_logit_gap)
        for base, found in report.measured.items()
    )


def _last_answer(row: Example) -> tuple[int, int]:
    """Where the last of the row's trained tokens begin that stand together, and where they end."""
    stop = int(row.trained.nonzero()[-1]) + 1
    return int((~row.trained[:stop]).nonzero()[-1]) + 1, stop  # a row's first token is never trained


def _is_whole(row: Example, start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether an answer follows a question, unlike text, and was not cut: a special token ends it."""
    return start > 1 and not text_of(tokenizer, row.input_ids[stop - 1 : stop].tolist())
