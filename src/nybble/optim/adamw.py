"""AdamW over what is trained, with weight decay on matrices only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nybble.errors import UserError
from nybble.optim.config import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over every parameter of `module` that requires a gradient, in the module's order.

    Two groups: `weight_decay` for matrices, none for vectors (biases, norms, DoRA magnitudes). The updates run fused
    on a GPU. Build it after sharding: the state follows the parameters. Raises UserError if nothing is trained.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError("nothing to train: no parameter requires a gradient")
    groups = [
        {"params": [p for p in trained if _decays(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if not _decays(p)], "weight_decay": 0.0},
    ]
    on_gpu = all(parameter.device.type == "cuda" for parameter in trained)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=on_gpu,
        foreach=not on_gpu,
    )


def _decays(parameter: Tensor) -> bool:
    return parameter.dim() > 1
