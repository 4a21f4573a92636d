"""The demonstration, from nothing to a merged model: fetch, make data, train two ways, compare, merge, ask."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from nybble.adapters.config import LoraConfig
from nybble.adapters.saved import read_adapter
from nybble.compare.config import Arm, CompareConfig
from nybble.compare.merge_check import describe_merge, measure_merge
from nybble.compare.result import Comparison
from nybble.compare.run import compare_arms
from nybble.compare.table import comparison_table
from nybble.config import RunConfig, TrainConfig
from nybble.data.config import DataConfig
from nybble.demo.docstrings import write_pairs
from nybble.demo.model import demo_model
from nybble.export.merged import MergeReport, merge_checkpoint
from nybble.inference import load_for_inference
from nybble.memory.config import MemoryConfig
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.dtypes import resolve_device
from nybble.models.generate import stream_chat
from nybble.optim.config import OptimConfig

ARMS = ("base", "lora", "qlora")
STEPS = 40
LEAST_GAIN = 0.8  # nats by which the held-out loss must fall in each arm
VALIDATION_PAIRS = 80
SAMPLES = 3  # of the held-out questions, which every arm answers in the report
QUESTION = "What does Python's inspect.getsource do?"  # of a module that is held out

WHY_QLORA_IS_BEHIND = (
    "QLoRA starts {gap:.2f} nats behind because this model was 4-bit once already (GGUF's Q4_1), on a grid of its own."
)


@dataclass(frozen=True)
class DemoResult:
    """answers: what was said before and after. seconds: by phase."""

    model: str
    comparison: Comparison
    merged: MergeReport
    answers: dict[str, str]
    seconds: dict[str, float]

    @property
    def learned(self) -> bool:
        """Whether the held-out loss fell as far as it must in every arm that was trained."""
        return all((arm.gain or 0.0) >= LEAST_GAIN for arm in self.comparison.arms if arm.method != "base")


def run_demo(
    output: Path, cache: Path, *, model: str | None = None, steps: int = STEPS, console: Console
) -> DemoResult:
    """Do it all below `output`, which is the demo's own: finished arms are kept, what changed is made anew.

    `cache` gets the converted model; `model` names another checkpoint to use in its place.
    """
    phases = Phases(console)
    with phases.begin("Model"):
        name = model or str(demo_model(cache, say=console.print))
        console.print(name, highlight=False)
    with phases.begin("Data"):
        pairs = write_pairs(output / "data", VALIDATION_PAIRS)
        console.print(
            f"{len(pairs.train)} questions and answers from Python's docstrings; {len(pairs.validation)} held"
        )
        console.print(f"out, of modules that are never trained on. For example: [cyan]{pairs.train[0].question}[/cyan]")
    config = demo_config(name, output, steps)
    with phases.begin("LoRA and QLoRA"):
        arms = CompareConfig(arms=tuple(map(Arm.built_in, ARMS)), samples=SAMPLES)
        comparison = compare_arms(config, arms, replace=True)
        console.print(comparison_table(comparison))
        qlora, lora = (comparison.arm(name).loss_before for name in ("qlora", "lora"))
        gap = (qlora or 0.0) - (lora or 0.0)
        console.print(WHY_QLORA_IS_BEHIND.format(gap=gap), highlight=False)
    with phases.begin("Merge"):
        console.print("Measuring the adapter, then both ways to merge it, on the held-out rows ...", style="dim")
        merged = _merge(config, output, progress=console.is_terminal)
        console.print("\n".join(describe_merge(merged)), highlight=False)
    with phases.begin("Ask"):
        console.print(f"[cyan]{QUESTION}[/cyan]")
        asked = {"before": name, "after": str(merged.output)}
        answers = {when: _answer(when, model_name, console) for when, model_name in asked.items()}
    return DemoResult(name, comparison, merged, answers, phases.seconds)


def demo_config(model: str, output: Path, steps: int) -> RunConfig:
    """Settings that teach a 135M model on 2 cores within two minutes."""
    return RunConfig(
        model=ModelConfig(name=model),
        data=DataConfig(path=str(output / "data"), max_length=128),
        output=str(output),
        lora=LoraConfig(r=16, lora_alpha=32),
        optim=OptimConfig(learning_rate=1e-3, schedule="linear", warmup_ratio=0.1),
        # 512 tokens at a time: their activations fit easily, so none need be computed twice.
        train=TrainConfig(max_steps=steps, batch_size=4),
        memory=MemoryConfig(activations="keep"),
    )


@dataclass
class Phases:
    """Titles in the terminal, and how long each phase took."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def begin(self, title: str) -> Iterator[None]:
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {title}", align="left")
        started = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - started


def _merge(config: RunConfig, output: Path, *, progress: bool) -> MergeReport:
    target = output / "merged"
    shutil.rmtree(target, ignore_errors=True)  # an earlier demo's
    adapter = output / "qlora" / "seed-0"
    return merge_checkpoint(
        Checkpoint.open(config.model.name),
        read_adapter(adapter),
        target,
        device=resolve_device(),
        measure=measure_merge(config.model, adapter, config.data),
        progress=progress,
    )


def _answer(when: str, model: str, console: Console) -> str:
    loaded = load_for_inference(ModelConfig(name=model))
    console.print(f"[bold]{when:>6}[/bold]: ", end="")
    answer = ""
    messages = [{"role": "user", "content": QUESTION}]
    for piece in stream_chat(loaded.model, loaded.tokenizer, messages, max_new_tokens=60):
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        answer += piece
    console.print()
    return answer
