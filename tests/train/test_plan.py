"""What is planned for a run before anything of it is loaded."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from nybble.config import RunConfig
from nybble.errors import UserError
from nybble.planner.candidates import Choices
from nybble.planner.cards import DeviceSpec, card
from nybble.planner.reach import reach
from nybble.planner.run_shape import RunShape
from nybble.planner.shapes import ModelShape
from nybble.planner.solve import Change, Solution, solve
from nybble.quant.format import NF4Spec
from nybble.train.plan import Rows, RunPlan, plan_run, run_shape, trained_parameters

LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
    "vocab_size": 1000,
    "torch_dtype": "bfloat16",
}
SHAPE = ModelShape.from_config(LLAMA)
ROWS = Rows(512, 300)


def config_of(**changes: Any) -> RunConfig:
    return RunConfig.read(None, {"model.name": "m", "data.path": "d", "output": "o"} | changes)


def plan_of(model: dict[str, Any] | None = None, on_gpu: bool = True, processes: int = 1, **changes: Any) -> RunPlan:
    model = LLAMA if model is None else model
    return plan_run(config_of(**changes), model, card("h100"), rows=ROWS, on_gpu=on_gpu, processes=processes)


def test_nothing_imports_torch() -> None:
    code = "import sys, nybble.train.plan, nybble.planner.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def shape_of(config: RunConfig, rows: Rows = ROWS) -> RunShape:
    return run_shape(config, SHAPE, rows, reach(SHAPE, config.lora))


def test_a_run_has_the_sizes_of_its_settings() -> None:
    config = config_of(
        **{
            "method": "qlora",
            "lora.target_modules": ["o_proj", "down_proj"],
            "lora.rank_pattern": {"down_proj": 64},
            "lora.dtype": "bf16",
            "optim.state_bits": 8,
            "model.double_quant": False,
            "model.block_size": 128,
            "train.batch_size": 3,
            "train.gradient_accumulation": 5,
        }
    )
    run = shape_of(config, Rows(512, 300, 4))
    assert (run.method, run.targets, run.rank, run.trained_bytes) == ("qlora", ("o_proj", "down_proj"), 64, 2)
    assert (run.batch, run.seq_len, run.accumulation, run.samples_a_row) == (3, 512, 5, 4)
    assert (run.state_bits, run.nf4, run.storage_bytes) == (8, NF4Spec(128, 0), 2)
    assert (run.evaluation_len, run.fused) == (300, True)
    assert shape_of(config_of(**{"method": "lora", "model.storage": "nf4"})).method == "qlora"
    assert shape_of(config_of(**{"method": "lora", "model.storage": "fp32"})).storage_bytes == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"train.fused": False}, "train.fused is off"),
        ({"method": "full"}, "method full trains the weights"),
        ({"processes": 2}, "they run on one process"),
        ({"on_gpu": False}, "they need a GPU"),
        ({"on_gpu": False, "memory.activations": "keep_matmuls"}, None),
        ({"on_gpu": False, "memory.mlp_rows": 128}, None),
        ({"model.attention": "sdpa"}, "model.attention chooses another attention"),
        ({"model": {"model_type": "gpt2", "n_layer": 3}}, "none are known for this kind of model"),
        ({"lora.use_dora": True}, "DoRA rescales whole weights"),
        ({"lora.lora_dropout": 0.1}, "lora_dropout gives each linear an input of its own"),
        ({"lora.target_modules": ["q_proj", "v_proj"]}, "an adapter has some of the linears that read one input"),
        ({"lora.target_modules": "attention"}, None),
        ({"lora.r": 256}, "ranks above 128 are too wide"),
    ],
)
def test_why_a_run_takes_stock_modules(changes: dict[str, Any], reason: str | None) -> None:
    stock = plan_of(**changes).stock
    assert stock is None if reason is None else stock is not None and stock.startswith(reason)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("activations", "offload"),
        ("activations", "keep_matmuls"),
        ("activations", "keep_on_host"),
        ("span", 2),
        ("mlp_rows", 256),
    ],
)
def test_what_stock_modules_cannot_do_is_refused(setting: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"memory\.{setting}={value}: needs fused kernels, and DoRA rescales"):
        plan_of(**{"lora.use_dora": True, f"memory.{setting}": value})
    assert plan_of(**{"lora.use_dora": True, "memory.span": 1}).stock


def test_fp8_is_refused_without_fused_kernels() -> None:
    with pytest.raises(UserError, match=r"train\.precision=fp8: needs fused kernels"):
        plan_of(**{"lora.use_dora": True, "train.precision": "fp8"})


@pytest.mark.parametrize(("setting", "value"), [("weights", "streamed"), ("head", "host"), ("moments", "paged")])
def test_several_processes_hold_all_on_their_cards(setting: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"memory\.{setting}={value}: is possible on one process only"):
        plan_of(processes=2, **{f"memory.{setting}": value})
    plan = plan_of(processes=2).memory
    assert (plan.embedding, plan.head, plan.moments, plan.streamed()) == ("device", "device", "resident", [])
    assert plan_of(processes=2, **{"train.distributed": "fsdp2"}).solution is None


@pytest.mark.parametrize("model", [LLAMA, LLAMA | {"model_type": "unheard of"}], ids=["known", "unknown"])
@pytest.mark.parametrize("stock", [False, True])
def test_what_the_settings_fix_stays(model: dict[str, Any], stock: bool) -> None:
    changes = {"lora.use_dora": True} if stock else {}
    fixed = {"weights": "streamed", "embedding": "host", "head": "host", "moments": "paged"}
    for activations in ("keep", "recompute"):
        settings = {f"memory.{name}": value for name, value in fixed.items()}
        plan = plan_of(model, **changes, **settings, **{"memory.activations": activations}).memory
        assert {layer.weights for layer in plan.layers} == {"streamed"}
        assert {layer.activations for layer in plan.layers} == {activations}
        assert (plan.embedding, plan.head, plan.moments) == ("host", "host", "paged")
        assert len(plan.layers) == 4


def test_an_unknown_model_is_recomputed_and_nothing_is_predicted() -> None:
    plan = plan_of({"model_type": "gpt2", "n_layer": 3})
    assert [layer.activations for layer in plan.memory.layers] == ["recompute"] * 3
    assert plan.solution is None
    assert plan.lines() == [
        "plan: activations recomputed; weights on the device (nothing is predicted for this model)",
    ]
    plan.require_fit()


@pytest.mark.parametrize(
    "trained",
    [{"lora.target_modules": ["lm_head", "down_proj"]}, {"lora.modules_to_save": ["embed_tokens"]}, {"method": "full"}],
)
def test_what_is_trained_lies_on_the_card(trained: dict[str, Any]) -> None:
    plan = plan_of(**trained)
    assert (plan.required.embedding, plan.required.head) == (plan.memory.embedding, plan.memory.head) == ("device",) * 2
    for end in ("embedding", "head"):
        with pytest.raises(UserError, match=rf"memory\.{end}: what is trained cannot lie in host memory"):
            plan_of(**trained, **{f"memory.{end}": "host"})


@pytest.mark.parametrize("weights", ["streamed", "disk"])
def test_weights_in_training_stay_on_the_card(weights: str) -> None:
    small = card("h100").with_memory(900 * 2**20)
    plan = plan_run(config_of(method="full"), LLAMA, small, rows=ROWS)
    assert plan.memory.streamed() == []
    with pytest.raises(UserError, match=r"memory\.weights: what is trained cannot lie in host memory"):
        plan_of(method="full", **{"memory.weights": weights})


def test_what_is_not_trained_lies_anywhere() -> None:
    assert plan_of().required == Choices(in_files=False)  # they are not in NF4 there


def test_of_several_processes_nothing_is_left_to_choose() -> None:
    found = plan_of(processes=2).required
    assert (found.weights, found.embedding, found.head, found.moments) == ("resident", "device", "device", "resident")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_smaller_plan_keeps_what_is_required(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And lets go of what the settings fix."""
    trained = {"lora.target_modules": ["lm_head", "down_proj"]} if method == "lora" else {}
    plan = plan_of(**trained, **{"method": method, "memory.activations": "keep", "memory.moments": "resident"})
    asked: list[Choices] = []

    def solved(shape: ModelShape, run: RunShape, device: DeviceSpec, fixed: Choices) -> Solution:
        asked.append(fixed)
        return solve(shape, run, device, fixed)

    monkeypatch.setattr("nybble.train.plan.solve", solved)
    plan.smaller(10 * 2**20)
    assert replace(asked[0], budget_bytes=None) == plan.required
    assert (asked[0].embedding, asked[0].head, asked[0].activations) == ("device", "device", "auto")


