"""The steps themselves: they learn, they weigh every token alike, and they stop before they spoil anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from nybble.adapters.inject import inject
from nybble.config import RunConfig
from nybble.data.collate import Batch
from nybble.data.example import Example
from nybble.data.prepare import prepare_data
from nybble.errors import TrainingStopped
from nybble.models.load import load_model
from nybble.models.loss import CausalLMLoss
from nybble.optim.adamw import build_optimizer
from nybble.train.course import Course, training_batches
from nybble.train.loop import StepResult, _seed, training_steps

CPU = torch.device("cpu")


def loss_and_data(config: RunConfig, *, fp64: bool = False) -> tuple[CausalLMLoss, Sequence[Example]]:
    """A model with an adapter whose B is not zero, and its examples."""
    loaded = load_model(config.model, device=CPU)
    inject(loaded.model, config.lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    if fp64:
        _compute_in_fp64(loaded.model)
    data = prepare_data(config.data, loaded.tokenizer, model_max_length=512)
    return CausalLMLoss(loaded.model), data.train


def _compute_in_fp64(model: nn.Module) -> None:
    for module in model.double().modules():
        if "compute_dtype" in vars(module):
            module.compute_dtype = torch.float64


def steps(
    loss: CausalLMLoss, examples: Sequence[Example], config: RunConfig, scaler: torch.amp.GradScaler | None = None
) -> Iterator[StepResult]:
    course = Course.plan(len(examples), config.train)
    return training_steps(
        loss,
        training_batches(examples, config.train, course),
        build_optimizer(loss, config.optim),
        config,
        total_steps=course.total_steps,
        scaler=scaler,
    )


def trained(loss: CausalLMLoss) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in loss.named_parameters() if p.requires_grad}


def test_loss_falls(settings: Callable[..., RunConfig]) -> None:
    config = settings(**{"train.max_steps": 15, "train.batch_size": 4})
    results = list(steps(*loss_and_data(config), config))
    assert [result.step for result in results] == list(range(1, 16))
    assert results[-1].loss < 0.5 * results[0].loss


def test_accumulation_is_exact_over_tokens(settings: Callable[..., RunConfig]) -> None:
    """4 micro-batches of 2 give what 1 of 8 gives, though they differ in their number of target tokens."""
    after = []
    for size, accumulation in ((2, 4), (8, 1)):
        changes = {"train.batch_size": size, "train.gradient_accumulation": accumulation, "train.max_steps": 3}
        config = settings("qwen2", **changes, **{"lora.lora_alpha": 10})
        loss, examples = loss_and_data(config, fp64=True)
        results = list(steps(loss, examples, config))
        after.append((results, trained(loss)))
    (several, several_weights), (one, one_weights) = after
    assert [r.target_tokens for r in several] == [r.target_tokens for r in one]
    for a, b in zip(several, one, strict=True):
        assert abs(a.loss - b.loss) < 1e-12 * abs(b.loss)
        assert abs(a.grad_norm - b.grad_norm) < 1e-11 * b.grad_norm
    for name, weight in one_weights.items():
        assert weight.dtype == torch.float64
        # AdamW's first steps are +-lr whatever the gradient's size, so its rounding counts where it is near eps.
        assert torch.allclose(several_weights[name], weight, rtol=0, atol=1e-9), name


def test_gradient_of_accumulation_is_that_of_one_batch(settings: Callable[..., RunConfig]) -> None:
    gradients = []
    for size, accumulation in ((2, 4), (8, 1)):
        changes = {"train.batch_size": size, "train.gradient_accumulation": accumulation, "optim.max_grad_norm": 0}
        config = settings(**changes)
        loss, examples = loss_and_data(config, fp64=True)
        optimizer = GradientKeeper([p for p in loss.parameters() if p.requires_grad])
        course = Course.plan(len(examples), config.train)
        list(training_steps(loss, training_batches(examples, config.train, course), optimizer, config, total_steps=1))
        gradients.append(optimizer.kept)
    for several, one in zip(*gradients, strict=True):
        assert torch.allclose(several, one, rtol=1e-12, atol=1e-12 * one.abs().max().item())


class GradientKeeper(torch.optim.SGD):
    """An optimizer that remembers the gradients of its last step."""

    def step(self, closure: None = None) -> None:
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        super().step(closure)


def test_gradients_are_clipped(settings: Callable[..., RunConfig]) -> None:
    config = settings(**{"train.max_steps": 1, "optim.max_grad_norm": 0.25})
    loss, examples = loss_and_data(config)
    optimizer = GradientKeeper([p for p in loss.parameters() if p.requires_grad])
    course = Course.plan(len(examples), config.train)
    (result,) = training_steps(loss, training_batches(examples, config.train, course), optimizer, config, total_steps=1)
    clipped = torch.stack([gradient.norm() for gradient in optimizer.kept]).norm().item()
    assert result.grad_norm > 0.25
    assert clipped == pytest.approx(0.25, rel=1e-4)


def test_a_non_finite_loss_stops_before_the_update(settings: Callable[..., RunConfig]) -> None:
    config = settings()
    loss, examples = loss_and_data(config)
    running = steps(loss, examples, config)
    next(running)
    before = trained(loss)
    with torch.no_grad():
        loss.get_parameter("model.model.norm.weight")[3] = torch.nan
    with pytest.raises(TrainingStopped, match=r"step 2: the loss is nan"):
        next(running)
    assert all(torch.equal(weight, before[name]) for name, weight in trained(loss).items())


def test_fp16_overflow_skips_the_step_and_lowers_the_scale(settings: Callable[..., RunConfig]) -> None:
    """Gradients that overflow leave the weights alone; the scale falls until they fit, then training goes on."""
    config = settings(**{"model.compute": "fp16", "train.max_steps": 15})
    loss, examples = loss_and_data(config)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    running = steps(loss, examples, config, scaler)
    before = trained(loss)
    first = next(running)
    assert first.skipped
    assert all(torch.equal(weight, before[name]) for name, weight in trained(loss).items())
    rest = list(running)
    assert not rest[-1].skipped
    assert scaler.get_scale() < 2.0**24


def test_hopeless_fp16_overflow_stops(settings: Callable[..., RunConfig]) -> None:
    config = settings()
    loss, examples = loss_and_data(config)
    running = steps(loss, examples, config, torch.amp.GradScaler("cpu", init_scale=0.5))
    _, parameter = next((n, p) for n, p in loss.named_parameters() if n.endswith("lora_A"))
    parameter.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingStopped, match="step 1: the gradient norm is"):
        next(running)


def test_randomness_of_a_step_depends_on_nothing_before_it(settings: Callable[..., RunConfig]) -> None:
    config = settings(**{"lora.lora_dropout": 0.5, "train.max_steps": 2})
    losses = []
    for draws in (0, 17):
        loss, examples = loss_and_data(config)
        running = steps(loss, examples, config)
        taken = [next(running).loss]
        torch.rand(draws)
        losses.append([*taken, next(running).loss])
    assert losses[0] == losses[1]


def test_course_counts_steps_over_epochs() -> None:
    config = RunConfig.read(None, {"model.name": "m", "data.path": "d", "output": "o"}).train
    of = config.model_copy(update={"batch_size": 2, "gradient_accumulation": 4, "epochs": 2.0})
    assert Course.plan(9, of) == Course(micro_batches_per_epoch=5, total_micro_batches=10, total_steps=3)
    assert Course.plan(9, of, num_processes=2).total_micro_batches == 6
    assert Course.plan(9, of.model_copy(update={"max_steps": 7})).total_micro_batches == 28


def test_training_goes_on_where_it_was(settings: Callable[..., RunConfig]) -> None:
    config = settings(**{"train.gradient_accumulation": 3})
    _, examples = loss_and_data(config)
    course = Course.plan(len(examples), config.train)
    straight = list(training_batches(examples, config.train, course))
    later = list(training_batches(examples, config.train, course, first_step=5))
    assert (len(straight), len(later)) == (18, 3)
    assert all(_same(a, b) for a, b in zip(straight[15:], later, strict=True))
    assert not _same(straight[0], straight[12])  # another epoch, another order


def _same(a: Batch, b: Batch) -> bool:
    return a.input_ids.shape == b.input_ids.shape and torch.equal(a.input_ids, b.input_ids)


def test_a_short_last_window_is_a_step(settings: Callable[..., RunConfig]) -> None:
    config = settings(**{"train.max_steps": None, "train.gradient_accumulation": 5})
    loss, examples = loss_and_data(config)  # 24 examples: 12 micro-batches, windows of 5, 5, 2
    results = list(steps(loss, examples, config))
    assert [r.step for r in results] == [1, 2, 3]
    assert sum(r.target_tokens for r in results) == sum(example.target_tokens for example in examples)


@pytest.mark.parametrize("seed", [0, 20241124, 2**40])
def test_any_seed_seeds_every_step(seed: int) -> None:
    """PyTorch takes 64 bits."""
    drawn = {_seed(seed, step) for step in range(1, 100)}
    assert len(drawn) == 99
    for number in drawn:
        torch.manual_seed(number)
