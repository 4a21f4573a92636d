"""Which attention a model uses, and what packed samples need from it.

Packed samples are told apart by position_ids that start again. For eager, sdpa and flex_attention Transformers makes a
mask from them. FlashAttention takes no mask: Transformers gives it the samples' borders, but only in a batch of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from nybble.errors import UserError
from nybble.models.conversion import attention_implementation


def set_attention(model: PreTrainedModel, setting: str, device: torch.device) -> None:
    """Make `model`, on any device yet, attend as `ModelConfig.attention` says once it is on `device`.

    Raises UserError for a setting that the model or the machine cannot do.
    """
    choice = resolve_attention(setting, device, model.config)
    try:
        model.set_attn_implementation(choice)
    except (ValueError, ImportError) as error:
        raise UserError(str(error), where="model.attention", fix="Leave it at auto.") from error


def resolve_attention(setting: str, device: torch.device, model_config: PreTrainedConfig) -> str:
    """The attention to use on `device`, by Transformers' name. `auto` keeps what Transformers chose: sdpa if it can be.

    But sdpa cannot cap attention scores as Gemma 2 does, and until version 5.18 Transformers left the cap out without
    a word. Such a model gets eager attention; flex_attention can cap, but is compiled anew for each length of rows.
    Raises UserError for a setting that would compute another function or cannot run.
    """
    capped = getattr(model_config.get_text_config(), "attn_logit_softcapping", None) is not None
    if setting == "auto":
        return "eager" if capped else attention_implementation(model_config)
    if setting == "sdpa" and capped:
        raise UserError(
            "this model caps its attention scores, and sdpa cannot",
            where="model.attention",
            fix="Leave it at auto, or take eager or flex_attention.",
        )
    if setting.startswith("flash_attention") and device.type != "cuda":
        raise UserError(f"{setting} needs an NVIDIA GPU", where="model.attention", fix="Leave it at auto.")
    return setting


def body_inputs(model_config: PreTrainedConfig, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """Keyword arguments for a model's body, under which no sample attends to another.

    input_ids, position_ids: (batch, seq_len). For FlashAttention all rows are laid into one, as each begins with a
    position that starts again; hidden states then come as (1, batch * seq_len, hidden_size).
    """
    if attention_implementation(model_config).startswith("flash_attention"):
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": None, "use_cache": False}
