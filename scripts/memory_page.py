"""Write the tables of docs/memory.md by the planner: which models fit which cards, how, and how fast.

python scripts/memory_page.py
A table stands between `<!-- fits NAME -->` and `<!-- /fits NAME -->`; a test checks that the page is up to date.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "memory.md"
sys.path.insert(0, str(ROOT / "benchmarks"))

from shapes import SHAPES  # noqa: E402  # benchmarks is no package

from nybble.config import RunConfig  # noqa: E402
from nybble.planner.cards import GIB, DeviceSpec, card  # noqa: E402
from nybble.planner.solve import Solution  # noqa: E402
from nybble.planner.words import in_brief, significant  # noqa: E402
from nybble.train.plan import Rows, plan_run  # noqa: E402

# GB as it is sold, and a card of that size.
CARDS = {8: "rtx 4060", 12: "rtx 4070", 16: "rtx 4080", 24: "rtx 4090", 48: "l40s", 80: "h100"}
MODELS = {
    "1b": "Llama-3.2-1B",
    "3b": "Llama-3.2-3B",
    "qwen3-4b": "Qwen3-4B",
    "8b": "Llama-3.1-8B",
    "13b": "Llama-2-13B",
    "70b": "Llama-3.1-70B",
}
HOST_BYTES = 64 * GIB
BATCH, SEQ_LEN = 2, 2048


@cache
def solution(model: str, device: DeviceSpec, method: str) -> Solution:
    given = {"model.name": model, "data.path": "-", "output": "-", "method": method, "train.batch_size": BATCH}
    config = {**SHAPES[model], "dtype": "bfloat16"}
    found = plan_run(RunConfig.read(None, given), config, device.with_host(HOST_BYTES), rows=Rows(SEQ_LEN)).solution
    assert found is not None
    return found


def speeds(method: str) -> list[str]:
    """Tokens a second, models down and cards across."""
    names = [f"{gb} GB, {card(name).name}" for gb, name in CARDS.items()]
    lines = [f"| {METHODS[method]} | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for model, title in MODELS.items():
        found = [solution(model, card(name), method) for name in CARDS.values()]
        lines.append(f"| {title} | {' | '.join(map(_speed, found))} |")
    return lines


def ways(gb: int) -> list[str]:
    """What is held how on one card, by QLoRA and by LoRA."""
    device = card(CARDS[gb])
    lines = ["| model | method | needs | tokens/s | layers and the rest |", "|---|---|---:|---:|---|"]
    for model, title in MODELS.items():
        for method, name in METHODS.items():
            found = solution(model, device, method)
            lines.append(f"| {title} | {name} | {' | '.join(_way(found))} |")
    return lines


METHODS = {"qlora": "QLoRA", "lora": "LoRA"}


def _speed(found: Solution) -> str:
    return significant(found.prediction.tokens_per_second) if found.fits else "-"


def _way(found: Solution) -> tuple[str, str, str]:
    needs = f"{found.prediction.peak_bytes / GIB:.1f} GiB"
    return needs, _speed(found), in_brief(found.plan) if found.fits else "does not fit"


def tables() -> dict[str, list[str]]:
    return {method: speeds(method) for method in METHODS} | {f"{gb}": ways(gb) for gb in CARDS}


def updated(text: str) -> str:
    """`text` with all its tables as the planner has them now."""
    for name, lines in tables().items():
        table = "\n".join(lines)
        pattern = rf"(<!-- fits {name} -->\n).*?(<!-- /fits {name} -->)"
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
