"""The command line. One file a verb: parse, call one function, print. torch is imported only inside verbs."""

from __future__ import annotations

import typer

from nybble.cli import chat, compare, demo, difference, doctor, evaluate, merge, plan, preview, quantize, train
from nybble.cli.boundary import explained

app = typer.Typer(
    name="nybble",
    help="Fine-tune large language models with LoRA and QLoRA, on the card at hand.",
    epilog="Start with [bold]nybble demo[/bold], which needs no GPU, or with [bold]nybble doctor[/bold].",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("plan")(explained(plan.plan))
app.command("train")(explained(train.train))
app.command("eval")(explained(evaluate.evaluate))
app.command("chat")(explained(chat.chat))
app.command("merge")(explained(merge.merge))
app.command("difference")(explained(difference.difference))
app.command("quantize")(explained(quantize.quantize))
app.command("preview")(explained(preview.preview))
app.command("compare")(explained(compare.compare))
app.command("demo")(explained(demo.demo))
app.command("doctor")(explained(doctor.doctor))
