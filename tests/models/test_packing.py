"""Packed samples see nothing of each other: same losses, gradients and logits as each sample alone."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel

from nybble.errors import UserError
from nybble.labels import IGNORED
from nybble.models.attention import body_inputs, resolve_attention, set_attention
from nybble.models.loss import CausalLMLoss
from tests.tiny import DENSE_KINDS, VOCAB_SIZE, random_model

# Tokens of the samples in each of two rows; rows are filled up to 32. Longer than the sliding window of 8.
ROWS = [[11, 7, 13], [20, 1, 9]]
SEQ_LEN = 32


def samples(seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(3, VOCAB_SIZE, (length,), generator=generator) for length in row] for row in ROWS]


def packed(rows: list[list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, labels, position_ids, each (2, 32): a sample's first token is no target, padding goes on counting."""
    ids, labels, positions = [], [], []
    for row in rows:
        left = SEQ_LEN - sum(map(len, row))
        ids.append(pad(torch.cat(row), (0, left), value=2))
        labels.append(pad(torch.cat([no_first(sample) for sample in row]), (0, left), value=IGNORED))
        lengths = [*map(len, row[:-1]), len(row[-1]) + left]
        positions.append(torch.cat([torch.arange(length) for length in lengths]))
    return torch.stack(ids), torch.stack(labels), torch.stack(positions)


def no_first(sample: Tensor) -> Tensor:
    return torch.cat([torch.tensor([IGNORED]), sample[1:]])


def attending_model(kind: str, attention: str, **overrides: object) -> PreTrainedModel:
    model = random_model(kind, **overrides).double()
    model.set_attn_implementation(attention)
    return model


def can_attend(kind: str, attention: str) -> bool:
    # A soft cap is beyond sdpa; Transformers 5.17 has no flex_attention for GPT-2.
    return (kind, attention) not in [("gemma2", "sdpa"), ("gpt2", "flex_attention")]


CASES = [(kind, attention) for kind in DENSE_KINDS for attention in ("eager", "sdpa") if can_attend(kind, attention)]


def rounding(kind: str, attention: str) -> float:
    """Relative: even fp64 models take the softmax of eager attention in fp32, and Gemma the sums of its norms."""
    return 2e-6 if attention == "eager" or kind.startswith("gemma") else 1e-13


