"""`nybble eval`: held-out loss, answers to questions and tasks of others, of a model with or without an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli.options import (
    Adapter,
    AsJson,
    ConfigFile,
    Data,
    Model,
    Settings,
    print_json,
    read_settings,
)
from nybble.errors import UserError


def evaluate(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    adapter: Adapter = None,
    questions: Annotated[
        str | None,
        typer.Option("--questions", "-q", help="File of questions whose answers are known: see above."),
    ] = None,
    answers: Annotated[Path | None, typer.Option(help="Write each answer and its scores here, as JSONL.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, like arc_easy,gsm8k, or a task's YAML file.")
    ] = None,
    few_shot: Annotated[int | None, typer.Option(min=0, help="Examples before each question of a task.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take only the first so many questions of each task.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put the questions of tasks into the chat template.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Questions at a time, fewer where memory runs out. Of rows: train.batch_size.")
    ] = 16,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Measure the loss on held-out rows, answers, and tasks.

    Rows are those of --data: the valid file of a folder, or what the
    settings hold out, or else all of them.

    A question is a row {"question": ..., "answer": ...}, with {"choices":
    [...]} a choice by likelihood; rows to train on that end in an answer are
    questions too.
    """
    if answers is not None and not questions:
        raise UserError("there are no questions to answer", where="--answers", fix="Give them with --questions.")
    of_tasks = {"--few-shot": few_shot is not None, "--limit": limit is not None, "--chat-template": chat_template}
    if not tasks and (unused := [option for option, given in of_tasks.items() if given]):
        raise UserError("there are no tasks", where=", ".join(unused), fix="Name some with --tasks.")
    rows_are_asked_for = data is not None or not (questions or tasks)
    given = data if rows_are_asked_for or config else "."
    run = read_settings(config, settings, adapter=adapter, model__name=model, data__path=given, output=".")

    from nybble.evaluation.report import describe, write_answers
    from nybble.evaluation.run import Wanted, evaluate_model
    from nybble.files import require_writable_file

    if answers is not None:
        require_writable_file(answers)
    wanted = Wanted(
        rows=rows_are_asked_for,
        questions=questions,
        max_new_tokens=max_new_tokens,
        tasks=tuple(name.strip() for name in tasks.split(",")) if tasks else (),
        few_shot=few_shot,
        limit=limit,
        chat_template=chat_template,
        batch_size=batch_size,
    )
    found = evaluate_model(run, wanted, adapter=adapter, progress=not as_json)
    if answers and found.answers:
        write_answers(answers, found.answers)
    if as_json:
        print_json(found.figures())
    else:
        typer.echo("\n".join(describe(found)))
