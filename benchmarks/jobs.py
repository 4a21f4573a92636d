"""Rows of figures by processes of their own, one at a time on each GPU, until a time is over.

Starting Python with PyTorch and Transformers takes 10 to 20 s, as long as many a row: processes are forked from one
that has imported them and has never touched a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from results import write_result

Figures = dict[str, Any]

IMPORTED = [
    "transformers.models.llama.modeling_llama",
    "nybble.train.loop",
    "nybble.models.skeleton",
    "nybble.models.fused.loss",
]
_SECONDS_TO_END = 20  # of a process that has sent its figures: the system unlocks its pinned memory


@dataclass(frozen=True)
class Job:
    """A call that returns figures. function: of a module that another process can import. name: the row's."""

    name: str
    function: Callable[..., Figures]
    arguments: tuple[Any, ...] = ()
    limit_s: float = 120


def run_jobs(
    jobs: Sequence[Job], gpus: Sequence[int | None], *, time_limit_s: float, imported: Sequence[str] = IMPORTED
) -> Iterator[Figures]:
    """Figures of each job as it ends, with its name as `row`: the first jobs are begun first, one on each GPU.

    A job that fails, dies, takes too long or is never begun has an `error`. gpus: their numbers, None is the CPU; two
    jobs share one that is named twice. imported: by the process that the others are forked from.
    """
    deadline = time.monotonic() + time_limit_s
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(imported))
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.SimpleQueue[Figures] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def serve(gpu: int | None) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            began = time.monotonic()
            figures = _figures_of(context, job, gpu, deadline)
            done.put({"row": job.name, **figures, "gpu": gpu, "process_s": round(time.monotonic() - began, 1)})

    for gpu in gpus:
        threading.Thread(target=serve, args=(gpu,), daemon=True).start()
    for _ in jobs:
        yield done.get()


def _figures_of(context: Any, job: Job, gpu: int | None, deadline: float) -> Figures:
    if time.monotonic() >= deadline:
        return {"error": "not begun: the time was over"}
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, gpu, job.function, job.arguments))
    process.start()  # the first waits for the imports
    sender.close()
    limit_s = max(0.0, min(job.limit_s, deadline - time.monotonic()))
    figures: Figures = {"error": f"its time was over after {limit_s:.0f} s"}
    try:
        if receiver.poll(limit_s):
            figures = receiver.recv()
            process.join(_SECONDS_TO_END)
    except EOFError:  # it died
        process.join(_SECONDS_TO_END)
        figures = {"error": f"exit code {process.exitcode}"}
    process.kill()
    process.join()
    return figures


def _call(sender: Connection, gpu: int | None, function: Callable[..., Figures], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)  # read at the first call of CUDA
    try:
        sender.send(function(*arguments))
    except Exception:
        sender.send({"error": traceback.format_exc()[-2500:]})


def _end_with_parent() -> None:
    """A process that is killed leaves nobody behind on its GPUs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def add_job_options(parser: argparse.ArgumentParser, *, output: str) -> None:
    parser.add_argument("--gpus", nargs="+", type=int, default=None, help="their numbers; default: all")
    parser.add_argument("--time-limit", type=float, default=1e9, help="seconds for all rows together")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results") / output)


def write_rows(
    jobs: Sequence[Job],
    options: argparse.Namespace,
    show: Callable[[Figures], str],
    *,
    earlier: Sequence[Figures] = (),
    **more: Any,
) -> list[Figures]:
    """Run `jobs`, print each row as it comes and keep all of them, in the order of `jobs`, behind those of `earlier`.

    What failed is kept too.
    """
    gpus = options.gpus if options.gpus is not None else list(range(torch.cuda.device_count())) or [None]
    found: dict[str, Figures] = {}
    for figures in run_jobs(jobs, gpus, time_limit_s=options.time_limit):
        found[figures["row"]] = figures
        print(f"FAILED {figures['row']}\n{figures['error']}" if "error" in figures else show(figures), flush=True)
        rows = [*earlier, *(found[job.name] for job in jobs if job.name in found)]
        # Asked for here, the card would be in use by this process too.
        card = next((row["device"] for row in rows if "device" in row), "unknown")
        write_result(options.output, rows, device=card, **more)
    return list(found.values())
