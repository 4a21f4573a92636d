"""How a model makes logits from its last hidden states: by its head, and for some kinds a scale or a soft cap."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nybble.errors import UserError
from nybble.models.device import compute_device
from nybble.models.modes import evaluation_mode

_CHECKED_TOKENS = 8
_CHECKED_WORDS = 64
_LARGE = 50.0  # typical of a logit that is tried: a cap of any usual size shows at that, in half precision too


@dataclass(frozen=True)
class LogitRule:
    """logits = softcap * tanh(scale * head(hidden) / softcap), without a soft cap scale * head(hidden)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, head_output: Tensor) -> Tensor:
        """Logits in fp32 (fp64 for an fp64 head), of the head's output of any shape."""
        logits = head_output if head_output.dtype == torch.float64 else head_output.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def find_logit_rule(model: PreTrainedModel) -> LogitRule:
    """The rule by which `model` makes its logits.

    The settings of a model name a scale but not whether it multiplies or divides (`logits_scaling` divides in Granite
    and multiplies in HyperCLOVA X), so each reading is compared with the logits the model itself gives for a few
    tokens, with another head in place of its own: out of NF4 that of 8B would take 1 GB. Raises UserError if none
    agrees. Leaves modes and randomness as they were.
    """
    of_head, expected = _probe(model)
    # Rounding of scale, division, tanh and product in the model's own precision, relative to the largest logit.
    bound = 4 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    gaps = {rule: _gap(rule(of_head), expected) for rule in _readings(model.config.get_text_config())}
    rule = min(gaps, key=lambda reading: gaps[reading])
    if not gaps[rule] <= bound:
        raise UserError(
            f"{type(model).__name__} makes its logits in a way that is not known here: "
            f"they differ from its head's output by {gaps[rule]:.3g}",
            where=model.config.name_or_path or None,
            fix="Known are a linear head, a constant scale (logit_scale, logits_scaling, lm_head_multiplier) and a "
            "soft cap (final_logit_softcapping).",
        )
    return rule


def _readings(config: Any) -> list[LogitRule]:
    softcap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            scales += [float(value), 1 / float(value)]
    return [LogitRule(scale, softcap) for scale in scales]


@torch.no_grad()
def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """What a head of few words gives for a few tokens, and the logits that the model makes of it, of the same shape."""
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no head that gives logits", fix="Take a causal language model.")
    input_ids = torch.arange(_CHECKED_TOKENS, device=compute_device(model))[None]
    with evaluation_mode(model):
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        words = _FewWords(hidden, model.config.get_text_config().vocab_size)
        with _in_place_of(head, words, model):
            return words(hidden), model(input_ids=input_ids, use_cache=False).logits


class _FewWords(nn.Module):
    """Random words, over and over until there are as many as in the vocabulary. They take nothing of the randomness."""

    def __init__(self, hidden: Tensor, vocabulary: int) -> None:
        super().__init__()
        words = torch.randn(_CHECKED_WORDS, hidden.shape[-1], generator=torch.Generator().manual_seed(0)).to(hidden)
        # With a name and a dtype that model code asks for.
        self.weight = words * (_LARGE / nn.functional.linear(hidden, words).float().std())
        self.vocabulary = vocabulary

    def forward(self, hidden: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden, self.weight)
        return torch.cat([logits] * -(-self.vocabulary // _CHECKED_WORDS), dim=-1)[..., : self.vocabulary]


@contextlib.contextmanager
def _in_place_of(head: nn.Module, other: nn.Module, model: PreTrainedModel) -> Iterator[None]:
    path = next(path for path, module in model.named_modules() if module is head)
    model.set_submodule(path, other)
    try:
        yield
    finally:
        model.set_submodule(path, head)


def _gap(logits: Tensor, expected: Tensor) -> float:
    return (logits - expected).abs().max().item() if logits.shape == expected.shape else float("inf")