def test_tied_ends_are_one_matrix() -> None:
    tied = LLAMA | {"tie_word_embeddings": True}
    for end in ("embedding", "head"):
        plan = plan_of(tied, **{f"memory.{end}": "host"}).memory
        assert (plan.embedding, plan.head) == ("host", "host")
    with pytest.raises(UserError, match="cannot lie in two places"):
        plan_of(tied, **{"memory.head": "host", "memory.embedding": "device"})


def test_a_head_in_nf4_is_held_apart_from_its_embedding() -> None:
    tied = ModelShape.from_config(LLAMA | {"tie_word_embeddings": True})
    in_nf4, fused = {"model.head": "nf4"}, {"memory.activations": "recompute", "memory.span": 1}
    plan = plan_run(config_of(**in_nf4, **fused, **{"memory.embedding": "host"}), tied, card("h100"), rows=ROWS)
    assert (plan.memory.embedding, plan.memory.head) == ("host", "device")
    assert plan.prediction is not None
    away = plan_run(config_of(**fused, **{"memory.embedding": "host"}), tied, card("h100"), rows=ROWS)
    more = plan.prediction.phases["step"].device["weights"] - away.prediction.phases["step"].device["weights"]  # type: ignore[union-attr]
    assert more == pytest.approx(tied.embedding_weights * 4.127 / 8, rel=0.05)  # the other has the head on the host
    assert plan.required.head == "device"
    with pytest.raises(UserError, match=r"memory\.head: a head in NF4 lies on the device"):
        plan_run(config_of(**in_nf4, **{"memory.head": "host"}), tied, card("h100"), rows=ROWS)


