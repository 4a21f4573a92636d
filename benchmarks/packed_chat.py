"""Speed on packed chats of mixed lengths: tokens a second without padding, beside rows of one sample each.

python benchmarks/packed_chat.py --model FOLDER [--row "qlora bf16 4 2048 keep"] --output FILE
The chats are questions about Python's library and the answers in its docstrings, one to twelve turns each.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from results import write_result
from stacks import Adapter, Nybble, Row, batches

from nybble.demo.docstrings import DocPair, collect_pairs

WARM_UP = 5
MOST_TURNS = 12
# For models without a template of their own, such as those that make_model.py writes.
TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + '\n' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)


def write_chats(file: Path, pairs: Sequence[DocPair]) -> None:
    """Each pair of question and answer once, in their order, as chats of a random number of turns."""
    chance, lines = random.Random(0), []
    while pairs:
        turns = chance.randint(1, MOST_TURNS)
        chat, pairs = pairs[:turns], pairs[turns:]
        messages = [message for pair in chat for message in pair.row()["messages"]]
        lines.append(json.dumps({"messages": messages}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def packed_data(stack: Nybble, row: Row, folder: Path) -> Any:
    from nybble.data.config import DataConfig
    from nybble.data.prepare import prepare_data

    write_chats(folder / "chats.jsonl", collect_pairs())
    template = None
    if stack.loaded.tokenizer.chat_template is None:
        template = folder / "template.jinja"
        template.write_text(TEMPLATE)
    config = DataConfig(
        path=str(folder / "chats.jsonl"),
        chat_template=str(template) if template else None,
        max_length=row.seq_len,
        packing=True,
        cache=False,
    )
    return prepare_data(config, stack.loaded.tokenizer, model_max_length=stack.loaded.checkpoint.max_positions)


def measure(stack: Nybble, row: Row, steps: int) -> Iterator[dict[str, Any]]:
    from nybble.train.course import Course, training_batches
    from nybble.train.fuse import rows_of

    with tempfile.TemporaryDirectory() as folder:
        data = packed_data(stack, row, Path(folder))
    lengths = [length for example in data.train for length in example.lengths]
    filled = sum(lengths) / (len(data.train) * row.seq_len)
    config = stack.config(row).train.model_copy(update={"batch_size": row.batch, "max_steps": WARM_UP + steps})
    course = Course.plan(len(data.train), config)
    packed, most = training_batches(data.train, config, course), rows_of(data).samples
    about = {"samples": len(lengths), "median_length": statistics.median(lengths), "longest": max(lengths)}
    shape = (WARM_UP + steps, row.batch, row.seq_len)
    windows = torch.randint(10, 250, shape, generator=torch.Generator().manual_seed(0))
    yield timed(stack, row, batches(windows), steps, 1) | {"data": "one sample a row", "filled": 1.0}
    yield timed(stack, row, packed, steps, most) | {
        "data": "packed chats",
        "filled": filled,
        "most_a_row": most,
        **about,
    }


def timed(stack: Nybble, row: Row, micro_batches: Any, steps: int, samples_a_row: int) -> dict[str, Any]:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    stack.prepare(row)
    total = WARM_UP + steps
    records = list(stack.steps_over(row, micro_batches, total=total, samples_a_row=samples_a_row))
    seconds = [record.seconds for record in records[WARM_UP:]]
    return {
        "row": str(row),
        "tokens_per_second": round(row.tokens / statistics.median(seconds)),
        "step_seconds": [round(s, 4) for s in seconds],
        "loss": [round(record.loss, 4) for record in records],
        "grad_norm": [round(record.grad_norm, 4) for record in records],
        "notes": stack.notes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--row", type=Row.parse, default="qlora bf16 4 2048 keep")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/packed_chat.json"))
    options = parser.parse_args()
    stack = Nybble(options.model, options.row, Adapter(), longest=options.row.seq_len)
    stack.prepare(options.row)
    rows = []
    for figures in measure(stack, options.row, options.steps):
        real = figures["tokens_per_second"] * figures["filled"]
        rows.append(figures | {"real_tokens_per_second": round(real)})
        share = f" ({real / rows[0]['real_tokens_per_second'] - 1:+.1%})" if len(rows) > 1 else ""
        print(f"{figures['data']:20}{real:>9,.0f} tokens/s, rows filled {figures['filled']:.1%}{share}", flush=True)
        print("   ", "; ".join(figures["notes"]), flush=True)
        write_result(options.output, rows)


if __name__ == "__main__":
    main()
