"""QLoRA in a plain PyTorch loop: the Python API without the `nybble train` command around it.

python examples/make_docstring_pairs.py data/docstrings
python examples/plain_loop.py MODEL data/docstrings runs/plain
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import nybble


def main(model_name: str, data: str, output: Path, steps: int = 20) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = nybble.load_model(nybble.ModelConfig(name=model_name), device=device, storage="nf4")
    report = nybble.inject(loaded.model, nybble.LoraConfig(r=16, lora_alpha=32))
    print(*report.lines(), sep="\n")

    prepared = nybble.prepare_data(
        nybble.DataConfig(path=data, max_length=128), loaded.tokenizer, model_max_length=None
    )
    loss_module = nybble.CausalLMLoss(loaded.model)
    optimizer = torch.optim.AdamW(nybble.adapter_parameters(loaded.model).values(), lr=1e-3)

    loss_module.train()
    for step, batch in zip(range(steps), nybble.batches(prepared.train, batch_size=4), strict=False):
        batch = batch.to(device)
        loss_sum = loss_module(batch.input_ids, batch.labels, batch.position_ids)
        loss = loss_sum / batch.target_tokens  # the module sums, so that batches can be accumulated exactly
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")

    nybble.save_adapter(loaded.model, output, provenance=loaded.provenance, tokenizer=loaded.tokenizer)
    print(f"saved to {output}: PEFT loads it, and so does `nybble chat --model {model_name} --adapter {output}`")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
