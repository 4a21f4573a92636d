"""Does the step that is timed compute what it should? Gradients beside float64's, then losses and adapters of 20 steps.

python benchmarks/check_step.py --model FOLDER [--methods qlora lora] --output FILE
`benchmarks/make_model.py 8b-2layers FOLDER` writes the model: blocks of the 8B shape, two of them.

The reference is the stock model in float64 over the very weights that the NF4 codes stand for. An arm's error is taken
tensor by tensor, as |gradient - reference| / |reference|; in bf16, fused kernels may err at most twice as much as the
stock modules do. Its difference is taken likewise, to the timed arm in place of the reference: what memory is saved by
may change gradients no more than running the same step again does, whose kernels add in the order that they come in.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import write_result
from stacks import Adapter, Nybble, Row, batches
from torch import Tensor

WAYS = ("keep_matmuls", "keep_on_host", "recompute", "offload")  # to hold activations, beside keeping them

# What differs from the defaults of `nybble train`.
ARMS: dict[str, dict[str, Any]] = {
    "stock modules": {"train.fused": False},
    "fused": {"train.cuda_graph": False},
    "fused, graph": {},
    **{f"fused, graph, {way}": {"memory.activations": way} for way in WAYS},
    "fused, graph, streamed": {"memory.weights": "streamed"},
    "fused, graph, fp8": {"train.precision": "fp8"},
}
STOCK, TIMED = "stock modules", "fused, graph"
GRAPH_RUNS = 3  # two steps are launched, the third is recorded and replayed
RUNS = 200  # of the same step after those, for the spread between identical runs

Tensors = dict[str, Tensor]


def loaded(options: argparse.Namespace, method: str, train: dict[str, Any]) -> tuple[Nybble, Row]:
    row = Row(method, "bf16", options.batch, options.seq_len, "keep")
    train = {"model.compute": "bf16"} | train
    stack = Nybble(options.model, row, Adapter(learning_rate=2e-4), longest=options.seq_len, train=train)
    stack.prepare(row)
    return stack, row


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def make_adapters_count(model: torch.nn.Module) -> None:
    """Give every B random values, large enough that the adapters matter beside the weights."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trained(model).items():
        if name.endswith("lora_B"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def reference_gradients(options: argparse.Namespace, method: str, windows: Tensor) -> Tensors:
    from nybble.models.loss import CausalLMLoss

    stack, _ = loaded(options, method, {})
    make_adapters_count(stack.model)
    widen(stack.model)
    batch = next(batches(windows)).to(stack.loaded.model.device)
    loss = CausalLMLoss(stack.loaded.model.train())(batch.input_ids, batch.labels, batch.position_ids)
    (loss / batch.target_tokens).backward()
    found = {name: parameter.grad for name, parameter in trained(stack.model).items()}
    return {name: gradient.cpu() for name, gradient in found.items() if gradient is not None}


def widen(model: torch.nn.Module) -> None:
    """Hold and compute all in float64 (Transformers takes norms and angles in fp32: 6e-8)."""
    from nybble.quant.linear import DenseLinear, NF4Linear

    for path, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            weight = module.dequantize(torch.float32).double()
            model.set_submodule(path, DenseLinear.from_weight(weight, module.bias, torch.float64))
    model.double()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float64


def gradients(options: argparse.Namespace, method: str, windows: Tensor, train: dict[str, Any]) -> Iterator[Tensors]:
    """Of steps that change nothing, `RUNS` times, as AdamW sees them: with beta1 ~ 0 they are its first moment."""
    still = {"optim.learning_rate": 1e-30, "optim.betas": [1e-30, 0.999], "optim.max_grad_norm": 0}
    stack, row = loaded(options, method, train | still)
    make_adapters_count(stack.model)
    for step, _ in enumerate(stack.steps(row, windows.expand(GRAPH_RUNS + RUNS, -1, -1))):
        if step >= GRAPH_RUNS:
            assert stack.optimizer is not None
            state = stack.optimizer.state
            yield {
                name: state[parameter]["exp_avg"].to("cpu", copy=True)
                for name, parameter in trained(stack.model).items()
            }


def errors(found: Tensors, reference: Tensors) -> dict[str, dict[str, float]]:
    def compared(gradient: Tensor, exact: Tensor) -> dict[str, float]:
        gradient = gradient.double()
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0)
        return {"error": float((gradient - exact).norm() / exact.norm()), "cosine": float(cosine)}

    return {name: compared(found[name], exact) for name, exact in reference.items()}


def joined(tensors: Tensors) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors.values()])


