"""A whole run as one frozen value: read from YAML, overridden by `--set section.key=value`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from nybble.adapters.config import LoraConfig
from nybble.data.config import DataConfig
from nybble.errors import UserError
from nybble.files import read_yaml
from nybble.memory.config import MemoryConfig
from nybble.models.config import ModelConfig
from nybble.optim.config import OptimConfig
from nybble.settings import Section, parse_section

Method = Literal["lora", "qlora", "full"]


class TrainConfig(Section):
    epochs: float = Field(default=1.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps; overrides epochs")
    batch_size: int = Field(default=4, ge=1, description="sequences a micro-batch, on each process")
    gradient_accumulation: int = Field(default=1, ge=1, description="micro-batches an optimizer step")
    precision: Literal["bf16", "fp8"] = Field(
        default="bf16", description="of the frozen layers' matrix products; fp8 needs compute capability 8.9"
    )
    fused: bool = Field(default=True, description="fused kernels where they are known for the model, on one GPU")
    cuda_graph: bool = Field(default=True, description="the whole step as one CUDA graph where shapes allow it")
    seed: int = Field(default=0, description="of the adapter's start, the order of rows and dropout")
    deterministic: bool = Field(
        default=False, description="only deterministic kernels: same run, same bits on a GPU too"
    )
    eval_every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only before and after training")
    save_every: int = Field(
        default=0, ge=0, description="steps between checkpoints; 0: at the end, and where evaluation is best"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="newest ones that are kept; the best one is kept as well"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=(), description="where losses go beside log.jsonl"
    )
    distributed: Literal["ddp", "fsdp2"] = Field(default="ddp", description="how several processes share the work")


class RunConfig(Section):
    model: ModelConfig
    data: DataConfig
    output: str = Field(min_length=1, description="folder for the adapter, the checkpoints, run.json and log.jsonl")
    method: Method = Field(
        default="qlora", description="qlora: LoRA over NF4 weights; lora: over 16-bit ones; full: no adapter"
    )
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()

    @classmethod
    def read(cls, path: Path | None, overrides: dict[str, Any]) -> RunConfig:
        """Settings from a YAML file (or none), then `overrides`, dotted name to value. Raises UserError."""
        values = _read_file(path) if path else {}
        for name, value in overrides.items():
            _assign(values, name, value)
        return parse_section(cls, values, where=path or "command line")

    def changed(self, settings: Mapping[str, Any]) -> RunConfig:
        """With other values for some settings, by dotted names. Raises UserError."""
        return RunConfig.read(None, self.model_dump(mode="json", exclude_unset=True) | dict(settings))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def parse_assignment(text: str) -> tuple[str, Any]:
    """`lora.r=8` -> ("lora.r", 8); the value is read as YAML."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UserError(f"{text!r} is not a setting", where="--set", fix="Write it like --set lora.r=8")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{value!r} is not valid YAML", where=f"--set {name}") from None


def _read_file(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError("must hold settings, like 'method: qlora'", where=path)
    return values


def _assign(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{section!r} is not a section", where=f"--set {name}")
    values[last] = value
