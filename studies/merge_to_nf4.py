"""What is lost where an adapter is merged and the result held in NF4 again, by base and by rounding.

    PYTHONPATH=src:benchmarks python3 studies/merge_to_nf4.py --adapter runs/mine --data train-and-test-folder \
        --output benchmarks/results/study/merge.json

--data: rows as for training; codes are calibrated by its training rows, losses are those of its test rows (test.jsonl).
`above` is the loss above that of the 16-bit merge into the weights that the adapter was trained on, `share` what that
is of plain re-quantization's: NF4 by rounding to nearest of what NF4 made of the weights before, with B A added.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import write_result

from nybble.adapters.provenance import Rounding
from nybble.adapters.saved import SavedAdapter, read_adapter
from nybble.calibrate.run import TOKENS, Calibration
from nybble.compare.merge_check import measure_merge
from nybble.data.config import DataConfig
from nybble.export.merge_plan import Base
from nybble.export.merged import Measure, merge_checkpoint
from nybble.export.requantized import merge_to_nf4
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.dtypes import resolve_device
from nybble.quant.format import NF4Spec

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """rounding: of the merged weights; None leaves them in 16 bits."""

    base: Base
    rounding: Rounding | None


SIXTEEN_BIT, PLAIN = Case("dequantized", None), Case("dequantized", "nearest")
CASES = (
    SIXTEEN_BIT,
    Case("original", None),
    PLAIN,
    Case("original", "nearest"),
    Case("original", "search"),
    Case("original", "compensated"),
    Case("dequantized", "compensated"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, required=True, help="trained on NF4 as bitsandbytes rounds it")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--rows", type=int, help="of the test rows, at most")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the calibration")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    adapter = read_adapter(options.adapter)
    model = ModelConfig(name=adapter.base_model_name, revision=adapter.revision)
    checkpoint = Checkpoint.open(model.name, model.revision)
    text = Calibration.read(str(options.data / "train.jsonl"), checkpoint, tokens=options.tokens)
    data = DataConfig(path=str(options.data / "test.jsonl"), max_length=512, max_rows=options.rows, cache=False)
    measure = measure_merge(model, adapter.folder, data)
    rows: list[Row] = [{"base": "as it was trained", "rounding": None, "loss": measure.reference.loss}]
    for row in merges(checkpoint, adapter, text, measure):
        rows.append(row)
        print(row, flush=True)
    add_shares(rows)
    of_text = {"tokens": text.text.tokens, "rows": "training rows"}
    write_result(options.output, rows, model=Path(model.name).name, calibration=of_text)
    print(*rows, sep="\n")


def merges(checkpoint: Checkpoint, adapter: SavedAdapter, text: Calibration, measure: Measure) -> Iterator[Row]:
    """Each case with its loss and the seconds that it took, measuring included."""
    for case in CASES:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            loss = loss_of(case, checkpoint, adapter, text, measure, Path(scratch) / "merged")
        yield {**vars(case), "loss": loss, "seconds": time.perf_counter() - began}


def loss_of(
    case: Case, checkpoint: Checkpoint, adapter: SavedAdapter, text: Calibration, measure: Measure, folder: Path
) -> float:
    device = resolve_device()
    if case.rounding is None:
        merged = merge_checkpoint(checkpoint, adapter, folder, base=case.base, device=device, measure=measure)
        return merged.measured[case.base].merged_loss
    calibration = text if case.rounding == "compensated" else None
    report = merge_to_nf4(
        checkpoint,
        adapter,
        folder,
        NF4Spec(),
        base=case.base,
        rounding=case.rounding,
        calibration=calibration,
        device=device,
        measure=measure,
    )
    assert report.loss is not None
    return report.loss


def add_shares(rows: list[Row]) -> None:
    """Beside each loss of a merge how far it is above the 16-bit one, and what that is of plain re-quantization's."""
    by_case = {(row["base"], row["rounding"]): row for row in rows}
    whole, plain = (by_case[case.base, case.rounding]["loss"] for case in (SIXTEEN_BIT, PLAIN))
    for row in rows[1:]:
        row["above"] = row["loss"] - whole
        row["share"] = row["above"] / (plain - whole)


if __name__ == "__main__":
    main()
