"""LoRA and QLoRA fine-tuning. The public names; each is imported when it is first used, so `import nybble` is quick."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.adapters.config import LoraConfig as LoraConfig
    from nybble.adapters.inject import adapter_parameters as adapter_parameters
    from nybble.adapters.inject import disable_adapters as disable_adapters
    from nybble.adapters.inject import inject as inject
    from nybble.adapters.inject import set_adapter as set_adapter
    from nybble.adapters.io import load_adapter as load_adapter
    from nybble.adapters.io import save_adapter as save_adapter
    from nybble.adapters.provenance import Provenance as Provenance
    from nybble.adapters.saved import read_adapter as read_adapter
    from nybble.compare.run import compare_arms as compare_arms
    from nybble.config import RunConfig as RunConfig
    from nybble.config import TrainConfig as TrainConfig
    from nybble.data.collate import batches as batches
    from nybble.data.config import DataConfig as DataConfig
    from nybble.data.prepare import prepare_data as prepare_data
    from nybble.errors import UserError as UserError
    from nybble.export.merged import merge_checkpoint as merge_checkpoint
    from nybble.export.quantized import quantize_checkpoint as quantize_checkpoint
    from nybble.inference import load_for_inference as load_for_inference
    from nybble.models.checkpoint import Checkpoint as Checkpoint
    from nybble.models.config import ModelConfig as ModelConfig
    from nybble.models.fused.body import FusedBody as FusedBody
    from nybble.models.fused.loss import FusedCausalLMLoss as FusedCausalLMLoss
    from nybble.models.generate import stream_chat as stream_chat
    from nybble.models.load import LoadedModel as LoadedModel
    from nybble.models.load import load_model as load_model
    from nybble.models.loss import CausalLMLoss as CausalLMLoss
    from nybble.optim.config import OptimConfig as OptimConfig
    from nybble.quant.format import NF4Spec as NF4Spec
    from nybble.quant.weight import NF4Weight as NF4Weight
    from nybble.train.run import run_training as run_training

_HOME = {
    "CausalLMLoss": "models.loss",
    "Checkpoint": "models.checkpoint",
    "DataConfig": "data.config",
    "FusedBody": "models.fused.body",
    "FusedCausalLMLoss": "models.fused.loss",
    "LoadedModel": "models.load",
    "LoraConfig": "adapters.config",
    "ModelConfig": "models.config",
    "NF4Spec": "quant.format",
    "NF4Weight": "quant.weight",
    "OptimConfig": "optim.config",
    "Provenance": "adapters.provenance",
    "RunConfig": "config",
    "TrainConfig": "config",
    "UserError": "errors",
    "adapter_parameters": "adapters.inject",
    "batches": "data.collate",
    "compare_arms": "compare.run",
    "disable_adapters": "adapters.inject",
    "inject": "adapters.inject",
    "load_adapter": "adapters.io",
    "load_for_inference": "inference",
    "load_model": "models.load",
    "merge_checkpoint": "export.merged",
    "prepare_data": "data.prepare",
    "quantize_checkpoint": "export.quantized",
    "read_adapter": "adapters.saved",
    "run_training": "train.run",
    "save_adapter": "adapters.io",
    "set_adapter": "adapters.inject",
    "stream_chat": "models.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nybble' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nybble.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