def check_gradients(options: argparse.Namespace, method: str) -> Iterator[dict[str, Any]]:
    """A row an arm: error and cosine of each tensor, and the largest ratio to the stock modules' error.

    difference: of all gradients to the timed arm's, the largest of `RUNS`; in its own row, between identical runs.
    """
    windows = tokens(1, options)
    reference = reference_gradients(options, method, windows)
    free()
    timed = joined(next(gradients(options, method, windows, ARMS[TIMED])))
    stock: dict[str, dict[str, float]] = {}
    for arm, train in ARMS.items():
        free()
        difference, found = 0.0, {}
        try:
            for found in gradients(options, method, windows, train):
                difference = max(difference, float((joined(found) - timed).norm() / timed.norm()))
        except Exception:
            yield {"method": method, "arm": arm, "failed": traceback.format_exc()[-1500:]}
            continue
        compared = errors(found, reference)
        if arm == STOCK:
            stock = compared
        ratios = [tensor["error"] / stock[name]["error"] for name, tensor in compared.items() if stock]
        yield {
            "method": method,
            "arm": arm,
            "worst_error": max(tensor["error"] for tensor in compared.values()),
            "worst_ratio": max(ratios, default=math.nan),
            "cosine": float(torch.nn.functional.cosine_similarity(joined(found), joined(reference), dim=0)),
            "worst_cosine": min(tensor["cosine"] for tensor in compared.values()),
            "difference": difference,
            "tensors": compared,
        }


def check_steps(options: argparse.Namespace, method: str) -> Iterator[dict[str, Any]]:
    """How far arms are after some steps from the stock modules in fp32, and from those in bf16.

    Stock modules with the sequences of each batch in reverse show what a sum in another order does.
    """
    windows = tokens(options.steps, options)
    arms = [
        (f"{STOCK}, fp32", {"model.compute": "fp32"} | ARMS[STOCK], windows),
        (STOCK, ARMS[STOCK], windows),
        (f"{STOCK}, sequences in reverse", ARMS[STOCK], windows.flip(1)),
        (TIMED, ARMS[TIMED], windows),
        ("fused, graph, fp8", ARMS["fused, graph, fp8"], windows),
    ]
    yardsticks: dict[str, Run] = {}
    for arm, train, data in arms:
        free()
        try:
            run = Run.of(options, method, train, data)
        except Exception:
            yield {"method": method, "arm": arm, "failed": traceback.format_exc()[-1500:]}
            continue
        if len(yardsticks) < 2:
            yardsticks[arm] = run
        distances = {f"to {name}": run.distance(other) for name, other in yardsticks.items()}
        yield {"method": method, "arm": arm, "loss": run.losses, **distances}


@dataclass(frozen=True)
class Run:
    losses: list[float]
    start: Tensor  # all adapters, one after another
    end: Tensor

    @classmethod
    def of(cls, options: argparse.Namespace, method: str, train: dict[str, Any], windows: Tensor) -> Run:
        stack, row = loaded(options, method, train)
        start = joined({name: parameter.detach().cpu() for name, parameter in trained(stack.model).items()})
        losses = [record.loss for record in stack.steps(row, windows)]
        end = joined({name: parameter.detach().cpu() for name, parameter in trained(stack.model).items()})
        return cls(losses, start, end)

    def distance(self, other: Run) -> dict[str, float]:
        """Mean absolute difference of the losses; of the adapters, as a share of the way that `other` went."""
        loss = statistics.mean(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))
        return {"loss": loss, "adapter": float((self.end - other.end).norm() / (other.end - other.start).norm())}


def tokens(steps: int, options: argparse.Namespace) -> Tensor:
    shape = (steps, options.batch, options.seq_len)
    return torch.randint(10, 250, shape, generator=torch.Generator().manual_seed(0))


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--methods", nargs="+", default=["qlora"], choices=["qlora", "lora"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/check_step.json"))
    options = parser.parse_args()
    of_gradients: list[dict[str, Any]] = []
    of_steps: list[dict[str, Any]] = []
    for method in options.methods:
        for check, rows, show in (
            (check_gradients, of_gradients, shown_gradients),
            (check_steps, of_steps, shown_steps),
        ):
            for row in check(options, method):
                rows.append(row)
                print(f"{method:6}{row['arm']:40}", row.get("failed") or show(row), flush=True)
                write_result(options.output, of_gradients, steps=of_steps)


def shown_gradients(row: dict[str, Any]) -> str:
    bound = "" if row["worst_ratio"] <= 2 or "fp8" in row["arm"] else "  NOT WITHIN 2"
    figures = "error {worst_error:.4f}  of stock's {worst_ratio:.2f}  cosine {cosine:.6f} (worst {worst_cosine:.6f})"
    figures += "  difference {difference:.1e}"
    return figures.format(**row) + bound


def shown_steps(row: dict[str, Any]) -> str:
    distances = [
        f"{name}: loss {found['loss']:.5f}, adapter {found['adapter']:.4f}"
        for name, found in row.items()
        if name.startswith("to ")
    ]
    return "; ".join([f"loss {row['loss'][0]:.4f} -> {row['loss'][-1]:.4f}", *distances])


if __name__ == "__main__":
    main()
