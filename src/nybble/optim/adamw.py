"""AdamW over what is trained, with weight decay on matrices only."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nybble.errors import UserError
from nybble.optim.config import OptimConfig
from nybble.optim.flat import FlatAdamW


def build_optimizer(
    module: nn.Module, config: OptimConfig, *, moments: Literal["resident", "paged"] = "resident"
) -> torch.optim.Optimizer:
    """AdamW over every parameter of `module` that requires a gradient, in the module's order.

    Two groups: `weight_decay` for matrices, none for vectors (biases, norms, DoRA magnitudes). Build it after sharding:
    the state follows the parameters. It is FlatAdamW on one process, with its moments resident or paged; on several,
    PyTorch's: sharded parameters are no views of one buffer, and DDP keeps gradients in buckets of its own. Raises
    UserError if nothing is trained.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError("nothing to train: no parameter requires a gradient")
    groups = [
        {"params": [p for p in trained if _decays(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if not _decays(p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    lr, betas, eps = config.learning_rate, config.betas, config.eps
    if not (isinstance(module, DistributedDataParallel) or any(isinstance(p, DTensor) for p in trained)):
        return FlatAdamW(groups, lr=lr, betas=betas, eps=eps, state_bits=config.state_bits, moments=moments)
    check_state_bits(config, several_processes=True)
    on_gpu = all(parameter.device.type == "cuda" for parameter in trained)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=on_gpu, foreach=not on_gpu)


def check_state_bits(config: OptimConfig, *, several_processes: bool) -> None:
    """Raise UserError when several processes cannot keep their moments as `config` says."""
    if config.state_bits != 32 and several_processes:
        raise UserError(
            f"AdamW keeps its moments in {config.state_bits} bits on one process only",
            where="optim.state_bits",
            fix="Set it to 32, or train on one GPU.",
        )


def _decays(parameter: Tensor) -> bool:
    return parameter.dim() > 1
