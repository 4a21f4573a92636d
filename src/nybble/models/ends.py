"""The two ends of a model, its embedding and its head, kept in host memory where a plan says so."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from nybble.errors import UserError
from nybble.memory.host_matrix import HostEmbedding, HostLinear
from nybble.plan import MemoryPlan
from nybble.quant.linear import DenseEmbedding, DenseLinear


def place_ends(model: PreTrainedModel, plan: MemoryPlan, device: torch.device) -> None:
    """Put the model's embedding and head where `plan` has them, for computing on `device`; before losses are built.

    Both may lie anywhere before. What is put in host memory stays the same parameter, with the same name; tied ones
    share one matrix there. Raises UserError for an end that is trained or adapted, or tied to one placed elsewhere:
    what changes at each step, or is read by a product of its own, must lie on the device.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if plan.embedding == "host":
        _require_frozen(embedding, DenseEmbedding, "memory.embedding", "embedding")
    if plan.head == "host":
        _require_frozen(head, DenseLinear, "memory.head", "head")
    if plan.embedding != plan.head and embedding.weight is getattr(head, "weight", None):
        what = "this model's embedding and head are one matrix, which cannot lie in two places"
        raise UserError(what, where="memory.embedding, memory.head", fix="Give both the same place.")
    if plan.embedding == "host" and not isinstance(embedding, HostEmbedding):
        model.set_input_embeddings(HostEmbedding.taking(embedding))
    if plan.head == "host" and not isinstance(head, HostLinear):
        model.set_output_embeddings(HostLinear.taking(head, device))


def _require_frozen(module: nn.Module, kind: type[nn.Module], setting: str, name: str) -> None:
    trained = any(parameter.requires_grad for parameter in module.parameters())
    if trained or not isinstance(module, kind):
        what = f"the {name} cannot lie in host memory: it is {'trained' if trained else 'a ' + type(module).__name__}"
        raise UserError(what, where=setting, fix="Use device, or leave the head and embedding out of what is trained.")
