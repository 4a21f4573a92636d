"""NF4 layers under FSDP2, on two processes without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear

WORLD = 2


def make_model() -> nn.Sequential:
    """Frozen layers of both kinds around a trainable one; widths that fill blocks, cross rows, and are odd."""
    torch.manual_seed(0)
    frozen = [
        NF4Linear.from_linear(nn.Linear(64, 40).requires_grad_(False), NF4Spec(64, 4), torch.float32),
        NF4Linear.from_linear(nn.Linear(40, 33).requires_grad_(False), NF4Spec(32, 0), torch.float32),
        NF4Linear.from_linear(nn.Linear(33, 24).requires_grad_(False), NF4Spec(64, 8), torch.float32),
        DenseLinear.from_linear(nn.Linear(24, 24).bfloat16().requires_grad_(False), torch.float32),
    ]
    return nn.Sequential(frozen[0], nn.Tanh(), nn.Linear(40, 40), frozen[1], nn.Tanh(), frozen[2], frozen[3])


def outcome(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    output = model(x)
    output.square().sum().backward()
    return {"output": output.detach(), "x": x.grad}


def worker(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    compare_with_one_process(rank)
    dist.barrier()  # a process that leaves early takes the connections with it that the other still uses
    dist.destroy_process_group()


def compare_with_one_process(rank: int) -> None:
    x = torch.randn(WORLD, 4, 64, generator=torch.Generator().manual_seed(1))
    alone, sharded = make_model(), make_model()
    held = {name: parameter.nbytes for name, parameter in sharded.named_parameters()}
    for layer in sharded:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(sharded)
    for name, parameter in sharded.named_parameters():
        rows = parameter.shape[0]
        mine = min(-(-rows // WORLD), rows - rank * -(-rows // WORLD))
        assert parameter.to_local().nbytes == held[name] // rows * mine, name
        assert parameter.dtype == torch.uint8 or not name.endswith(("codes", "absmax", "offset"))

    expected = [outcome(alone, part) for part in x]
    found = outcome(sharded, x[rank])
    assert torch.equal(found["output"], expected[rank]["output"])
    assert torch.equal(found["x"], expected[rank]["x"])
    # FSDP2 averages gradients over ranks; `alone` has summed those of both parts.
    gradient = sharded[2].weight.grad.full_tensor()
    torch.testing.assert_close(gradient, alone[2].weight.grad / WORLD, rtol=1e-5, atol=1e-6)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(tmp_path,), nprocs=WORLD)
