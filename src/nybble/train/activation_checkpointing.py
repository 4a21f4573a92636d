"""Activation checkpointing: each decoder layer keeps its input only and is computed again in the backward pass."""

from __future__ import annotations

from transformers import PreTrainedModel

from nybble.errors import UserError


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Switch it on in every decoder layer; raises UserError for a model that cannot do it.

    Non-reentrant: the reentrant kind gives no gradient at all where a layer's input needs none, and behind frozen
    embeddings that is so for the first layer.
    """
    # Transformers 5.18 renamed the method, and warns at the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError:
        raise UserError(
            f"{type(model).__name__} cannot recompute activations",
            where="memory.activations",
            fix="Set memory.activations=keep.",
        ) from None


def disable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Have every decoder layer keep what its backward pass reads, as a model does that was just loaded."""
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
