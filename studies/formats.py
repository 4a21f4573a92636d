"""Error of NF4, FP4 and INT4, with and without double quantization, on normal weights and on those of models.

    PYTHONPATH=src:benchmarks python3 studies/formats.py --output benchmarks/results/study/formats.json

Without --model the demo's model is measured, whose weights lie on Q4_1's grid of 16 values a block of 32. --model
LABEL=FOLDER measures others, such as one moved off that grid by full fine-tuning. A label that is in the output
already is measured anew, the others are kept. Errors are relative: norm of the difference over norm of the weights,
over all linears that NF4 may hold. --rows gives the held-out loss of each on so many pieces of Python's library.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from results import origin, write_result
from torch import Tensor

from nybble.data.config import DataConfig
from nybble.data.example import Example
from nybble.data.prepare import prepare_data
from nybble.demo.library_text import library_text
from nybble.demo.model import demo_model
from nybble.evaluation.held_out import row_losses
from nybble.files import cache_folder
from nybble.inference import load_for_inference
from nybble.models.config import ModelConfig
from nybble.models.dtypes import resolve_device
from nybble.models.load import LoadedModel
from nybble.models.skeleton import build_skeleton
from nybble.quant.format import NF4Spec
from nybble.quant.four_bit import FORMATS, FP4, INT4, NF4, FourBitWeight
from nybble.quant.rounding import quantize_searched
from nybble.quant.weight import NF4Weight

EMBEDDED = "SmolLM2-135M, as embedded (on Q4_1's grid)"
NORMAL = "normal"

Row = dict[str, Any]
Quantized = FourBitWeight | NF4Weight


@dataclass(frozen=True)
class Case:
    """One way to hold a weight in four bits."""

    format: str
    rounding: str
    block_size: int
    double_quant: bool

    def quantize(self, weight: Tensor) -> Quantized:
        spec = NF4Spec.of(self.block_size, double_quant=self.double_quant)
        if self.rounding == "search":
            return quantize_searched(weight, spec)
        return FourBitWeight.quantize(weight, spec, FORMATS[self.format])

    def row(self, label: str) -> Row:
        return {"weights": label, **vars(self)}


CASES = (
    *(Case(f.name, "nearest", 64, double) for f, double in product((NF4, FP4, INT4), (False, True))),
    Case("nf4", "nearest", 32, False),
    Case("int4", "nearest", 32, False),
)
SEARCHED = tuple(Case("nf4", "search", 64, double) for double in (False, True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON of all rows, those of other labels kept")
    parser.add_argument("--model", action="append", default=[], metavar="LABEL=FOLDER", help="repeatable")
    parser.add_argument("--rows", type=int, default=0, help="pieces of text for the loss; 0: errors of weights alone")
    parser.add_argument("--normal-size", type=int, default=4096, help="rows and columns of the normal weights")
    parser.add_argument("--every", type=int, default=1, help="without --rows: measure one linear in so many")
    parser.add_argument("--search", action="store_true", help="NF4 with its scales searched, too: slow without a GPU")
    options = parser.parse_args()
    cases = CASES + SEARCHED if options.search else CASES
    given = dict(text.split("=", 1) for text in options.model) or {EMBEDDED: None}
    measured = [] if options.model else measure_normal(cases, options.normal_size)
    for label, folder in given.items():
        measured += measure_model(label, Path(folder) if folder else demo_model(cache_folder()), options, cases)
    if options.output:
        labels = {row["weights"] for row in measured}
        rows = [row for row in kept_rows(options.output) if row["weights"] not in labels] + measured
        write_result(options.output, rows)


def kept_rows(file: Path) -> list[Row]:
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    return rows


def measure_normal(cases: Sequence[Case], size: int) -> list[Row]:
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(resolve_device())
    return [show(case.row(NORMAL) | errors_of([(weight, case.quantize(weight))])) for case in cases]


def measure_model(label: str, folder: Path, options: argparse.Namespace, cases: Sequence[Case]) -> list[Row]:
    loaded = load_for_inference(ModelConfig(name=str(folder), storage="fp32"))
    examples = held_out(loaded, options.rows) if options.rows else []
    weights = linear_weights(loaded)[:: 1 if examples else options.every]
    originals = [weight.cpu().clone() for weight in weights]
    as_it_is = mean_loss(loaded, examples)
    rows = []
    for case in cases:
        restore(weights, originals)
        figures = errors_of(replaced(weights, case.quantize))
        rows.append(show(case.row(label) | figures | losses(mean_loss(loaded, examples), as_it_is)))
    return rows


def linear_weights(loaded: LoadedModel) -> list[Tensor]:
    """Of the linears that NF4 may hold, in fp32."""
    paths = sorted(build_skeleton(loaded.checkpoint).quantizable)
    weights = [loaded.model.get_submodule(path).weight for path in paths]
    return [weight.data for weight in weights if isinstance(weight, Tensor)]


def replaced(weights: Iterable[Tensor], quantize: Callable[[Tensor], Quantized]) -> Iterator[tuple[Tensor, Quantized]]:
    """Each weight with what it is quantized to, put in its place afterwards."""
    for weight in weights:
        quantized = quantize(weight)
        yield weight, quantized
        weight.copy_(quantized.dequantize(torch.float32))


def restore(weights: Iterable[Tensor], originals: Iterable[Tensor]) -> None:
    for weight, original in zip(weights, originals, strict=True):
        weight.copy_(original)


def errors_of(pairs: Iterable[tuple[Tensor, Quantized]]) -> Row:
    """Relative error and bits a weight over all weights."""
    difference = total = 0.0
    num_bytes = numel = linears = 0
    for weight, quantized in pairs:
        difference += (quantized.dequantize(torch.float32) - weight).double().square().sum().item()
        total += weight.double().square().sum().item()
        num_bytes, numel, linears = num_bytes + quantized.nbytes, numel + weight.numel(), linears + 1
    error = (difference / total) ** 0.5
    return {"linears": linears, "bits_per_weight": 8 * num_bytes / numel, "relative_error": error}


def held_out(loaded: LoadedModel, num_rows: int) -> list[Example]:
    with tempfile.TemporaryDirectory() as folder:
        library_text().write(Path(folder))
        data = DataConfig(path=f"{folder}/test.jsonl", max_length=512, max_rows=num_rows, cache=False)
        return list(prepare_data(data, loaded.tokenizer, model_max_length=512).train)


def mean_loss(loaded: LoadedModel, examples: list[Example]) -> float | None:
    if not examples:
        return None
    return sum(row_losses(loaded, examples)) / sum(example.target_tokens for example in examples)


def losses(loss: float | None, as_it_is: float | None) -> Row:
    """Held-out loss, and by how much it is above that of the weights as they are."""
    if loss is None or as_it_is is None:
        return {}
    return {"loss": loss, "loss_16_bit": as_it_is, "loss_above": loss - as_it_is}


def show(row: Row) -> Row:
    double = "double" if row["double_quant"] else "fp32"
    case = f"{row['format']:<5}{row['rounding']:<8}{row['block_size']:>4} {double:<7}"
    above = f"  {row['loss_above']:+.4f} nats" if "loss_above" in row else ""
    print(
        f"{case}{row['bits_per_weight']:>7.3f} bits  {row['relative_error']:.5f}{above}  {row['weights']}", flush=True
    )
    return row


if __name__ == "__main__":
    print(origin()["device"])
    with torch.no_grad():
        main()
