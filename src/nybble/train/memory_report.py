"""What holds the device's memory in one step of a run, as a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nybble.files import write_text
from nybble.memory.ledger import Ledger, Unobserved
from nybble.memory.ledger_page import ledger_page
from nybble.models.fused.body import FusedBody
from nybble.models.loss import CausalLMLoss
from nybble.models.skeleton import decoder_layers
from nybble.train.loop import StepResult
from nybble.train.step import EagerStep

_REPORTED = 2  # of the steps done: in the first one libraries and kernels are loaded, later ones may be CUDA graphs


class MemoryReport:
    """Follows steps that `step` does until it has written the second of them, or the last, to `file`."""

    def __init__(self, step: EagerStep, file: Path, *, title: str, last_step: int) -> None:
        self._step, self._file, self._title, self._last_step = step, file, title, last_step
        self._loss = next(module for module in step.loss_module.modules() if isinstance(module, CausalLMLoss))
        self._body: FusedBody | None = getattr(self._loss, "body", None)
        self._ledger = Ledger(self._inventory, step.device)
        self._hooks: list[RemovableHandle] = []
        self._steps = 0
        step.observer = self._ledger
        if self._body is not None:
            self._body.observer = self._ledger
        else:
            self._hooks = _follow_stock_layers(self._loss, self._ledger)

    def after(self, result: StepResult) -> None:
        """A step is done: if it is the one, write its page."""
        self._steps += 1
        if self._steps > _REPORTED or (self._steps < _REPORTED and result.step != self._last_step):
            return
        subtitle = f"Step {result.step}, {result.tokens:,} tokens, on {_device_name(self._step.device)}"
        write_text(self._file, ledger_page(self._ledger.phases, title=self._title, subtitle=subtitle))
        self._step.observer = Unobserved()
        if self._body is not None:
            self._body.observer = Unobserved()
        for hook in self._hooks:
            hook.remove()

    def _inventory(self) -> Mapping[str, Iterable[Tensor]]:
        module, optimizer = self._step.loss_module, self._step.optimizer
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        stream = self._body.stream if self._body is not None else None
        states = chain.from_iterable(state.values() for state in optimizer.state.values())
        return {
            "streaming slots": stream.slots if stream is not None else [],
            "trained weights": trained,
            "frozen weights": [*frozen, *module.buffers()],
            "gradients": [parameter.grad for parameter in trained if parameter.grad is not None],
            "moments": [value for value in states if isinstance(value, Tensor)],
        }


def _follow_stock_layers(loss: CausalLMLoss, ledger: Ledger) -> list[RemovableHandle]:
    """Tell the ledger where the decoder layers of a stock model end."""

    def hook(number: int) -> Any:
        def end(_module: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            ledger.border(f"layer {number}", output if isinstance(output, Tensor) else output[0])

        return end

    layers = decoder_layers(loss.model).values()
    return [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers, 1)]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU (memory of the whole process)"
