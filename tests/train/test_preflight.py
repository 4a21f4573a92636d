"""Runs that would train nothing, or the wrong thing, are refused; runs that are right are not touched."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nybble.adapters.inject import inject
from nybble.config import RunConfig
from nybble.data.collate import Batch
from nybble.errors import UserError
from nybble.models.load import load_model
from nybble.models.loss import CausalLMLoss
from nybble.optim.adamw import build_optimizer
from nybble.train.activation_checkpointing import enable_activation_checkpointing
from nybble.train.course import Course, training_batches
from nybble.train.loop import training_steps
from nybble.train.preflight import Preflight, check_coverage, check_disk, count_checkpoints, preflight
from nybble.train.run import run_training
from tests.train.test_loop import CPU, loss_and_data, trained


def check(loss: CausalLMLoss, batch: Batch, output: Path) -> Preflight:
    parameters = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    return preflight(loss, parameters, batch, output=output, final_bytes=0, num_checkpoints=1)


def first_batch(loss_and_examples: tuple[CausalLMLoss, object], config: RunConfig) -> Batch:
    _, examples = loss_and_examples
    return next(training_batches(examples, config.train, Course.plan(len(examples), config.train)))


def test_a_right_run_passes(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = settings()
    loss, examples = loss_and_data(config)
    enable_activation_checkpointing(loss.model)
    result = check(loss, first_batch((loss, examples), config), tmp_path)
    assert result.gradient_tensors == 28
    assert 0 < result.loss < 20
    assert result.checkpoint_bytes == 3 * 4 * sum(p.numel() for p in trained(loss).values())


def test_it_changes_nothing(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Random state, weights, gradients and modes are what they were, and the run that follows has the same bits."""
    config = settings("gpt2", **{"lora.lora_dropout": 0.3, "train.max_steps": 3})
    after = []
    for with_check in (False, True):
        loss, examples = loss_and_data(config)
        optimizer = build_optimizer(loss, config.optim)
        course = Course.plan(len(examples), config.train)
        torch.manual_seed(3)
        before, modes = trained(loss), [module.training for module in loss.modules()]
        if with_check:
            check(loss, first_batch((loss, examples), config), tmp_path)
        assert all(torch.equal(weight, before[name]) for name, weight in trained(loss).items())
        assert not any(p.grad is not None and p.grad.any() for p in loss.parameters())
        assert modes == [module.training for module in loss.modules()]
        drawn = torch.rand(3)
        batches = training_batches(examples, config.train, course)
        losses = [r.loss for r in training_steps(loss, batches, optimizer, config, total_steps=3)]
        after.append((drawn, losses, trained(loss)))
    assert torch.equal(after[0][0], after[1][0])
    assert after[0][1] == after[1][1]
    assert all(torch.equal(weight, after[1][2][name]) for name, weight in after[0][2].items())


class Detached(nn.Module):
    """A layer whose output nothing learns from."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self.inner(*args, **kwargs).detach()


def test_an_adapter_without_gradient_is_refused(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = settings()
    loss, examples = loss_and_data(config)
    mlp = loss.model.model.layers[1].mlp
    mlp.up_proj = Detached(mlp.up_proj)
    expected = r"2 of 28 trained tensors get no gradient .*layers\.1\.mlp\.up_proj\.inner\.adapters\.default\.lora_A"
    with pytest.raises(UserError, match=expected):
        check(loss, first_batch((loss, examples), config), tmp_path)


def test_reentrant_checkpointing_behind_frozen_embeddings_is_refused(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The classic: the first layers' inputs need no gradient, so nothing at all is trained."""
    config = settings()
    loss, examples = loss_and_data(config)
    for layer in loss.model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=True
        )
    message = "28 of 28 trained tensors get no gradient"
    with pytest.warns(UserWarning, match="None of the inputs"), pytest.raises(UserError, match=message):
        check(loss, first_batch((loss, examples), config), tmp_path)


