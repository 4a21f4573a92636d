"""`nybble chat`: talk to a model, with or without an adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from nybble.cli.options import Adapter, ConfigFile, Model, Settings, read_settings


def chat(
    config: ConfigFile = None,
    model: Model = None,
    adapter: Adapter = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this once, and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    settings: Settings = None,
) -> None:
    """Ask a model, with or without an adapter.

    Answers stream. Without --prompt the conversation goes on until an
    empty line or Ctrl-D.
    """
    run = read_settings(config, settings, adapter=adapter, model__name=model, data__path=".", output=".")

    from nybble.inference import load_within_plan
    from nybble.models.generate import stream_chat
    from nybble.planner.evaluation import Sequences

    turn = Sequences(1, max_new_tokens, kept=2 * max_new_tokens)  # a question as long as its answer may be
    loaded, _ = load_within_plan(run, adapter, work=[turn])
    messages = [{"role": "system", "content": system}] if system else []
    for question in [prompt] if prompt is not None else _questions():
        messages.append({"role": "user", "content": question})
        answer = ""
        for piece in stream_chat(
            loaded.model, loaded.tokenizer, messages, max_new_tokens=max_new_tokens, temperature=temperature
        ):
            typer.echo(piece, nl=False)
            answer += piece
        typer.echo()
        messages.append({"role": "assistant", "content": answer})


def _questions() -> Iterator[str]:
    with contextlib.suppress(EOFError):  # Ctrl-D
        while question := input("you> ").strip():
            yield question
