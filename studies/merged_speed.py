"""What a token costs of a model, of the same with an adapter beside its weights, and with the adapter merged.

    PYTHONPATH=src:benchmarks python3 studies/merged_speed.py --adapter runs/mine \
        --output benchmarks/results/study/merged_speed.json

The three take turns, each with an answer of some tokens; what counts is the median of all.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from results import write_result
from transformers import PreTrainedModel

from nybble.adapters.saved import read_adapter
from nybble.export.merged import merge_checkpoint
from nybble.inference import load_for_inference
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.dtypes import resolve_device
from nybble.models.generate_batch import generate_batch

PROMPT, TOKENS, ROUNDS = 64, 16, 9
VOCABULARY = 1000  # first tokens, of which the prompt is


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    adapter = read_adapter(options.adapter)
    base = ModelConfig(name=adapter.base_model_name, revision=adapter.revision)
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "merged"
        checkpoint = Checkpoint.open(base.name, base.revision)
        merge_checkpoint(checkpoint, adapter, merged, base="original", device=resolve_device())
        models = {
            "base": load_for_inference(base).model,
            "with the adapter beside it": load_for_inference(base, options.adapter).model,
            "with the adapter merged": load_for_inference(ModelConfig(name=str(merged))).model,
        }
    prompt = torch.randint(VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    found: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        seconds_a_token(model, prompt)  # kernels are made and caches filled
    for _ in range(ROUNDS):
        for name, model in models.items():
            found[name] += seconds_a_token(model, prompt)
    seconds = {name: statistics.median(times) for name, times in found.items()}
    inputs = torch.tensor([prompt], device=resolve_device())
    _, beside, merged_logits = (model(inputs).logits.float() for model in models.values())
    rows = [{"model": name, "seconds": s, "ratio": s / seconds["base"]} for name, s in seconds.items()]
    gap = float((beside - merged_logits).abs().max())
    write_result(options.output, rows, name=Path(base.name).name, largest_logit_gap=gap)
    print(*rows, f"largest difference of a logit, beside and merged: {gap:.3g}", sep="\n")


def seconds_a_token(model: PreTrainedModel, prompt: list[int]) -> list[float]:
    """Between each token of an answer and the next."""
    told: list[float] = []
    generate_batch(
        model, [prompt], max_new_tokens=TOKENS, stops=frozenset(), ended=lambda _: told.append(time.perf_counter())
    )
    return [after - before for before, after in itertools.pairwise(told)]


if __name__ == "__main__":
    main()
