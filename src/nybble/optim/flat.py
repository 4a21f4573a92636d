"""AdamW over parameters that lie one after another in memory: one kernel launch for all, and no word from the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nybble.memory.paging import BUCKET_BYTES, Pages, Part
from nybble.ops.adamw import BLOCK_SIZE, ZERO_CODE, adamw_, adamw_8bit_
from nybble.ops.wide import wide_dtype


@dataclass(frozen=True)
class Flat:
    """Parameters of one group and dtype, with their gradients and moments, each as one tensor.

    A parameter begins at a multiple of 256 values: accesses are of 16 bytes, and no block of 8-bit moments belongs to
    two. What lies between is zero and stays so.
    """

    group: dict[str, Any]
    parameters: list[nn.Parameter]
    values: Tensor
    addresses: list[int]  # of each parameter
    gradients: list[Tensor]
    gradient: Tensor
    moments: dict[str, Tensor]  # where they are now, in the order in which the update takes them

    @classmethod
    def of(cls, group: dict[str, Any], parameters: list[nn.Parameter], state_bits: int, made_on: torch.device) -> Flat:
        """Move `parameters` into one tensor: each becomes a view of it, and so does its gradient.

        They come in their order, but those that share a tensor already stay side by side in it: whoever stacked them
        can go on treating them, and their gradients, as one. made_on: where the moments are made, without values.
        """
        parameters = _side_by_side(parameters)
        blocks = sum(_blocks(parameter) for parameter in parameters)
        values, gradient = (parameters[0].detach().new_zeros(blocks * BLOCK_SIZE) for _ in range(2))
        for parameter, view in zip(parameters, _views(values, parameters), strict=True):
            parameter.data = view.copy_(parameter.detach())
        moments = _empty_moments(values, state_bits, made_on)
        addresses = [parameter.data_ptr() for parameter in parameters]
        flat = cls(group, parameters, values, addresses, _views(gradient, parameters), gradient, moments)
        flat.gather()
        return flat

    def require_in_place(self) -> None:
        """Raise RuntimeError if a parameter was moved elsewhere since: it would not be updated."""
        if [parameter.data_ptr() for parameter in self.parameters] != self.addresses:
            raise RuntimeError("parameters were moved in memory after FlatAdamW had been built over them")

    def gather(self) -> Tensor:
        """All gradients; those that are elsewhere or missing (`module.zero_grad()`) are brought back first."""
        for parameter, view in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not view:
                view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
                parameter.grad = view
        return self.gradient

    @property
    def blocks(self) -> int:
        return len(self.values) // BLOCK_SIZE

    def state_of_each(self) -> list[dict[str, Tensor]]:
        """The moments of each parameter, as views."""
        split = {name: _views(moment, self.parameters) for name, moment in self.moments.items()}
        return [dict(zip(split, views, strict=True)) for views in zip(*split.values(), strict=True)]


class FlatAdamW(torch.optim.Optimizer):
    """AdamW for one process, whose parameters, gradients and moments are flat.

    A group's parameters of one dtype are neighbours in memory, in the order given. Gradients are always there, zero
    until something is added: a parameter that the loss does not reach decays like the others. `lr` of a group is a
    scalar on the device: set it with `fill_`. Nothing in a step waits for the device, so a CUDA graph can hold it all.

    state_bits: of the moments; 8 is blockwise (arXiv 2110.02861), a quarter of the memory. moments: resident on the
    device, or paged: at home in pinned host memory, where they begin, and on the device while there is room. Of moments
    at home a step brings a few buckets at a time to the device; the bits are the same.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_bits: Literal[32, 8] = 32,
        moments: Literal["resident", "paged"] = "resident",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        precise = any(parameter.dtype == torch.float64 for parameter in every)
        self._scalars = {"dtype": torch.float64 if precise else torch.float32, "device": every[0].device}
        self.step_count = torch.zeros((), **self._scalars)
        self.gradient_scale = torch.ones((), **self._scalars)
        self.flats: list[Flat] = []
        made_on = every[0].device if moments == "resident" else torch.device("meta")
        for group in self.param_groups:
            group["lr"] = torch.tensor(group["lr"], **self._scalars)
            for dtype in dict.fromkeys(parameter.dtype for parameter in group["params"]):
                same = [p for p in group["params"] if p.dtype == dtype]
                self.flats.append(Flat.of(group, same, state_bits, made_on))
        self._pages: Pages | None = None
        if moments == "paged":
            units = [flat.blocks for flat in self.flats]
            self._pages = Pages(
                [flat.moments for flat in self.flats], units, every[0].device, bucket_bytes=BUCKET_BYTES
            )
        for flat in self.flats:
            _set_to_zero(flat.moments)
        self._point_state()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only as the constructor does: what is flat cannot grow."""
        if hasattr(self, "flats"):
            raise RuntimeError("FlatAdamW takes all parameters when it is built")
        super().add_param_group(param_group)

    @property
    def paged(self) -> bool:
        """Whether the moments have a home in host memory."""
        return self._pages is not None

    @property
    def moves(self) -> int:
        """How often the moments have changed places: a CUDA graph of a step holds for one value of it."""
        return self._pages.moves if self._pages else 0

    def evict(self) -> bool:
        """Send paged moments home and free the device's memory; whether there was any."""
        evicted = self._pages is not None and self._pages.evict()
        if evicted:
            self._point_state()
        return evicted

    def restore_if_room(self, headroom_bytes: int = 0) -> bool:
        """Bring paged moments to the device if that leaves `headroom_bytes` there; whether they are there now."""
        if self._pages is None or self._pages.resident:
            return True
        restored = self._pages.restore_if_room(headroom_bytes)
        if restored:
            self._point_state()
        return restored

    def flat_gradients(self) -> list[Tensor]:
        """All gradients, one tensor a group and dtype, with zeros between those of two parameters."""
        return [flat.gather() for flat in self.flats]

    @torch.no_grad()
    def clip_(self, max_norm: float) -> Tensor:
        """Let the next step scale the gradients so that their joint norm is at most `max_norm` (0: only measure it).

        Returns the norm before clipping, a scalar on the device. The gradients stay as they are. If the norm is not
        finite, steps change nothing until it is measured anew.
        """
        dtype = self.gradient_scale.dtype
        norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in self.flat_gradients()]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norm)
        self.gradient_scale.copy_(scale)
        self.skip_unless_finite_(norm)
        return norm

    @torch.no_grad()
    def skip_unless_finite_(self, figure: Tensor) -> None:
        """Let the next step change nothing if `figure`, a scalar on the device, is not finite."""
        self.gradient_scale.masked_fill_(~figure.isfinite(), torch.nan)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters, if `gradient_scale` is finite; only then does the step count.

        Out of memory, it raises before anything is updated.
        """
        assert closure is None, "no step of AdamW evaluates the loss"
        for flat in self.flats:
            flat.require_in_place()
        self.flat_gradients()
        counted = self.gradient_scale.isfinite()
        parts = self._parts()
        self.step_count += counted
        for part in parts:
            self._update(part)

    def _parts(self) -> Iterator[Part]:
        if self._pages is not None:
            return self._pages.parts()
        return (Part(index, 0, flat.blocks, flat.moments) for index, flat in enumerate(self.flats))

    def _update(self, part: Part) -> None:
        flat = self.flats[part.index]
        values = slice(part.start * BLOCK_SIZE, part.stop * BLOCK_SIZE)
        beta1, beta2 = flat.group["betas"]
        update = adamw_8bit_ if "exp_avg_scale" in part.tensors else adamw_
        update(
            flat.values[values],
            flat.gradient[values],
            *part.tensors.values(),
            torch.as_tensor(flat.group["lr"], **self._scalars),
            self.step_count,
            self.gradient_scale,
            beta1=beta1,
            beta2=beta2,
            eps=flat.group["eps"],
            weight_decay=flat.group["weight_decay"],
        )

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002
        """Zero all gradients. They stay where they are, whatever `set_to_none` says."""
        for gradient in self.flat_gradients():
            gradient.zero_()

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict()`, to the bit. What it has no moments of stays as it is.

        Tensors are copied to where they are: a CUDA graph of a step remains valid. Raises ValueError for moments of
        other bits or shapes.
        """
        self._settle()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group |= {key: value for key, value in saved.items() if key not in ("params", "lr")}
            group["lr"] = torch.as_tensor(group["lr"], **self._scalars).fill_(saved["lr"])
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, saved in state_dict["state"].items():
            own = self.state[parameters[index]]
            described, expected = (
                {key: (tensor.shape, tensor.dtype) for key, tensor in state.items() if key != "step"}
                for state in (saved, own)
            )
            if described != expected:
                raise ValueError(f"state of parameter {index} is {described}, not {expected}")
            for key, tensor in own.items():
                tensor.copy_(saved[key])

    def _point_state(self) -> None:
        """Let the state of each parameter be views of the moments where they are."""
        for flat in self.flats:
            for parameter, moments in zip(flat.parameters, flat.state_of_each(), strict=True):
                self.state[parameter] = {"step": self.step_count, **moments}

    def _settle(self) -> None:
        if self._pages is not None:
            self._pages.settle()