def test_a_budget_is_kept_to() -> None:
    assert plan_of(**{"memory.budget": "4GiB"}).solution.budget_bytes == 4 * 2**30  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"memory: the run does not fit: .* need .*, and there are 10\.00 MiB"):
        plan_of(**{"memory.budget": "10MiB"}).require_fit()
    with pytest.raises(UserError, match=r"memory\.budget: .*write it like 24GiB"):
        config_of(**{"memory.budget": "much"})


@pytest.mark.parametrize("on_gpu", [True, False])
def test_on_a_cpu_a_run_is_refused_only_over_a_budget_that_was_given(on_gpu: bool) -> None:
    """There a prediction says which plan needs less, and memory that is short is swapped."""
    plan = plan_run(config_of(), LLAMA, card("h100").with_memory(10 * 2**20), rows=ROWS, on_gpu=on_gpu)
    assert plan.solution is not None
    assert not plan.solution.fits
    if on_gpu:
        with pytest.raises(UserError, match="does not fit"):
            plan.require_fit()
    else:
        plan.require_fit()
    with pytest.raises(UserError, match="does not fit"):
        plan_of(on_gpu=on_gpu, **{"memory.budget": "10MiB"}).require_fit()


def test_trained_parameters_are_exact() -> None:
    sizes = [(512, 512), (512, 256), (512, 256), (512, 512), (512, 1024), (512, 1024), (1024, 512)]
    assert trained_parameters(config_of(), SHAPE) == 16 * 4 * sum(map(sum, sizes))
    assert trained_parameters(config_of(method="full"), SHAPE) == SHAPE.parameters


EIGHT_B = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
EIGHT_B |= {"num_attention_heads": 32, "num_key_value_heads": 8}


def test_lora_over_a_quantized_checkpoint_holds_it_as_it_is() -> None:
    quantized = EIGHT_B | {"quantization_config": {"quant_method": "bitsandbytes"}}
    plans = plan_of(quantized, method="lora"), plan_of(quantized, method="qlora"), plan_of(EIGHT_B, method="lora")
    lora, qlora, in_16_bits = (plan.prediction.phases["step"].device["weights"] for plan in plans)  # type: ignore[union-attr]
    assert lora == qlora < 0.5 * in_16_bits


@pytest.mark.parametrize(
    ("method", "more", "disk"),
    [
        ("qlora", {}, False),
        ("qlora", {"quantization_config": {"quant_method": "bitsandbytes"}}, True),
        ("lora", {}, True),
    ],
)
def test_layers_come_from_disk_where_the_files_hold_them(method: str, more: dict[str, Any], disk: bool) -> None:
    """Here neither device nor host have room for all of them."""
    small = card("h100").with_memory(4 * 2**30).with_host(2 * 2**30)
    config = config_of(**{"method": method, "train.batch_size": 1})
    plan = plan_run(config, EIGHT_B | more, small, rows=ROWS)
    assert plan.solution is not None
    assert any(layer.weights == "disk" for layer in plan.memory.layers) == disk
    assert plan.solution.fits == disk
    if not disk:
        assert plan.solution.change is not None
        assert "`nybble quantize`" in plan.solution.change.settings


def change_of(budget: str, model: dict[str, Any] | None = None, rows: Rows = ROWS, **changes: Any) -> Change:
    """The smallest change that makes a run fit."""
    config = config_of(**{"memory.budget": budget} | changes)
    plan = plan_run(config, EIGHT_B if model is None else model, card("h100"), rows=rows)
    assert plan.solution is not None
    assert not plan.solution.fits
    assert plan.solution.change is not None
    assert (
        plan.solution.change.prediction.peak_bytes <= plan.solution.budget_bytes < plan.solution.prediction.peak_bytes
    )
    return plan.solution.change


