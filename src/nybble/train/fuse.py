"""The loss module of a run, which holds what it needs as the run's plan says: by fused regions, or stock modules."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from nybble.config import RunConfig
from nybble.data.prepare import PreparedData
from nybble.errors import UserError
from nybble.memory.stock_layers import call_before_use, frozen_weights
from nybble.memory.stream import LayerStream
from nybble.models.device import compute_device
from nybble.models.ends import place_ends
from nybble.models.fused.body import FusedBody
from nybble.models.fused.loss import FusedCausalLMLoss
from nybble.models.fused.reason import CannotFuseError
from nybble.models.load import LoadedModel
from nybble.models.loss import CausalLMLoss
from nybble.models.skeleton import decoder_layers
from nybble.plan import MemoryPlan
from nybble.train.activation_checkpointing import enable_activation_checkpointing
from nybble.train.plan import Rows, RunPlan, require_possible

_FP8_CAPABILITY = (8, 9)  # Ada and Hopper


def check_precision(config: RunConfig, device: torch.device) -> None:
    """Raise UserError when `device` cannot multiply in the precision of `config`."""
    if config.train.precision != "fp8":
        return
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < _FP8_CAPABILITY:
        what = "fp8 needs fused kernels on an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell)"
        raise UserError(what, where="train.precision", fix="Use bf16.")


def make_loss(
    loaded: LoadedModel, config: RunConfig, plan: RunPlan, *, samples_a_row: int
) -> tuple[CausalLMLoss, list[str]]:
    """What the loop calls for the loss, and for a GPU a line that says how it computes.

    samples_a_row: the most samples that a row of training or held-out data holds.
    """
    model = loaded.model
    device = compute_device(model)
    place_ends(model, plan.memory, device)
    stock = plan.stock
    if stock is None:
        try:
            body = FusedBody(
                model,
                samples_a_row=samples_a_row,
                plan=plan.memory,
                precision=config.train.precision,
                most_tokens=plan.most_tokens,
            )
            return FusedCausalLMLoss(model, body), [body.describe()]
        except CannotFuseError as reason:
            stock = str(reason)
            require_possible(config, stock)
    hold_stock(model, plan.memory, device)
    return CausalLMLoss(model), [f"stock modules, not fused kernels: {stock}"] if device.type == "cuda" else []


def rows_of(data: PreparedData) -> Rows:
    """The longest rows of training and held-out data; of samples in one, the padding behind them is one more."""
    most = max((len(example.lengths) for example in (*data.train, *data.validation)), default=1)
    longest, held_out = (max(map(len, examples), default=0) for examples in (data.train, data.validation))
    return Rows(longest, held_out, most if most == 1 else most + 1)


def hold_stock(model: PreTrainedModel, plan: MemoryPlan, device: torch.device) -> None:
    """Have stock modules hold what `plan` says, as near as they can: all layers alike, kept or recomputed."""
    if any(policy.activations != "keep" for policy in plan.layers):
        enable_activation_checkpointing(model)
    if streamed := plan.streamed():
        layers = dict(enumerate(decoder_layers(model).values()))
        weights = {index: frozen_weights(layers[index]) for index in streamed}
        on_disk = [index for index in streamed if plan.layers[index].weights == "disk"]
        stream = LayerStream(weights, device, slots=plan.stream_slots, on_disk=on_disk)
        call_before_use(stream, {index: layers[index] for index in streamed})
