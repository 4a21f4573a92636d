"""The loss module of a run: by fused kernels where they are known for the model, else by its stock modules."""

from __future__ import annotations

import torch

from nybble.config import RunConfig
from nybble.data.prepare import PreparedData
from nybble.errors import UserError
from nybble.models.fused.body import FusedBody
from nybble.models.fused.loss import FusedCausalLMLoss
from nybble.models.fused.reason import CannotFuseError
from nybble.models.load import LoadedModel
from nybble.models.loss import CausalLMLoss
from nybble.plan import MemoryPlan
from nybble.train.activation_checkpointing import enable_activation_checkpointing
from nybble.train.processes import world_size

_FP8_CAPABILITY = (8, 9)  # Ada and Hopper


def check_precision(config: RunConfig, device: torch.device) -> None:
    """Raise UserError when `device` cannot multiply in the precision of `config`."""
    if config.train.precision != "fp8":
        return
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < _FP8_CAPABILITY or not config.train.fused:
        what = "fp8 needs fused kernels on an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell)"
        raise UserError(what, where="train.precision", fix="Use bf16.")


def make_loss(loaded: LoadedModel, config: RunConfig, *, samples_a_row: int) -> tuple[CausalLMLoss, list[str]]:
    """What the loop calls for the loss, and for a GPU a line that says how it computes.

    samples_a_row: the most samples that a row of training or held-out data holds.
    """
    train, chosen = config.train, config.memory.activations
    activations = "recompute" if chosen == "auto" else chosen
    try:
        _require_one_gpu(config, loaded.model.device)
        plan = MemoryPlan.uniform(loaded.model.config.get_text_config().num_hidden_layers, activations)
        body = FusedBody(loaded.model, samples_a_row=samples_a_row, plan=plan, precision=train.precision)
    except CannotFuseError as reason:
        if train.precision == "fp8":
            raise UserError(f"fp8 needs fused kernels: {reason}", where="train.precision", fix="Use bf16.") from None
        if activations != "keep":
            enable_activation_checkpointing(loaded.model)
        on_gpu = loaded.model.device.type == "cuda"
        return CausalLMLoss(loaded.model), [f"stock modules, not fused kernels: {reason}"] if on_gpu else []
    return FusedCausalLMLoss(loaded.model, body), [body.describe()]


def most_samples_a_row(data: PreparedData) -> int:
    """The most samples in a sequence of the data, with the padding behind them as one more."""
    most = max((len(example.lengths) for example in (*data.train, *data.validation)), default=1)
    return most if most == 1 else most + 1


def _require_one_gpu(config: RunConfig, device: torch.device) -> None:
    reasons = {
        "train.fused is off": not config.train.fused,
        "method full trains the weights": config.method == "full",
        "they run on one process": world_size() > 1,
        "they need a GPU": device.type != "cuda",
        "model.attention chooses another attention": config.model.attention != "auto",
    }
    for reason, holds in reasons.items():
        if holds:
            raise CannotFuseError(reason)
