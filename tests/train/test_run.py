"""Whole runs: what they leave behind, and what is refused before anything is computed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nybble.adapters.config import LoraConfig
from nybble.adapters.saved import read_adapter
from nybble.config import RunConfig
from nybble.errors import TrainingStopped, UserError
from nybble.export.merged import merge_checkpoint
from nybble.inference import load_for_inference
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.load import load_model
from nybble.quant.linear import DenseLinear, NF4Linear
from nybble.train.out_of_memory import advice, explain_out_of_memory
from nybble.train.resources import Resources
from nybble.train.run import RunResult, run_training


def test_a_run_leaves_its_record(settings: Callable[..., RunConfig]) -> None:
    config = settings(**{"method": "qlora", "train.max_steps": 8, "data.validation_fraction": 0.2})
    result = run_training(config, quiet=True)
    record = json.loads((result.output / "run.json").read_text())
    log = [json.loads(line) for line in (result.output / "log.jsonl").read_text().splitlines()]
    assert record == json.loads(json.dumps(result.summary))
    assert record["status"] == "finished"
    assert record["storage"] == "nf4"
    assert record["config"] == config.model_dump(mode="json")
    assert record["losses"] == [line["loss"] for line in log if "loss" in line]
    assert [line["step"] for line in log if "eval_loss" in line] == [0, 8]
    assert record["evaluations"][1]["loss"] < record["evaluations"][0]["loss"] - 1
    assert record["parameters"]["trainable"] == 4 * sum(
        sum(shape) for shape in [(64, 64), (64, 32), (64, 32), (64, 64), *[(64, 96)] * 3] * 2
    )
    assert 0 < record["tokens_per_second"] < 1e9
    assert record["peak_host_bytes"] > record["base"]["weight_bytes"] > 0
    assert RunConfig.read(result.output / "config.yaml", {}) == config
    assert yaml.safe_load((result.output / "config.yaml").read_text())["method"] == "qlora"


def test_same_seed_same_run(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    def losses(name: str, **changes: Any) -> tuple[float, ...]:
        config = settings(**{"output": str(tmp_path / name), "lora.lora_dropout": 0.2, "train.max_steps": 3} | changes)
        return run_training(config, quiet=True).losses

    first = losses("a")
    assert losses("b") == first
    assert losses("c", **{"train.deterministic": True}) == first
    assert not torch.are_deterministic_algorithms_enabled()
    assert losses("d", **{"train.seed": 1}) != first


STOCK_PLANS = (
    {"memory.activations": "recompute"},
    {"memory.weights": "streamed", "memory.embedding": "host"},
    {"memory.moments": "paged", "optim.state_bits": 8},
    {"optim.state_bits": 8},
)
FUSED_PLANS = (
    {"memory.activations": "keep_matmuls"},
    {"memory.activations": "keep_on_host"},
    {"memory.activations": "offload", "memory.weights": "streamed", "memory.embedding": "host"},
    {"memory.activations": "recompute", "memory.span": 2, "memory.weights": "streamed", "memory.moments": "paged"},
)


@pytest.mark.parametrize("plans", [STOCK_PLANS[:2], STOCK_PLANS[2:], FUSED_PLANS], ids=["stock", "paged", "fused"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_what_memory_holds_is_not_what_is_computed(
    settings: Callable[..., RunConfig], tmp_path: Path, method: str, plans: tuple[dict[str, Any], ...]
) -> None:
    def run(changes: dict[str, Any]) -> tuple[tuple[float, ...], dict[str, torch.Tensor]]:
        output = tmp_path / "-".join(map(str, changes.values()))
        config = settings("mistral", **changes, **{"method": method, "output": str(output), "train.max_steps": 3})
        result = run_training(config, quiet=True)
        return result.losses, load_file(result.folder / "adapter_model.safetensors")

    losses, adapter = run(plans[0])
    for changes in plans[1:]:
        other_losses, other_adapter = run(changes)
        assert other_losses == losses
        assert all(torch.equal(other_adapter[name], tensor) for name, tensor in adapter.items())


def test_the_plan_is_shown_and_recorded(settings: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    summary = run_training(settings(**{"memory.activations": "recompute", "train.max_steps": 1})).summary
    assert "plan: activations recomputed; weights on the device" in capsys.readouterr().err
    layers = [{"number": 2, "activations": "recompute", "weights": "resident"}]
    assert summary["memory"]["plan"]["layers"] == layers
    assert summary["memory"]["stock_modules"] == "they need a GPU"
    assert summary["memory"]["predicted"] is None
    assert summary["device_peak"] == {"allocated_bytes": 0, "reserved_bytes": 0, "beyond_bytes": 0}


def test_what_does_not_fit_is_refused_before_it_is_loaded(settings: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match=r"memory: the run does not fit"):
        run_training(settings(**{"memory.budget": "1KiB"}), quiet=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("llama", ["qproj", "v_proj"], r"'qproj' matches nothing; did you mean 'q_proj'"),
        ("llama", ["0.self_attn.q_proj"], r"q_proj: 1 of 2 are adapted(?s:.*)1 of 15 linear layers"),
        ("gpt2", ["q_proj"], r"'q_proj' matches nothing(?s:.*)c_attn"),
        ("mixtral", "all-linear", "weights of experts are no linear layers"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_layers_that_are_not_there_are_told_before_rows_or_weights_are_read(
    settings: Callable[..., RunConfig], kind: str, targets: Any, message: str, method: str
) -> None:
    class Unread(Resources):
        def prepare(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("rows were read")

    config = settings(kind, **{"lora.target_modules": targets, "method": method})
    with pytest.raises(UserError, match=message):
        run_training(config, quiet=True, resources=Unread())


def test_peft_loads_the_adapter(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    )
    config = settings("qwen2", **{"data.chat_template": str(template), "lora.use_rslora": True})
    result = run_training(config, quiet=True)
    assert AutoTokenizer.from_pretrained(result.folder).chat_template == template.read_text()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.name), result.folder)
    tensors = load_file(result.folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(config.model.name)
    input_ids = torch.arange(4, 40).unsqueeze(0)
    with torch.no_grad():
        assert not torch.allclose(theirs(input_ids).logits, base(input_ids).logits, atol=1e-2)


def test_full_trains_everything_and_saves_a_model(settings: Callable[..., RunConfig], tiny: Any) -> None:
    config = settings("gpt2", **{"method": "full", "optim.learning_rate": 3e-3})
    result = run_training(config, quiet=True)
    assert result.folder == result.output / "model"
    assert result.parameters.trainable == result.parameters.total
    before = AutoModelForCausalLM.from_pretrained(tiny("gpt2")).state_dict()
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    after = model.state_dict()
    assert before.keys() == after.keys()
    unchanged = [name for name, weight in after.items() if torch.equal(weight, before[name])]
    assert unchanged == []
    checkpoint = result.output / "checkpoints" / "step-000006"
    held = load_file(checkpoint / "parameters-00001.safetensors")
    assert torch.equal(held["transformer.wte.weight"], after["transformer.wte.weight"])
    ours = load_model(config.model.model_copy(update={"name": str(result.folder)}), device=torch.device("cpu"))
    input_ids = torch.arange(4, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(ours.model(input_ids).logits, model.eval()(input_ids).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(result.folder).chat_template


def test_full_in_bf16_says_what_it_costs(
    settings: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(settings(**{"method": "full", "model.storage": "bf16", "train.max_steps": 1}))
    assert "updates below 1/256 of a weight round away" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(r=3)], ids=["untouched", "changed"])
def test_full_says_that_settings_of_an_adapter_do_not_count(
    lora: LoraConfig, settings: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(**{"method": "full", "train.max_steps": 1})
    run_training(config.model_copy(update={"lora": lora}))
    assert ("makes no adapter" in capsys.readouterr().err) == (lora != LoraConfig())


def test_what_became_of_rows_is_said(
    settings: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "Why?", "completion": "Because " * (30 if number == 3 else 3)} for number in range(6)]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"data.path": str(tmp_path / "train.jsonl"), "data.validation_path": str(tmp_path / "valid.jsonl")}
    run_training(settings(**paths, **{"train.max_steps": 1}))
    shown = capsys.readouterr().err
    assert "note: 1 samples were cut to data.max_length" in shown
    assert "note: 6 held-out rows are training rows too" in shown


def test_provenance_names_how_the_base_was_held(settings: Callable[..., RunConfig]) -> None:
    config = settings(**{"method": "qlora", "model.block_size": 32, "model.double_quant": False, "train.max_steps": 1})
    result = run_training(config, quiet=True)
    provenance = json.loads((result.folder / "nybble.json").read_text())
    assert (provenance["storage"], provenance["block_size"], provenance["double_quant"]) == ("nf4", 32, False)
    assert provenance["base"] == config.model.name


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_head_in_nf4_is_for_training_alone(settings: Callable[..., RunConfig], tmp_path: Path, method: str) -> None:
    def run(head: str) -> RunResult:
        changes = {"method": method, "model.head": head, "output": str(tmp_path / head), "train.max_steps": 3}
        return run_training(settings(**changes), quiet=True)

    result, whole = run("nf4"), run("16bit")
    assert result.losses != whole.losses
    assert result.losses == pytest.approx(whole.losses, rel=0.01)
    base = result.summary["config"]["model"]["name"]
    provenance = json.loads((result.folder / "nybble.json").read_text())
    assert provenance["head"] == {"rounding": "nearest", "block_size": 64, "double_quant": True}
    for setting, expected in {"auto": NF4Linear, "16bit": DenseLinear}.items():
        asked = load_for_inference(ModelConfig(name=base, head=setting), result.folder).model
        assert type(asked.get_output_embeddings()) is expected
    merge_checkpoint(Checkpoint.open(base), read_adapter(result.folder), tmp_path / "merged", base="original")
    merged, before = (load_file(Path(folder) / "model.safetensors") for folder in (tmp_path / "merged", base))
    assert merged.keys() == before.keys()
    kept = [name for name in before if "proj" not in name]
    assert len(kept) > 3
    assert all(torch.equal(merged[name], before[name]) for name in kept)


def test_a_head_in_nf4_is_not_trained_in_full(settings: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match=r"model\.head: is nf4, which method full does not train"):
        run_training(settings(**{"method": "full", "model.head": "nf4"}), quiet=True)


def test_progress_is_plain_lines_without_a_terminal(
    settings: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(settings(**{"data.validation_fraction": 0.2}))
    shown = capsys.readouterr().err
    assert "adapter reaches 14 of 15 linear layers" in shown
    assert "checked: 28 of 28 trained tensors get a gradient" in shown
    assert "step 1/6  loss " in shown
    assert "tok/s" in shown
    assert "step 6/6  held-out loss " in shown


def test_another_run_is_not_overwritten(settings: Callable[..., RunConfig]) -> None:
    result = run_training(settings(**{"train.max_steps": 1}), quiet=True)
    before = {path: path.stat().st_mtime_ns for path in result.output.rglob("*")}
    with pytest.raises(UserError, match="holds another run") as refused:
        run_training(settings(), quiet=True)
    assert refused.value.fix == "Choose another output folder."
    with pytest.raises(UserError, match="this run is finished"):
        run_training(settings(), resume=True, quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in result.output.rglob("*")}


def test_an_unfinished_run_names_the_command_that_goes_on(settings: Callable[..., RunConfig]) -> None:
    output = run_training(settings(**{"train.max_steps": 1}), quiet=True).output
    record = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    with pytest.raises(UserError, match=rf"nybble train {re.escape(str(output))}/config\.yaml --resume"):
        run_training(settings(), quiet=True)


def test_nothing_to_resume_is_refused(settings: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match="holds no run that could be resumed"):
        run_training(settings(), resume=True, quiet=True)


def test_an_output_that_cannot_be_written_is_refused(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        run_training(settings(output=str(tmp_path / "file" / "out")), quiet=True)


@pytest.mark.parametrize(("method", "storage"), [("qlora", "bf16"), ("full", "nf4"), ("full", "fp16")])
def test_method_and_storage_must_agree(settings: Callable[..., RunConfig], method: str, storage: str) -> None:
    with pytest.raises(UserError, match=f"is {storage}, which method {method} does not train"):
        run_training(settings(**{"method": method, "model.storage": storage}), quiet=True)


def test_a_tracker_that_is_not_installed_is_refused(settings: Callable[..., RunConfig]) -> None:
    pytest.importorskip("tensorboard")
    missing = settings(**{"train.trackers": ["tensorboard", "trackio"]})
    with pytest.raises(UserError, match=r"not installed: trackio\nRun: pip install trackio"):
        run_training(missing, quiet=True)


def test_tensorboard_gets_the_figures(settings: Callable[..., RunConfig]) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracked = settings(**{"train.trackers": ["tensorboard"], "data.validation_fraction": 0.2})
    result = run_training(tracked, quiet=True)
    events = next(path.parent for path in result.output.rglob("events.out.tfevents*") if path.parent.name == "nybble")
    logged = reader.EventAccumulator(str(events))
    logged.Reload()
    assert [event.value for event in logged.Scalars("loss")] == pytest.approx(result.losses)
    assert [event.step for event in logged.Scalars("eval_loss")] == [0, 6]


def test_a_diverging_run_keeps_its_last_good_checkpoint(settings: Callable[..., RunConfig]) -> None:
    """An absurd rate overflows the weights: the run stops, and its checkpoint is from before."""
    absurd = {"optim.learning_rate": 1e30, "optim.schedule": "constant", "train.save_every": 1}
    with pytest.raises(TrainingStopped, match=r"step \d+: the (loss|gradient norm) is (nan|inf)") as stopped:
        run_training(settings(**absurd), quiet=True)
    output = Path(settings().output)
    record = json.loads((output / "run.json").read_text())
    assert record["status"] == "failed"
    assert not (output / "adapter").exists()
    kept = sorted((output / "checkpoints").glob("step-*"))
    assert f"\nThe last good checkpoint is {kept[-1]}" in str(stopped.value)
    held = load_file(kept[-1] / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in held.values())


def test_out_of_memory_says_what_helps(settings: Callable[..., RunConfig]) -> None:
    config = settings(**{"train.batch_size": 8, "memory.activations": "keep"})
    device = torch.device("cpu")
    with pytest.raises(TrainingStopped) as stopped, explain_out_of_memory(config, device):
        torch.empty(2**60, dtype=torch.uint8)
    message = str(stopped.value)
    assert message.startswith("out of memory on cpu (")
    assert "train.batch_size=4 (now 8" in message
    assert "train.gradient_accumulation=2" in message
    assert "memory.activations=recompute (now keep" in message
    assert "data.max_length=48 (now 96" in message
    assert "method=qlora" in message
    assert "method" not in "".join(advice(settings(method="qlora")))


def test_a_run_that_does_not_fit_says_so_once(
    settings: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"memory: the run does not fit: .*there are 1\.00 MiB"):
        run_training(settings(**{"memory.budget": "1MiB"}))
    assert capsys.readouterr().err == ""


def test_other_errors_are_left_as_they_are(settings: Callable[..., RunConfig]) -> None:
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        explain_out_of_memory(settings(), torch.device("cpu")),
    ):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_moments_in_8_bits_are_refused_on_several_processes_before_anything_is_loaded(
    settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.train.run.world_size", lambda: 2)
    config = settings(**{"optim.state_bits": 8, "model.name": "nowhere"})
    with pytest.raises(UserError, match="8 bits on one process only"):
        run_training(config, quiet=True)
    assert not Path(config.output).exists()
