"""Several processes on one model: DDP, which copies it to each, or FSDP2, which splits every weight over all.

Both average gradients over the processes; the training loop multiplies each loss by their number, so that what a
parameter gets is the sum over all tokens, whichever process saw them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from nybble.config import TrainConfig
from nybble.errors import UserError
from nybble.models.loss import CausalLMLoss
from nybble.models.skeleton import decoder_layers
from nybble.train.processes import world_size


def shard_or_replicate(loss_module: CausalLMLoss, config: TrainConfig) -> nn.Module:
    """What to call instead of `loss_module`, so that all processes train one model, from the weights of rank 0.

    Build the optimizer after it: with `fsdp2` the module's parameters become DTensors, of which each process holds its
    rows. `loss_module` itself keeps its names and methods. Raises UserError for trained parameters that cannot be
    sharded together.
    """
    _start_from_rank_0(parameter for parameter in loss_module.parameters() if parameter.requires_grad)
    return _shard(loss_module) if config.distributed == "fsdp2" else _replicate(loss_module)


def _start_from_rank_0(parameters: Iterable[nn.Parameter]) -> None:
    # Frozen weights are not sent: every process has read them from the same checkpoint.
    for parameter in parameters:
        dist.broadcast(parameter.detach(), src=0)


def _replicate(loss_module: CausalLMLoss) -> DistributedDataParallel:
    device = loss_module.model.device
    # Buffers are rotary frequencies: the same everywhere, and they do not change. PyTorch 2.12 renamed the option.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    unsynced: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(
        loss_module,
        device_ids=[device.index] if device.type == "cuda" else None,
        init_sync=False,
        gradient_as_bucket_view=True,
        **unsynced,
    )


def _shard(loss_module: CausalLMLoss) -> CausalLMLoss:
    """Each decoder layer is gathered while it computes; embedding, head and what else there is, with the loss.

    No mixed precision here: our linears cast what they read, and packed NF4 bytes are never cast.
    """
    layers = _decoder_layers(loss_module.model)
    _check_one_dtype(loss_module, layers)
    mesh = init_device_mesh(loss_module.model.device.type, (world_size(),))
    for layer in layers:
        _fully_shard(layer, mesh)
    _fully_shard(loss_module, mesh)
    register_fsdp_forward_method(loss_module, "token_losses")
    return loss_module


def _fully_shard(module: nn.Module, mesh: DeviceMesh) -> None:
    # Gradients are summed over processes in fp32, whatever they are held in. The root too gives its whole weights back
    # after a forward pass (it would keep them by default): after an evaluation, parameters are the sharded ones again,
    # which are the ones the optimizer knows.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _decoder_layers(model: Any) -> Sequence[nn.Module]:
    layers = decoder_layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} has no list of its layers", fix="Use train.distributed=ddp.")
    return list(layers.values())


def _check_one_dtype(loss_module: nn.Module, layers: Sequence[nn.Module]) -> None:
    """FSDP2 reduces the gradients of a layer as one buffer, so they must be of one dtype."""
    in_layers = {parameter for layer in layers for parameter in layer.parameters()}
    groups = [*(layer.parameters() for layer in layers), (p for p in loss_module.parameters() if p not in in_layers)]
    for group in groups:
        dtypes = {parameter.dtype for parameter in group if parameter.requires_grad}
        if len(dtypes) > 1:
            names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise UserError(
                f"parameters trained in {names} side by side cannot be sharded",
                where="train.distributed",
                fix="Set lora.dtype to fp32, or use train.distributed=ddp.",
            )
