"""AdamW over parameters that lie one after another in memory: one kernel launch for all, and no word from the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.ops.adamw import adamw_

# Parameters begin at multiples of this: accesses of 16 bytes, and blocks of 8-bit moments that no two share.
_ALIGNMENT = 256


@dataclass(frozen=True)
class Flat:
    """Parameters of one group and dtype with their gradients and moments; padding between them stays zero."""

    group: dict[str, Any]
    parameters: list[nn.Parameter]
    offsets: list[int]
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]

    @classmethod
    def of(cls, group: dict[str, Any], parameters: list[nn.Parameter]) -> Flat:
        """Move `parameters` into one tensor, in their order: each becomes a view of it, and so does its gradient."""
        offsets, end = [], 0
        for parameter in parameters:
            offsets.append(end)
            end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        like = parameters[0]
        values, gradient = (torch.zeros(end, dtype=like.dtype, device=like.device) for _ in range(2))
        dtype = torch.promote_types(like.dtype, torch.float32)
        state = {name: torch.zeros(end, dtype=dtype, device=like.device) for name in ("exp_avg", "exp_avg_sq")}
        flat = cls(group, parameters, offsets, values, gradient, state)
        for parameter, value, view in zip(parameters, flat.views(values), flat.views(gradient), strict=True):
            value.copy_(parameter.detach())
            parameter.data, parameter.grad = value, view
        return flat

    def views(self, flat: Tensor) -> list[Tensor]:
        """The part of `flat` that belongs to each parameter, in its shape."""
        pairs = zip(self.offsets, self.parameters, strict=True)
        return [flat[start : start + parameter.numel()].view(parameter.shape) for start, parameter in pairs]


class FlatAdamW(torch.optim.Optimizer):
    """AdamW for one process, whose parameters, gradients and moments are flat buffers.

    A group's parameters of one dtype are neighbours in memory, in the order given. Gradients are always there, zero
    until something is added: a parameter that the loss does not reach decays as others do. `lr` of a group is a scalar
    on the device: set it with `fill_`. Nothing here waits for the device, so a CUDA graph can hold a whole step.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        precise = any(parameter.dtype == torch.float64 for parameter in every)
        self._scalars = {"dtype": torch.float64 if precise else torch.float32, "device": every[0].device}
        self.step_count = torch.zeros((), **self._scalars)
        self.gradient_scale = torch.ones((), **self._scalars)
        self.flats = []
        for group in self.param_groups:
            group["lr"] = torch.tensor(group["lr"], **self._scalars)
            for dtype in dict.fromkeys(parameter.dtype for parameter in group["params"]):
                self.flats.append(Flat.of(group, [p for p in group["params"] if p.dtype == dtype]))

    def flat_gradients(self) -> list[Tensor]:
        """All gradients, a buffer a group and dtype; padding in it is zero."""
        return [flat.gradient for flat in self.flats]

    @torch.no_grad()
    def clip_(self, max_norm: float) -> Tensor:
        """Let the next steps scale gradients so that their joint norm is at most `max_norm` (0: only measure it).

        Returns the norm before clipping, a scalar on the device. Gradients stay as they are. If the norm is not
        finite, steps change nothing until it is measured anew.
        """
        norms = [torch.linalg.vector_norm(g, dtype=self.gradient_scale.dtype) for g in self.flat_gradients()]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norm)
        self.gradient_scale.copy_(scale.where(norm.isfinite(), torch.nan))
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters, if `gradient_scale` is finite; it counts only then."""
        assert closure is None
        self.step_count += self.gradient_scale.isfinite()
        for flat in self.flats:
            beta1, beta2 = flat.group["betas"]
            adamw_(
                flat.parameter,
                flat.gradient,
                **flat.state,
                lr=torch.as_tensor(flat.group["lr"], **self._scalars),
                step=self.step_count,
                gradient_scale=self.gradient_scale,
                beta1=beta1,
                beta2=beta2,
                eps=flat.group["eps"],
                weight_decay=flat.group["weight_decay"],
            )

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002
        """Zero all gradients. They stay where they are, whatever `set_to_none` says."""
        for gradient in self.flat_gradients():
            gradient.zero_()
