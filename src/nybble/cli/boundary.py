"""Where every error of a command ends: one clear message for what the user can mend, a traceback for what we must."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from nybble.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

USER_ERROR, INTERRUPTED = 2, 130

LESS_MEMORY = (
    "Lower train.batch_size (train.gradient_accumulation makes up for it) or data.max_length, set memory.activations "
    "to recompute if it is keep, or use --method qlora, which holds the weights in 4 bits."
)
REPORT = "This is a defect of nybble. Please report the lines above together with the output of `nybble doctor`."


def explained(verb: Callable[P, R]) -> Callable[P, R]:
    """The verb, with its exceptions turned into messages and exit codes.

    UserError: what, where and what to do; 2. Out of memory: what would help; 2. Ctrl-C: 130. Anything else is ours:
    it keeps its traceback.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except UserError as error:
            show_error(error.what, error.where, error.fix)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt as interrupt:  # a training run says where it can be continued from
            Console(stderr=True, soft_wrap=True).print(Text(f"Interrupted: {interrupt}".rstrip(": "), style="yellow"))
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if not _is_out_of_memory(error):
                error.add_note(REPORT)
                raise
            show_error(f"out of memory: {_first_line(error)}", fix=LESS_MEMORY)
            raise typer.Exit(USER_ERROR) from None

    return run


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:  # nothing large was held yet, and importing it to ask takes seconds
        return isinstance(error, MemoryError)
    from nybble.memory.lack import is_out_of_memory

    return is_out_of_memory(error)


def show_error(what: str, where: str | None = None, fix: str | None = None) -> None:
    """Print `error: where: what` and, on a line of its own, the way out."""
    message = Text("error: ", style="bold red")
    message.append(f"{where}: " if where else "", style="bold default")
    message.append(what, style="not bold default")
    console = Console(stderr=True, soft_wrap=True)
    console.print(message)
    if fix:
        console.print(Text(fix, style="cyan"))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no more could be had")
