"""What to train on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nybble.settings import Section


class DataConfig(Section):
    path: str = Field(description="file (.jsonl, .json, .parquet, .csv), folder with train and valid files, or hub dataset id")
    validation_path: str | None = Field(None, description="file of held-out rows; otherwise validation_fraction is split off")
    validation_fraction: float = Field(0.0, ge=0, lt=1)
    split: str = Field("train", description="split of a hub dataset")
    max_rows: int | None = Field(None, ge=1, description="use the first rows only")
    chat_template: str | None = Field(None, description="file with a Jinja chat template to use instead of the tokenizer's")
    train_on: Literal["assistant", "all"] = Field("assistant", description="which tokens carry loss")
    max_length: int = Field(1024, ge=8, description="tokens a sequence; longer samples are cut and counted")
    packing: bool = Field(False, description="several samples a sequence, without attention across them")
    seed: int = Field(0, description="of the held-out split")