def _blocks(parameter: Tensor) -> int:
    return -(-parameter.numel() // BLOCK_SIZE)


def _side_by_side(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    by_storage: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)
    return [p for sharing in by_storage.values() for p in sorted(sharing, key=lambda p: p.storage_offset())]


def _views(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The part of `flat` that belongs to each parameter: in its shape, or one value a block."""
    per_block = flat.numel() // sum(_blocks(parameter) for parameter in parameters)
    views, start = [], 0
    for parameter in parameters:
        shape = parameter.shape if per_block == BLOCK_SIZE else (_blocks(parameter),)
        views.append(flat[start : start + math.prod(shape)].view(shape))
        start += _blocks(parameter) * per_block
    return views


def _empty_moments(values: Tensor, state_bits: int, device: torch.device) -> dict[str, Tensor]:
    """Moments without values, in the order in which the update takes them."""
    if state_bits == 32:
        dtype = wide_dtype(values)
        return {name: torch.empty_like(values, dtype=dtype, device=device) for name in ("exp_avg", "exp_avg_sq")}
    moments = {}
    for name in ("exp_avg", "exp_avg_sq"):
        moments[name] = torch.empty_like(values, dtype=torch.uint8, device=device)
        moments[f"{name}_scale"] = torch.empty(len(values) // BLOCK_SIZE, dtype=torch.float32, device=device)
    return moments


def _set_to_zero(moments: dict[str, Tensor]) -> None:
    for moment in moments.values():
        moment.zero_()
    if "exp_avg_scale" in moments:
        moments["exp_avg"].fill_(ZERO_CODE)
