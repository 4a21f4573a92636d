"""What to train on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nybble.errors import UserError
from nybble.settings import Section


class DataConfig(Section):
    path: str = Field(
        min_length=1,
        description="file (.jsonl, .json, .parquet, .csv), folder with train and valid files, or hub dataset id",
    )
    validation_path: str | None = Field(default=None, description="held-out rows: file, folder or hub dataset id")
    validation_fraction: float = Field(default=0.0, ge=0, lt=1, description="share of the rows to hold out instead")
    split: str = Field(default="train", description="split of a hub dataset or folder to train on")
    validation_split: str | None = Field(default=None, description="split of the hub dataset to hold out")
    subset: str | None = Field(default=None, description="configuration of a hub dataset, like 'main'")
    max_rows: int | None = Field(default=None, ge=1, description="use the first rows only")
    chat_template: str | None = Field(
        default=None, description="file with a Jinja chat template to use instead of the tokenizer's"
    )
    use_chat_template: bool = Field(
        default=True,
        description="show Alpaca and prompt/completion rows to the model as chats, if there is a chat template",
    )
    train_on: Literal["assistant", "all"] = Field(default="assistant", description="which tokens carry loss")
    max_length: int | None = Field(
        default=None,
        ge=8,
        description="tokens a sequence; longer samples are cut and counted. Left out: 1024 or the model's limit",
    )
    packing: bool = Field(default=False, description="several samples a sequence, without attention across them")
    seed: int = Field(default=0, description="of the held-out split")
    cache: bool = Field(default=True, description="keep the tokenized samples for the next run with the same data")

    def length_within(self, model_max_length: int | None) -> int:
        """Tokens a sequence for a model of so many positions (None: no limit); UserError if `max_length` is beyond."""
        if self.max_length is None:
            return min(1024, model_max_length or 1024)
        if model_max_length is not None and self.max_length > model_max_length:
            raise UserError(
                f"is {self.max_length}, but the model has positions for {model_max_length} tokens",
                where="data.max_length",
                fix=f"Set data.max_length to {model_max_length} or less.",
            )
        return self.max_length
