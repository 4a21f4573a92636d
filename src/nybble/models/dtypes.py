"""Two precisions: storage is how a weight is held, compute is what the arithmetic runs in."""

from __future__ import annotations

import torch

from nybble.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METHOD_STORAGE = {"qlora": "nf4", "full": "fp32", "lora": "auto"}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bf16`; dtypes without a name of ours keep PyTorch's."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def resolve_device() -> torch.device:
    """The GPU of this process if there is one, otherwise the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def resolve_compute(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic; `auto` is bf16 where the card has it, fp16 on older cards, fp32 on a CPU.

    Raises UserError for bf16 on a card without it: such cards emulate it, many times slower.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if setting == "auto":
        # On CPUs without bf16 units a bf16 product is 5-60 times slower than an fp32 one.
        return torch.float32 if device.type == "cpu" else torch.bfloat16 if has_bf16 else torch.float16
    if setting == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError("this card has no bf16 units", where="model.compute", fix="Use compute fp16, or auto.")
    return DTYPES[setting]


def resolve_storage(setting: str, method: str = "lora") -> str:
    """How frozen weights are held: the setting, or what the method (qlora, lora, full) asks for.

    `auto` is left for lora: the loader then keeps the dtype of the checkpoint.
    """
    return _METHOD_STORAGE[method] if setting == "auto" else setting
