"""Which device a model computes on, wherever its weights lie."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


def compute_device(model: nn.Module) -> torch.device:
    """The GPU that holds any of the model's parameters or buffers; the others stay in host memory. Else the CPU."""
    devices = (tensor.device for tensor in chain(model.parameters(), model.buffers()))
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
