"""Two gloo processes train what one process trains, by DDP and by FSDP2, over dense and NF4 weights."""

from __future__ import annotations

import json
import os
import shutil
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import adapter_slots, inject
from nybble.adapters.lora import LoRALinear
from nybble.config import RunConfig
from nybble.data.collate import batches
from nybble.data.example import Example
from nybble.models.config import ModelConfig
from nybble.models.load import load_model
from nybble.models.loss import CausalLMLoss
from nybble.optim.adamw import build_optimizer
from nybble.sharded import full_tensor
from nybble.train.activation_checkpointing import enable_activation_checkpointing
from nybble.train.distributed import shard_or_replicate
from nybble.train.evaluate import evaluate
from nybble.train.loop import training_steps
from nybble.train.processes import rank, world_size
from nybble.train.run import run_training
from tests.tiny import VOCAB_SIZE

Tiny = Callable[..., Path]
PROCESSES = 2
BATCH_SIZE = 4  # of all processes together


@dataclass(frozen=True)
class Setup:
    """What is trained: a kind of model, how it is stored, and the adapter's settings; None trains every weight."""

    kind: str
    storage: str
    lora: dict[str, Any] | None


SETUPS = {
    "lora": Setup("qwen2", "auto", {"use_dora": True}),
    "qlora": Setup("llama", "nf4", {"target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]}),
    "qlora, head trained whole": Setup("gemma2", "nf4", {"modules_to_save": ["lm_head"]}),
    "full, tied": Setup("smollm", "fp32", None),
}
WAYS = ["ddp", "fsdp2"]


def examples() -> list[Example]:
    """Sequences of unequal lengths and numbers of targets, some of two samples; the last batch is short."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for row in range(4 * BATCH_SIZE - 2):
        tokens = 9 + 3 * (row % 5)
        trained = torch.rand(tokens, generator=generator) < 0.2 + 0.1 * (row % 7)
        trained[-1] = True
        lengths = (4, tokens - 4) if row % 3 == 0 else (tokens,)
        trained[[0, *([4] if len(lengths) > 1 else [])]] = False
        ids = torch.randint(3, VOCAB_SIZE, (tokens,), generator=generator, dtype=torch.int32)
        made.append(Example(ids, trained, lengths, row))
    return made


def prepared(folder: Path, setup: Setup) -> CausalLMLoss:
    loaded = load_model(ModelConfig(name=str(folder), storage=setup.storage), device=torch.device("cpu"))
    if setup.lora is None:
        loaded.model.requires_grad_(True)
    else:
        inject(loaded.model, LoraConfig(r=4, lora_alpha=12, **setup.lora))
        # Another start on each process: all must take that of rank 0.
        generator = torch.Generator().manual_seed(1 + rank())
        with torch.no_grad():
            for _, slot in adapter_slots(loaded.model):
                if isinstance(slot, LoRALinear):
                    b = slot.adapters["default"].lora_B
                    b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
    enable_activation_checkpointing(loaded.model)
    return CausalLMLoss(loaded.model)


def trained(folder: Path, setup: Setup, way: str) -> dict[str, Any]:
    """What comes of two steps of two micro-batches, on this process; the last micro-batch is short."""
    values = {"model": {"name": str(folder)}, "data": {"path": "-"}, "output": "-"}
    # A large eps keeps AdamW from blowing rounding up where a gradient is nearly zero.
    values["optim"] = {"learning_rate": 0.05, "eps": 0.1, "schedule": "constant", "warmup_steps": 0}
    values["train"] = {"gradient_accumulation": 2, "distributed": way, "batch_size": BATCH_SIZE // world_size()}
    config = RunConfig.model_validate(values)
    loss = prepared(folder, setup)
    module = shard_or_replicate(loss, config.train) if world_size() > 1 else loss
    optimizer = build_optimizer(module, config.optim)
    share: dict[str, Any] = {"rank": rank(), "world_size": world_size()}
    micro_batches = batches(examples(), batch_size=config.train.batch_size, **share)
    steps = list(training_steps(module, micro_batches, optimizer, config, total_steps=2))
    held_out = evaluate(module, batches(examples(), batch_size=config.train.batch_size, **share))
    batch = next(batches(examples(), batch_size=3))
    named = dict(loss.named_parameters())
    return {
        "losses": [step.loss for step in steps],
        "norms": [step.grad_norm for step in steps],
        "target tokens": [step.target_tokens for step in steps],
        "held out": held_out.loss,
        "sequences": loss.sequence_losses(batch.input_ids, batch.labels, batch.position_ids),
        "trained": {name: full_tensor(p.detach()).clone() for name, p in named.items() if p.requires_grad},
        "moments": {name: full_tensor(optimizer.state[p]["exp_avg"]) for name, p in named.items() if p.requires_grad},
        "bytes": sum(held_bytes(p) for p in named.values()),
        "packed bytes": sum(held_bytes(p) for p in named.values() if p.dtype == torch.uint8),
        "shares": {name: local(p).numel() / p.numel() for name, p in named.items()},
    }


def local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def held_bytes(parameter: Tensor) -> int:
    return local(parameter).nbytes


RUNS = [("qlora", "ddp"), ("qlora", "fsdp2"), ("full", "fsdp2")]


def run_config(folder: Path, chats: Path, output: Path, method: str, way: str) -> RunConfig:
    return RunConfig.read(
        None,
        {
            "model.name": str(folder),
            "data.path": str(chats),
            "data.max_length": 96,
            "data.validation_fraction": 0.2,
            "output": str(output / f"{method}-{way}"),
            "method": method,
            "lora.r": 4,
            "optim.learning_rate": 1e-3,
            "optim.eps": 0.1,
            "train.max_steps": 4,
            "train.save_every": 2,
            "train.batch_size": BATCH_SIZE // world_size(),
            "train.distributed": way,
        },
    )


def run_resumed(config: RunConfig) -> tuple[float, ...]:
    """A whole run, then its second half once more from the checkpoint in the middle; returns the losses."""
    result = run_training(config, quiet=True)
    if rank() == 0:
        result.folder.rename(result.output / "uninterrupted")
        shutil.rmtree(result.output / "checkpoints" / "step-000004")
        (result.output / "run.json").unlink()
    dist.barrier()
    run_training(config, quiet=True, resume=True)
    return result.losses


def work(number: int, port: int, folders: dict[str, Path], chats: Path, output: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    join(number, port)
    for method, way in RUNS:
        run_resumed(run_config(folders["llama"], chats, output, method, way))
    results = {(name, way): trained(folders[setup.kind], setup, way) for name, setup in SETUPS.items() for way in WAYS}
    torch.save(results, output / f"{number}.pt")
    dist.barrier()  # a process that leaves early takes the connections with it that the other still uses
    dist.destroy_process_group()


def join(number: int, port: int) -> None:
    """As torchrun would start this process."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    dist.init_process_group("gloo")


@pytest.fixture(scope="module")
def processes(tiny: Tiny, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left all that the tests look at: they are started once."""
    output = tmp_path_factory.mktemp("processes")
    folders = {setup.kind: tiny(setup.kind) for setup in SETUPS.values()}
    torch.multiprocessing.spawn(work, (free_port(), folders, chats, output), nprocs=PROCESSES)
    return output


@pytest.fixture(scope="module")
def together(processes: Path) -> list[dict[tuple[str, str], dict[str, Any]]]:
    """What each process found, by setup and way."""
    return [torch.load(processes / f"{number}.pt") for number in range(PROCESSES)]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@pytest.fixture(scope="module")
def alone(tiny: Tiny) -> dict[str, dict[str, Any]]:
    return {name: trained(tiny(setup.kind), setup, "ddp") for name, setup in SETUPS.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SETUPS)
def test_two_processes_train_what_one_does(together: Any, alone: Any, name: str, way: str) -> None:
    one = alone[name]
    for two in (results[name, way] for results in together):
        # Sums of another order, in fp32: a few roundings of 6e-8.
        assert two["losses"] == pytest.approx(one["losses"], rel=5e-7)
        assert two["norms"] == pytest.approx(one["norms"], rel=2e-6)
        assert two["target tokens"] == one["target tokens"]
        assert two["held out"] == pytest.approx(one["held out"], rel=5e-7)
        torch.testing.assert_close(two["sequences"], one["sequences"], rtol=2e-6, atol=0)
        assert two["trained"].keys() == one["trained"].keys()
        assert max(gap(two["trained"][key], tensor) for key, tensor in one["trained"].items()) < 5e-7
        assert max(gap(two["moments"][key], tensor) for key, tensor in one["moments"].items()) < 5e-6


@pytest.mark.parametrize("name", SETUPS)
def test_fsdp2_holds_half_of_everything_on_each_process(together: Any, alone: Any, name: str) -> None:
    """Packed NF4 weights included; what has one row, as an offset, is on one process."""
    first, second = (results[name, "fsdp2"] for results in together)
    assert first["bytes"] + second["bytes"] == alone[name]["bytes"]
    assert first["packed bytes"] + second["packed bytes"] == alone[name]["packed bytes"]
    assert (alone[name]["packed bytes"] > 0) == (SETUPS[name].storage == "nf4")
    assert abs(first["bytes"] - second["bytes"]) < 0.01 * alone[name]["bytes"]
    assert all(share == 0.5 for key, share in first["shares"].items() if key.endswith(("codes", "weight", "lora_B")))


def test_ddp_holds_everything_on_each_process(together: Any, alone: Any) -> None:
    assert all(results["qlora", "ddp"]["bytes"] == alone["qlora"]["bytes"] for results in together)


@pytest.mark.parametrize(("method", "way"), RUNS)
def test_a_run_of_two_processes_is_that_of_one(
    processes: Path, tiny: Tiny, chats: Path, tmp_path: Path, method: str, way: str
) -> None:
    """Same losses, the same files of the same contents to rounding, and to the bit when resumed."""
    one = run_training(run_config(tiny("llama"), chats, tmp_path, method, way), quiet=True)
    output = processes / f"{method}-{way}"
    ours, resumed = output / "uninterrupted", output / one.folder.name
    assert losses(output) == pytest.approx(losses(one.output), rel=5e-7)
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in one.folder.iterdir())
    file = next(one.folder.glob("*.safetensors")).name
    expected, found, again = (load_file(folder / file) for folder in (one.folder, ours, resumed))
    assert found.keys() == expected.keys() == again.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in found.items())
    assert max(gap(found[key], tensor) for key, tensor in expected.items()) < 5e-7
    for settings in ("adapter_config.json", "nybble.json", "config.json"):
        if (one.folder / settings).exists():
            assert (ours / settings).read_text() == (one.folder / settings).read_text()


def losses(output: Path) -> list[float]:
    """All in a run's log, training and held-out."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


def gap(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()