def gradients(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def relative_gap(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


def logits(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**body_inputs(model.config, input_ids, position_ids)).logits


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_losses_and_gradients_equal_those_of_the_samples_alone(kind: str, attention: str) -> None:
    module = CausalLMLoss(attending_model(kind, attention))
    rows = samples()
    alone = torch.zeros((), dtype=torch.float64)
    for sample in (sample for row in rows for sample in row):
        alone += module(sample[None], no_first(sample)[None], torch.arange(len(sample))[None])
    together = module(*packed(rows))
    bound = rounding(kind, attention)
    assert relative_gap(together, alone) < bound
    expected, ours = gradients(module.model, alone), gradients(module.model, together)
    assert max(map(relative_gap, ours, expected)) < bound


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_a_sample_does_not_change_with_what_is_packed_before_or_after_it(kind: str, attention: str) -> None:
    """To the last bit: any attention across samples, however weak, shows."""
    model = attending_model(kind, attention)
    input_ids, _, position_ids = packed(samples())
    changed = input_ids.clone()
    changed[0, :11] = (changed[0, :11] + 1) % VOCAB_SIZE  # the first sample of row 0
    changed[0, 31:] = 7  # its padding
    before, after = logits(model, input_ids, position_ids), logits(model, changed, position_ids)
    assert torch.equal(before[0, 11:31], after[0, 11:31])
    assert not torch.equal(before[0, 1:11], after[0, 1:11])
    # Within the sample a token shows in the next, so the test above can fail.
    changed = input_ids.clone()
    changed[0, 11] = (changed[0, 11] + 1) % VOCAB_SIZE
    assert not torch.equal(before[0, 12], logits(model, changed, position_ids)[0, 12])


@pytest.mark.parametrize("kind", [kind for kind, attention in CASES if attention == "sdpa"])
def test_rows_of_one_sample_are_given_no_mask(kind: str) -> None:
    """Then sdpa takes its causal fast path; padding at the end of a row does not change that."""
    window = {"sliding_window": 64} if kind == "mistral" else {}  # a window shorter than the row needs a mask
    model = attending_model(kind, "sdpa", **window).train()
    masks: list[Tensor | None] = []

    def see_mask(_module: object, _args: object, options: dict[str, Tensor | None]) -> None:
        masks.append(options["attention_mask"])

    for name, module in model.named_modules():
        full = getattr(module, "sliding_window", None) in (None, 64)
        if name.split(".")[-1] in ("self_attn", "attn") and full:
            module.register_forward_pre_hook(see_mask, with_kwargs=True)
    input_ids, labels, position_ids = packed(samples())
    loss = CausalLMLoss(model)
    masks.clear()
    loss(input_ids, labels, torch.arange(SEQ_LEN).expand(2, -1))
    assert masks
    assert all(mask is None for mask in masks)
    masks.clear()
    loss(input_ids, labels, position_ids)
    assert all(mask is not None and mask.shape == (2, 1, SEQ_LEN, SEQ_LEN) for mask in masks)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_flash_attention_is_given_all_samples_in_one_row(kind: str) -> None:
    """Only so does Transformers tell it their borders. Every backend gives the same logits in that form."""
    model = attending_model(kind, "sdpa")
    input_ids, _, position_ids = packed(samples())
    expected = logits(model, input_ids, position_ids)
    inputs = body_inputs(flash_config(model), input_ids, position_ids)
    assert inputs["input_ids"].shape == (1, 2 * SEQ_LEN)
    with torch.no_grad():
        ours = model(**inputs).logits.view(expected.shape)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def flash_config(model: PreTrainedModel) -> PreTrainedConfig:
    return type(model.config)(**model.config.to_dict(), attn_implementation="flash_attention_2")


def test_the_choice_of_attention() -> None:
    """A cap on attention scores (Gemma 2) is beyond sdpa, which some versions of Transformers take all the same."""
    cpu = torch.device("cpu")
    capped, plain = random_model("gemma2"), random_model("llama")
    capped.config._attn_implementation = "sdpa"
    set_attention(capped, "auto", cpu)
    set_attention(plain, "auto", cpu)
    assert (capped.config._attn_implementation, plain.config._attn_implementation) == ("eager", "sdpa")
    set_attention(plain, "eager", cpu)
    assert plain.config._attn_implementation == "eager"
    assert resolve_attention("flex_attention", cpu, capped.config) == "flex_attention"
    with pytest.raises(UserError, match="caps its attention scores"):
        set_attention(capped, "sdpa", cpu)
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        set_attention(plain, "flash_attention_2", cpu)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="FlashAttention is installed")
def test_an_attention_that_is_not_installed_is_a_plain_error() -> None:
    with pytest.raises(UserError, match=r"model\.attention"):
        set_attention(random_model("llama"), "flash_attention_2", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of Transformers and torch, while they compile flex_attention
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_losses_and_gradients_on_a_gpu(kind: str, attention: str) -> None:
    """In fp32, where packed and alone differ by rounding only."""
    if not can_attend(kind, attention):
        pytest.skip("the model cannot use this attention")
    model = random_model(kind).cuda()
    model.set_attn_implementation(attention)
    module = CausalLMLoss(model)
    rows = samples()
    alone = torch.zeros((), device="cuda")
    for sample in (sample.cuda() for row in rows for sample in row):
        labels = torch.cat([torch.tensor([IGNORED], device="cuda"), sample[1:]])
        alone = alone + module(sample[None], labels[None], torch.arange(len(sample), device="cuda")[None])
    together = module(*(tensor.cuda() for tensor in packed(rows)))
    assert relative_gap(together, alone) < 1e-5
    expected, ours = gradients(model, alone), gradients(model, together)
    assert max(map(relative_gap, ours, expected)) < 1e-4
