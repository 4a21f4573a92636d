"""Streaming under stock modules: decoder layers that call for their weights by themselves, in both passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nybble.adapters.lora import LoRAAdapter
from nybble.memory.stream import LayerStream


def frozen_weights(layer: nn.Module) -> list[nn.Parameter]:
    """What is worth streaming of a decoder layer: its frozen parameters but vectors and adapters, in their order.

    Vectors (norms, biases) are few. NF4's scales are none: they are bytes.
    """
    adapters = [module for module in layer.modules() if isinstance(module, LoRAAdapter)]
    left_out = {parameter for adapter in adapters for parameter in adapter.parameters()}
    frozen = [held for held in layer.parameters() if not held.requires_grad and held not in left_out]
    return [held for held in frozen if held.dim() > 1 or not held.is_floating_point()]


def call_before_use(stream: LayerStream, layers: Mapping[int, nn.Module]) -> None:
    """Have each of `layers` call `stream.ready` with its number before it computes, forward and backward.

    Layers that are computed again in the backward pass call once more, when all is there already.
    """
    for index, layer in layers.items():

        def before(*_: Any, index: int = index) -> None:
            stream.ready(index)

        def after(_module: nn.Module, _inputs: Any, output: Any, index: int = index) -> None:
            # Not `register_full_backward_pre_hook`: it warns where no input requires a gradient, as in the first layer.
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: stream.ready(index))  # type: ignore[no-untyped-call]

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)
