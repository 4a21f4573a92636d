"""What better NF4 codes are worth: error of the weights, held-out loss and time of each rounding, on a real model.

    PYTHONPATH=src python3 benchmarks/rounding.py --model SmolLM2-135M-Instruct --calibration train.txt \
        --held-out python=valid.txt --held-out hamlet=hamlet.txt --output benchmarks/results/study/rounding.json

Calibration and held-out texts must not overlap. `closed` is the share of plain rounding's loss above the 16-bit model
that is gone. With rank r, the low-rank corrections of the calibration pass are added to the weights: what an adapter
that begins there computes before training.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from results import write_result
from torch import Tensor, nn
from transformers import PreTrainedModel

from nybble.adapters.provenance import Rounding
from nybble.calibrate.run import TOKENS, WINDOW, Calibration
from nybble.calibrate.text import read_calibration_text
from nybble.export.quantized import QuantizeReport, quantize_checkpoint
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.dtypes import resolve_device
from nybble.models.load import load_model, load_tokenizer
from nybble.models.loss import CausalLMLoss
from nybble.quant.correction import Correction, read_corrections
from nybble.quant.format import NF4Spec
from nybble.quant.linear import NF4Linear

ROUNDINGS: tuple[Rounding, ...] = ("nearest", "search", "weighted", "compensated")
RANKS = (16, 64)

Texts = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="16-bit checkpoint folder")
    parser.add_argument("--calibration", required=True, help="text file or data")
    parser.add_argument("--held-out", required=True, action="append", help="NAME=FILE; repeatable")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the calibration, and of each held-out text")
    parser.add_argument("--length", type=int, default=512, help="tokens a held-out window")
    parser.add_argument("--rounding", action="append", choices=ROUNDINGS[1:], help="beside nearest; all if left out")
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    options = parser.parse_args()
    checkpoint = Checkpoint.open(options.model)
    tokenizer = load_tokenizer(checkpoint)
    named = dict(text.split("=", 1) for text in options.held_out)
    texts = {
        name: read_calibration_text(file, tokenizer, tokens=options.tokens, length=options.length).windows
        for name, file in named.items()
    }
    rows = [{"rounding": "none", "rank": 0, "loss": losses(load(options.model, "auto"), texts)}]
    calibration = Calibration.read(options.calibration, checkpoint, tokens=options.tokens)
    for rounding in ("nearest", *(options.rounding or ROUNDINGS[1:])):
        for row in measure(checkpoint, rounding, calibration, texts):
            rows.append(row)
            print(row, flush=True)
    for row in rows[1:]:
        row["closed"] = closed(row["loss"], rows[1]["loss"], rows[0]["loss"])
    for row in rows:
        print(row)
    if options.output:
        of_text = {"source": Path(options.calibration).name, "tokens": calibration.text.tokens, "window": WINDOW}
        write_result(options.output, rows, model=Path(options.model).name, calibration=of_text)


def measure(
    checkpoint: Checkpoint, rounding: Rounding, calibration: Calibration, texts: Texts
) -> Iterator[dict[str, Any]]:
    """A row for the folder as it is, and one for each rank of its corrections."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / rounding
        report = quantize_checkpoint(
            checkpoint, folder, NF4Spec(), device=resolve_device(), rounding=rounding, calibration=calibration
        )
        model = load(str(folder), "auto")
        error, about = weight_error(model, load(checkpoint.name, "auto")), figures(report)
        yield {"rounding": rounding, "rank": 0, "weight_error": error, **about, "loss": losses(model, texts)}
        corrections = read_corrections(folder, [path for path, _ in nf4_linears(model)])
        most = max(correction.U.shape[1] for correction in corrections.values())
        for rank in (rank for rank in RANKS if rank <= most):
            corrected = load(str(folder), "auto")
            add_corrections(corrected, corrections, rank)
            yield {"rounding": rounding, "rank": rank, "loss": losses(corrected, texts)}


def figures(report: QuantizeReport) -> dict[str, Any]:
    return {"seconds": report.seconds, "bits_per_weight": report.bits_per_weight}


def load(folder: str, storage: str) -> PreTrainedModel:
    return load_model(ModelConfig(name=folder), device=resolve_device(), storage=storage).model


@torch.no_grad()
def losses(model: PreTrainedModel, texts: Texts) -> dict[str, float]:
    """Mean loss in nats a token, by text."""
    device, loss = resolve_device(), CausalLMLoss(model)
    found = {}
    for name, windows in texts.items():
        total = 0.0
        for batch in windows.to(device).split(4):
            labels, positions = batch.clone(), torch.arange(batch.shape[1], device=device).expand(batch.shape)
            labels[:, 0] = -100
            total += float(loss(batch, labels, positions))
        found[name] = total / (windows.shape[0] * (windows.shape[1] - 1))
    return found


@torch.no_grad()
def weight_error(model: PreTrainedModel, original: PreTrainedModel) -> float:
    """Root of the squared error over the squared weights, all quantized linears together."""
    change = whole = 0.0
    for path, module in nf4_linears(model):
        weight = original.get_submodule(path).dequantize(torch.float32)
        change += float((module.dequantize(torch.float32) - weight).square().sum())
        whole += float(weight.square().sum())
    return float((change / whole) ** 0.5)


@torch.no_grad()
def add_corrections(model: PreTrainedModel, corrections: Mapping[str, Correction], rank: int) -> None:
    """Have the model compute with weight + U V of this rank."""
    linears = dict(nf4_linears(model))
    for path, correction in corrections.items():
        held, best = linears[path], correction.rank(rank)
        weight = held.dequantize(torch.float32)
        dense = nn.Linear(held.in_features, held.out_features, held.bias is not None, device="meta")
        dense.weight = nn.Parameter((weight + (best.U @ best.V).to(weight.device)).to(held.compute_dtype))
        dense.bias = held.bias
        model.set_submodule(path, dense)


def nf4_linears(model: PreTrainedModel) -> Iterator[tuple[str, NF4Linear]]:
    return ((path, module) for path, module in list(model.named_modules()) if isinstance(module, NF4Linear))


def closed(loss: dict[str, float], plain: dict[str, float], whole: dict[str, float]) -> dict[str, float]:
    """The share of plain rounding's loss above the 16-bit model that is gone, by text."""
    return {name: (plain[name] - loss[name]) / (plain[name] - whole[name]) for name in loss}


if __name__ == "__main__":
    main()