def test_a_zero_gradient_of_b_is_refused(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = settings()
    loss, examples = loss_and_data(config)
    with torch.no_grad():
        loss.get_parameter("model.model.layers.0.mlp.up_proj.adapters.default.lora_A").zero_()
    with pytest.raises(UserError, match=r"1 of 28 trained tensors get a gradient that is zero: .*up_proj.*lora_B"):
        check(loss, first_batch((loss, examples), config), tmp_path)


def test_a_broken_base_is_refused(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = settings()
    loss, examples = loss_and_data(config)
    with torch.no_grad():
        loss.get_parameter("model.model.norm.weight")[0] = torch.inf
    with pytest.raises(UserError, match="the loss of the first batch is nan"):
        check(loss, first_batch((loss, examples), config), tmp_path)


def test_full_disk_is_foreseen(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs about 8192\.00 TiB on this disk"):
        check_disk(tmp_path, 2**53)


def test_checkpoints_at_once(settings: Callable[..., RunConfig]) -> None:
    def count(**changes: int) -> int:
        return count_checkpoints(100, settings(**{f"train.{name}": value for name, value in changes.items()}).train)

    assert count() == 1
    assert count(save_every=60) == 2
    assert count(save_every=10, keep_checkpoints=3) == 5


def test_coverage_of_names_is_complete_or_refused(settings: Callable[..., RunConfig]) -> None:
    config = settings(**{"lora.target_modules": ["layers.0.self_attn.q_proj", "v_proj"]})
    model = load_model(config.model, device=CPU).model
    report = inject(model, config.lora)
    with pytest.raises(UserError, match=r"q_proj: 1 of 2 are adapted"):
        check_coverage(model, report, config.lora)
    on_purpose = config.lora.model_copy(update={"target_modules": r".*layers\.0\.self_attn\.q_proj"})
    check_coverage(model, report, on_purpose)


def test_the_head_alone_may_be_named(settings: Callable[..., RunConfig]) -> None:
    config = settings(**{"lora.target_modules": ["lm_head"]})
    model = load_model(config.model, device=CPU).model
    check_coverage(model, inject(model, config.lora), config.lora)


def test_all_linear_does_not_reach_experts(settings: Callable[..., RunConfig]) -> None:
    config = settings("mixtral")
    model = load_model(config.model, device=CPU).model
    report = inject(model, config.lora)
    with pytest.raises(UserError, match="weights of experts are no linear layers"):
        check_coverage(model, report, config.lora)


def test_a_convolution_is_no_expert(settings: Callable[..., RunConfig]) -> None:
    config = settings("llama")
    model = load_model(config.model, device=CPU).model
    model.model.layers[0].conv1d = torch.nn.Conv1d(4, 4, 3)
    check_coverage(model, inject(model, config.lora), config.lora)


def test_eos_that_is_never_trained_is_refused(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A template that puts the end of a turn outside of it: the answers never end."""
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}!"
        "{% else %}{{ m['role'] + m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="0 of 24 samples train the token that ends them"):
        run_training(settings(**{"data.chat_template": str(template)}), quiet=True)


def test_a_doubled_bos_is_refused(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The template writes a BOS and so do the data."""
    data = tmp_path / "bos.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n')
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{{ bos_token + bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
        "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    config = settings(**{"data.path": str(data), "data.chat_template": str(template)})
    with pytest.raises(UserError, match="two BOS tokens"):
        run_training(config, quiet=True)
    assert not Path(config.output).joinpath("run.json").exists()


def test_a_row_without_a_trained_token_is_refused(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    data = tmp_path / "empty.jsonl"
    data.write_text('{"prompt": "Question", "completion": "Answer"}\n{"text": ""}\n')
    with pytest.raises(UserError, match=re.compile("empty.jsonl.*2", re.DOTALL)):
        run_training(settings(**{"data.path": str(data)}), quiet=True)


def test_a_sequence_longer_than_the_model_is_refused(settings: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match="the model has positions for 512 tokens"):
        run_training(settings(**{"data.max_length": 513}), quiet=True)
