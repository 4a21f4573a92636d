"""Greedy answers to several prompts at once, from any model that is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nybble.models.device import compute_device
from nybble.models.generate import cache_name, max_positions
from nybble.models.modes import evaluation_mode


@dataclass
class _Answer:
    """tokens: what was said so far. room: how many there can be, by the limit and by the model's positions."""

    room: int
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stops: frozenset[int],
    ended: Callable[[list[int]], bool] = lambda _: False,
) -> list[list[int]]:
    """The likeliest tokens after each prompt, one after the other.

    An answer ends before a token of `stops`, after the token with which `ended(tokens)` becomes true, at
    max_new_tokens, or where the model's positions end. Prompts are padded on the left; padding is not attended to,
    so answers are those that each prompt gets alone, but for the rounding of products of another shape.
    """
    if not prompts:
        return []
    device, name, limit = compute_device(model), cache_name(model), max_positions(model)
    answers = [_Answer(min(max_new_tokens, limit - len(prompt))) for prompt in prompts]
    inputs, mask = _left_padded(prompts, device)
    positions, cache = (mask.cumsum(1) - 1).clamp(min=0), None
    with evaluation_mode(model):
        for _ in range(max(answer.room for answer in answers)):
            output = model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{name: cache},
            )
            inputs, cache = output.logits[:, -1].argmax(dim=-1, keepdim=True), getattr(output, name)
            if _all_ended(answers, inputs[:, 0].tolist(), stops, ended):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = (positions[:, -1:] + 1).clamp(max=limit - 1)  # ended rows go along, to no effect
    return [answer.tokens for answer in answers]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, (batch, longest). Padding is token 0, as nothing sees it."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for line, prompt in enumerate(prompts):
        tokens[line, longest - len(prompt) :] = torch.tensor(prompt)
        mask[line, longest - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)


def _all_ended(
    answers: Sequence[_Answer], next_tokens: Sequence[int], stops: frozenset[int], ended: Callable[[list[int]], bool]
) -> bool:
    """Add each answer's next token, and say whether all have ended."""
    for answer, token in zip(answers, next_tokens, strict=True):
        if answer.ended:
            continue
        if token in stops or answer.room <= 0:
            answer.ended = True
            continue
        answer.tokens.append(token)
        answer.ended = len(answer.tokens) >= answer.room or ended(answer.tokens)
    return all(answer.ended for answer in answers)
