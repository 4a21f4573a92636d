"""Which attention a model uses, and what packed samples need from it.

Packed samples are told apart by position_ids that start again. For eager, sdpa and flex_attention Transformers makes a
mask from them. FlashAttention takes no mask: Transformers gives it the samples' borders, but only in a batch of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.errors import UserError


def resolve_attention(setting: str, device: torch.device, model_config: Any = None) -> str:
    """The name Transformers has for the attention to use on `device`, for `ModelConfig.attention`.

    model_config: the Transformers configuration; models that cap their attention scores (Gemma 2) cannot use sdpa,
    which has no such cap. Raises UserError for a choice that would compute another function or cannot run.
    """
    capped = model_config is not None and _score_cap(model_config) is not None
    if setting == "auto":
        # Eager holds heads x seq_len^2 scores; flex_attention does not, but is compiled, which pays on a GPU only.
        capped_choice = "flex_attention" if device.type == "cuda" else "eager"
        return capped_choice if capped else "sdpa"
    if setting == "sdpa" and capped:
        raise UserError(
            "this model caps its attention scores, and sdpa cannot",
            where="model.attention",
            fix="Leave it at auto, or take eager or flex_attention.",
        )
    if setting.startswith("flash_attention") and device.type != "cuda":
        raise UserError(f"{setting} needs an NVIDIA GPU", where="model.attention", fix="Leave it at auto.")
    return setting


def body_inputs(model_config: Any, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """Keyword arguments for a model's body, under which no sample attends to another.

    input_ids, position_ids: (batch, seq_len). For FlashAttention all rows are laid into one, as each begins with a
    position that starts again; hidden states then come as (1, batch * seq_len, hidden_size).
    """
    if str(model_config.get_text_config()._attn_implementation).startswith("flash_attention"):
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": None, "use_cache": False}


def _score_cap(model_config: Any) -> float | None:
    cap: float | None = getattr(model_config.get_text_config(), "attn_logit_softcapping", None)
    return cap