def test_the_smallest_change_is_of_micro_batches() -> None:
    change = change_of("2.8GiB", rows=Rows(2048), **{"train.batch_size": 8, "train.gradient_accumulation": 2})
    settings = dict(setting.split("=") for setting in change.settings.split())
    assert set(settings) == {"train.batch_size", "train.gradient_accumulation"}
    assert int(settings["train.batch_size"]) * int(settings["train.gradient_accumulation"]) == 16


def test_rows_that_are_cut_are_evaluated_short() -> None:
    change = change_of("2.2GiB", rows=Rows(16384, 16384), **{"train.batch_size": 1, "optim.state_bits": 8})
    length = int(change.settings.rpartition("data.max_length=")[2])
    alone = plan_run(
        config_of(
            **{"memory.budget": "2.2GiB", "train.batch_size": 1, "optim.state_bits": 8, "train.cuda_graph": False}
        ),
        EIGHT_B,
        card("h100"),
        rows=Rows(length, length),
    )
    assert alone.prediction is not None
    assert change.prediction.phases["evaluation"] == alone.prediction.phases["evaluation"]


@pytest.mark.parametrize("storage", ["auto", "fp32"])
def test_instead_of_full_an_adapter_is_predicted_as_it_would_train(storage: str) -> None:
    """By fused kernels, with its pairs, and with ends that may leave the card."""
    small = LLAMA | {"num_hidden_layers": 2, "vocab_size": 50000, "hidden_size": 1024, "num_attention_heads": 16}
    full = {"method": "full", "train.batch_size": 1, "optim.state_bits": 8, "model.storage": storage}
    change = change_of("1.7GiB", small, **full)
    held = " model.storage=auto" if storage != "auto" else ""
    assert change.settings == f"method=lora{held}"
    lora = plan_of(small, **{"memory.budget": "1.7GiB", "method": "lora", "train.batch_size": 1, "optim.state_bits": 8})
    assert lora.stock is None
    assert lora.prediction == change.prediction
    assert change.prediction.phases["step"].device["adapters"] > 0


@pytest.mark.parametrize("processes", [1, 2])
def test_only_what_several_processes_can_do_is_advised_to_them(processes: int) -> None:
    config = config_of(**{"train.batch_size": 1, "train.fused": False})
    small = card("h100").with_memory(1500 * 2**20)
    plan = plan_run(config, LLAMA | {"vocab_size": 50000}, small, rows=Rows(2048), processes=processes)
    assert plan.solution is not None
    assert plan.solution.change is not None
    settings = {setting.partition("=")[0] for setting in plan.solution.change.settings.split()}
    assert settings == {"data.max_length"} | ({"optim.state_bits"} if processes == 1 else set())


def test_dora_stays_with_stock_modules_whatever_the_method() -> None:
    small = LLAMA | {"vocab_size": 50000}
    settings = {"train.batch_size": 1, "optim.state_bits": 8, "lora.use_dora": True}
    change = change_of("1.7GiB", small, **settings, method="full")
    method = change.settings.removeprefix("method=")
    assert plan_of(small, **settings, **{"method": method, "memory.budget": "1.7GiB"}).prediction == change.prediction


def test_all_weights_in_training_are_held_once() -> None:
    prediction = plan_of(method="full").prediction
    assert prediction is not None
    step = prediction.phases["step"].device
    assert "adapters" not in step
    for category, nbytes in {"weights": 4, "gradients": 4, "moments": 8}.items():
        assert step[category] == pytest.approx(nbytes * SHAPE.parameters, rel=1e-3)
    cast = sum(linear.weights for linear in SHAPE.linears) * 2
    assert step["cast weights"] == 4 * cast  # of four layers, kept for the backward pass
    in_bf16 = plan_of(method="full", **{"model.storage": "bf16"}).prediction
    assert in_bf16 is not None
    assert in_bf16.phases["step"].device["gradients"] == pytest.approx(2 * SHAPE.parameters, rel=1e-3)
    assert "cast weights" not in in_bf16.phases["step"].device


@pytest.mark.parametrize("budget", [None, "6GiB"])
def test_of_a_whole_card_a_little_is_left(budget: str | None) -> None:
    device = card("h100").with_memory(6 * 2**30)
    changes = {"memory.budget": budget} if budget else {}
    plan = plan_run(config_of(**changes), EIGHT_B, device, rows=Rows(2048))
    assert plan.solution is not None
    assert plan.solution.fits
    assert plan.solution.budget_bytes == 6 * 2**30
    used = plan.solution.prediction.peak_bytes / plan.solution.budget_bytes
    assert 0.9 < used <= (1 if budget else 0.98)
