"""One optimizer step, launched operation by operation: any shapes, any number of processes, fp16 with a loss scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nybble.memory.ledger import StepObserver, Unobserved
from nybble.models.loss import CausalLMLoss
from nybble.optim.flat import FlatAdamW
from nybble.sharded import full_tensor
from nybble.train.processes import gradient_sync, sum_over_ranks, world_size
from nybble.train.window import Window


@dataclass(frozen=True)
class Figures:
    """Of all micro-batches and processes. loss: mean over the target tokens. grad_norm: before clipping."""

    loss: float
    grad_norm: float
    target_tokens: int
    tokens: int


class StepExecutor(Protocol):
    """Does optimizer steps, each by `launch`, `read` and `finish`. The host waits for the device in `read` alone."""

    def launch(self, window: Window, seed: int) -> str | None:
        """Queue what the step computes; returns what there is to say about how it is done, if anything."""

    def read(self) -> Figures: ...

    def finish(self) -> None:
        """Update the weights, if `launch` has not. Not to be called if the figures are not finite (unless scaled)."""


class EagerStep:
    """The step as it reads.

    With FlatAdamW the update is queued with the rest, and changes nothing where loss or norm is not finite. Other
    optimizers cannot be told that on the device: they update in `finish`, after the host has seen the figures.
    """

    def __init__(
        self,
        loss_module: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        scaler: GradScaler | None = None,
    ) -> None:
        self.loss_module = loss_module
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.scaler = scaler
        self.device: torch.device = optimizer.param_groups[0]["params"][0].device
        self.updates_at_once = isinstance(optimizer, FlatAdamW) and scaler is None
        self.figures = torch.empty(0)  # of the step in progress: values of Figures, (4,) fp64 on the device
        self.phase = ""  # what is being queued, for errors
        self.observer: StepObserver = Unobserved()

    def launch(self, window: Window, seed: int) -> str | None:
        torch.manual_seed(seed)
        self.figures = self.enqueue(window.to(self.device))
        return None

    def read(self) -> Figures:
        loss, grad_norm, target_tokens, tokens = self.figures.tolist()
        return Figures(loss, grad_norm, int(target_tokens), int(tokens))

    def finish(self) -> None:
        if self.updates_at_once:
            return
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        self.observer.mark("update")

    def enqueue(self, window: Window) -> Tensor:
        """Queue the step for a window on the device; returns the values of its Figures, (4,) fp64 on the device."""
        self.observer.begin()
        counts = sum_over_ranks(window.counts.double())
        loss = sum_over_ranks(self._backward(window, counts[0])) / counts[0]
        self.settle()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        self.phase = "the update"
        norm = self._clip()
        figures = torch.stack([loss, norm.detach().double(), *counts.unbind()])
        if self.updates_at_once:
            self._update_if_finite(loss)
            self.observer.mark("update")
        return figures

    def settle(self) -> None:
        """See `CausalLMLoss.settle`; it takes time where the backward pass ended before the first layer."""
        if isinstance(self.loss_module, CausalLMLoss):
            self.loss_module.settle()

    def _backward(self, window: Window, target_tokens: Tensor) -> Tensor:
        """Add the window's gradients; returns this process's sum of the loss (fp64 scalar).

        Each micro-batch's sum is divided by the whole window's number of target tokens, so that n micro-batches of m
        sequences give the gradient of m micro-batches of n, however the tokens are spread.
        """
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        last = len(window.shapes) - 1
        for index, inputs in enumerate(window.inputs):
            where = f"micro-batch {index + 1} of {last + 1} ({' x '.join(map(str, window.shapes[index]))} tokens)"
            with gradient_sync(self.loss_module, enabled=index == last):
                self.phase = f"the forward pass of {where}"
                loss = self.loss_module(*inputs)
                self.observer.border("loss", loss)
                # Gradients are averaged over processes, but the tokens that divide them were counted over all of them.
                share = loss * (world_size() / target_tokens).to(loss.dtype)
                self.phase = f"the backward pass of {where}"
                (share if self.scaler is None else self.scaler.scale(share)).backward()
                self.observer.mark("start of the model, backward")
            loss_sum += loss.detach().double()
        return loss_sum

    def _clip(self) -> Tensor:
        """Clip the gradients' joint norm (0: leave them); returns the norm before."""
        if isinstance(self.optimizer, FlatAdamW):
            return self.optimizer.clip_(self.max_grad_norm)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = full_tensor(get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if self.max_grad_norm:
            clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        return norm

    def _update_if_finite(self, loss: Tensor) -> None:
        assert isinstance(self.optimizer, FlatAdamW)
        # `clip_` looks at the norm; a loss that is not finite can leave finite gradients behind.
        self.optimizer.skip_unless_finite_(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
