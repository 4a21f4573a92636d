"""What the tests of adapters share: loaded tiny models, adapters whose every number is random, PEFT beside them."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

from nybble.adapters.inject import adapter_parameters
from nybble.adapters.provenance import Provenance
from nybble.models.config import ModelConfig
from nybble.models.load import load_model

CPU = torch.device("cpu")


def load(folder: Path, storage: str = "fp32") -> transformers.PreTrainedModel:
    return load_model(ModelConfig(name=str(folder)), device=CPU, storage=storage).model


def load_stock(folder: Path) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # Transformers 5.17 takes sdpa, which leaves the cap out
    return model


def load_peft(folder: Path, adapter: Path, *, trainable: bool = False) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(load_stock(folder), adapter, is_trainable=trainable)


@torch.no_grad()
def randomize(parameters: dict[str, nn.Parameter], seed: int = 1, scale: float = 0.1) -> None:
    """Move every weight off where training starts, so that B is not zero and magnitudes are not the norms."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(parameters.items()):
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def randomized(model: nn.Module, name: str = "default", seed: int = 1) -> nn.Module:
    randomize(adapter_parameters(model, name), seed)
    return model


def provenance(folder: Path, storage: str = "fp32") -> Provenance:
    nf4 = {"block_size": 64, "double_quant": True} if storage == "nf4" else {}
    return Provenance(base=str(folder), base_fingerprint="0" * 64, storage=storage, **nf4)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens()).logits
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a loss that no logit leaves out."""
    output = model(tokens()).logits
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * weights).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
