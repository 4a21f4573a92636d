"""Write docs/study.md from the kept results: every figure that was found is read from a file.

    python3 studies/write_study.py        (after any run that changes benchmarks/results/study/)

What was not measured yet says so. A test checks that the page is up to date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from claims import Results, Values, claim_table, difference_of
from grid import ADAPTER_RATES, BELOW, FULL_BELOW, FULL_RATES, MARGIN, RANKS, SEEDS, grid

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "study.md"
RESULTS = ROOT / "benchmarks" / "results"
NOT_YET = "*Not measured yet.*"

Lines = Iterator[str]


def rates(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


INTRODUCTION = f"""# Is QLoRA as good as LoRA?

SmolLM2-135M-Instruct on three kinds of data: **text** (Python's library by file), **docstrings** (questions and
answers), **words** (a seeded task with exact answers). The grid was laid down before the first run (`studies/grid.py`):
learning rates {rates(ADAPTER_RATES)} for adapters and {rates(FULL_RATES)} for full fine-tuning,
each tried with one seed and chosen by validation rows; {SEEDS} seeds at the best; results from test rows that chose
nothing. Where the lowest turned out the best, {BELOW:g} and {FULL_BELOW:g} were added (docstrings; PiSSA).
Differences are paired by seed and by row. An arm is *not worse* than LoRA if the 95 % interval of its difference ends
below {MARGIN:.3f} nats a target token, *better* if it ends below 0, *worse* if it begins above the margin, and
*inconclusive* otherwise. What was run is kept under `benchmarks/results/study/`.
"""

ARMS = """\
Arms: **lora** on 16-bit weights; **qlora** on NF4 as bitsandbytes rounds it; **prepared**, QLoRA on an NF4 base in the
same 4.127 bits, made by training rows of the same kind (errors passed on, tokens weighed by what depends on them, then
all scales tuned together); **calibrated**, the same with the adapter starting as a correction, made behind corrected
layers; **search**, NF4 scales searched while loading; **pissa** and **loftq**, the initializations of these names;
**full**, all weights trained.

The weights of this model came from a 4-bit file (Q4_1, 16 values a block of 32), so they say little about how NF4 fits
real weights: 4-bit formats are to be compared on normal weights too, and on weights moved off that grid by full
fine-tuning.
"""

AGAIN = """## Again

```
PYTHONPATH=src:benchmarks python3 studies/grid.py                              # the grid and its price
PYTHONPATH=src:benchmarks python3 studies/train_grid.py --time-limit 480       # goes on where it stopped
PYTHONPATH=src:benchmarks python3 studies/train_grid.py --small --output runs/small
PYTHONPATH=src:benchmarks python3 studies/formats.py --rows 100 --search --output benchmarks/results/study/formats.json
PYTHONPATH=src:benchmarks python3 studies/formats.py --rows 100 --search \\
  --output benchmarks/results/study/formats.json \\
  --model "moved off the grid by full fine-tuning=runs/study/quality-text/full/lr-0.0002/seed-0/model"
PYTHONPATH=src python3 benchmarks/rounding.py --model FOLDER --calibration train.jsonl --held-out NAME=FILE \\
  --output benchmarks/results/study/rounding.json
PYTHONPATH=src:benchmarks python3 studies/merged_speed.py --adapter runs/study/quality-text/lora/lr-0.002/seed-0 \\
  --output benchmarks/results/study/merged_speed.json
PYTHONPATH=src:benchmarks python3 studies/merge_to_nf4.py --adapter runs/study/quality-text/qlora/lr-0.004/seed-0 \\
  --data runs/study/data/text-200-400 --output benchmarks/results/study/merge.json
python3 studies/write_study.py
```
"""


def main() -> None:
    PAGE.write_text(page(Results(RESULTS)), encoding="utf-8")


def page(results: Results) -> str:
    return "\n".join(
        [
            INTRODUCTION,
            f"**Made so far:** {'; '.join(made(results))}. What a claim lacks says *not measured yet*.",
            "",
            ARMS,
            *section("The claims, and what was found", claim_table(results)),
            *quality(results),
            *section("The gap before training", gap_before_training(results)),
            *section("What preparing costs", kept(results, "quantize_8b", preparing)),
            *section("Ranks", across(results, {f"rank {r}": part_of_rank(r) for r in sorted((*RANKS, 16))})),
            *section("Target modules", across(results, TARGETS)),
            *section("Merging", table_of(results, "quality-text", merging)),
            *section("Merging into 4 bits", kept(results, "merge", merging_to_nf4)),
            *section("Learning rates", sweeps(results)),
            *section("Four-bit formats", kept(results, "formats", formats)),
            *section("Tried for compensated codes", kept(results, "tried", tried)),
            *section("Tried for tuning", kept(results, "tried_tuning", tried_tuning)),
            *section("Tried for where training starts", kept(results, "tried_start", tried_start)),
            *section("Tried for how much of a start corrects", kept(results, "tried_shares", tried_shares)),
            *section("Tried for the weights of tokens", kept(results, "tried_weights", tried_weights)),
            *section("Tried for outputs", kept(results, "tried_outputs", tried_outputs)),
            *section("Tried for aims", kept(results, "tried_aims", tried_aims)),
            *section("Tried for answers", kept(results, "tried_answers", tried_answers)),
            *section("Tried for bases", kept(results, "tried_bases", tried_bases)),
            *section("Failed", failures(results)),
            AGAIN,
        ]
    )


def made(results: Results) -> Lines:
    """Which parts of the grid there are results of, and which weights the formats were tried on."""
    planned = [part.name for part in grid(str)]
    found = {name: comparison for name, comparison in results.parts() if name in planned}
    named = f" ({', '.join(found)})" if found else ""
    yield f"{len(found) or 'none'} of the {len(planned)} parts of the grid{named}"
    lacks = [f"{n}: {a['name']}" for n, c in found.items() for a in c["arms"] if a["status"] == "unfinished"]
    if lacks:
        yield f"unfinished are {', '.join(lacks)}"
    weights = dict.fromkeys(row["weights"] for row in results.rows("study/formats"))
    if weights:
        yield f"the errors of 4-bit formats on weights of these kinds: {', '.join(weights)}"


TARGETS = {"all linear": "quality-text", "attention": "targets-attention", "q_proj, v_proj": "targets-q-v"}


def part_of_rank(r: int) -> str:
    return "quality-text" if r == 16 else f"rank-{r}"


def section(title: str, lines: Lines) -> list[str]:
    return [f"## {title}", "", *(list(lines) or [NOT_YET]), ""]


def quality(results: Results) -> Lines:
    for kind in ("text", "docstrings", "words"):
        yield from section(f"Quality on {kind}, r=16 on all linear layers", table_of(results, f"quality-{kind}", arms))


def table_of(results: Results, part: str, lines: Callable[[Values], Lines]) -> Lines:
    comparison = results.part(part)
    if comparison is None:
        return
    yield from lines(comparison)
    yield ""
    yield origin(results, part)


def kept(results: Results, name: str, lines: Callable[[Values], Lines]) -> Lines:
    """A table of the rows of a file below study/, if it is there, and where they come from."""
    if results.rows(f"study/{name}"):
        yield from lines(results.read(f"study/{name}"))
        yield ""
        yield origin(results, name)


def origin(results: Results, part: str) -> str:
    values = results.read(f"study/{part}")
    versions = ", ".join(f"{name} {version}" for name, version in values["versions"].items() if version)
    return f"{values['device']}, {versions}, {values['date']}, by `{values['command']}`."


def arms(comparison: Values) -> Lines:
    """A line an arm: its loss and how far it is from LoRA's."""
    scores = list(dict.fromkeys(score["name"] for arm in comparison["arms"] for score in arm["scores"]))
    columns = ["arm", "trained parameters", "learning rate", "test loss", "above LoRA's", "verdict", *scores]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for arm in comparison["arms"]:
        difference = difference_of(comparison, arm["name"])
        trained = f"{arm['trainable']:,}" if arm["runs"] else "-"
        cells = [arm["name"], trained, rate(arm), loss_with_interval(arm), gap(difference)]
        cells += [difference["verdict"] if difference else "-", *(score_of(arm, name) for name in scores)]
        yield f"| {' | '.join(cells)} |"


def rate(arm: Values) -> str:
    return f"{arm['learning_rate']:g}" if arm["learning_rate"] else "-"


def mean_loss(arm: Values, key: str = "loss") -> float | None:
    found = [run[key] for run in arm["runs"] if run["status"] == "finished" and run[key] is not None]
    return sum(found) / len(found) if found else None


def loss_with_interval(arm: Values) -> str:
    loss, interval = mean_loss(arm), arm["loss_interval"]
    if loss is None:
        return arm["status"]
    return f"{loss:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]" if interval else f"{loss:.4f}"


def gap(difference: Values | None) -> str:
    if difference is None:
        return "-"
    interval, seeds = difference["interval"], len(difference["seeds"])
    return f"{difference['mean']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}], {seeds} seeds"


def score_of(arm: Values, name: str) -> str:
    score = next((score for score in arm["scores"] if score["name"] == name), None)
    if score is None:
        return "-"
    interval, rows = score["interval"], score["questions"]
    return f"{score['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}], {rows} rows"


def gap_before_training(results: Results) -> Lines:
    tables = (list(table_of(results, "quality-text", before_training)), list(kept(results, "rounding", roundings)))
    found = [table for table in tables if table]
    for number, table in enumerate(found):
        yield from ["", *table] if number else table


def roundings(values: Values) -> Lines:
    """What each way of finding NF4 codes gives back of the gap, alone and with its correction added."""
    texts, tokens = list(values["rows"][0]["loss"]), values["calibration"]["tokens"]
    yield f"Codes as `nybble quantize` finds them on {tokens:,} tokens of text, alone and with the low-rank"
    yield "correction of what they lose added, as an adapter that starts there computes; losses of held-out texts, and"
    yield "how much of plain NF4's gap is closed. Made before tokens were weighed, with whole aims."
    yield ""
    heads = ["codes", "correction", "weight error", *(f"{text}{what}" for text in texts for what in ("", ", closed"))]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in values["rows"]:
        whole = row["rounding"] == "none"
        cells = ["16-bit weights" if whole else row["rounding"], f"rank {row['rank']}" if row["rank"] else "-"]
        cells.append(f"{row['weight_error']:.4f}" if "weight_error" in row else "-")
        for text in texts:
            closed = row.get("closed", {}).get(text)
            cells += [f"{row['loss'][text]:.4f}", "-" if closed is None else f"{closed:.0%}"]
        yield f"| {' | '.join(cells)} |"


def before_training(comparison: Values) -> Lines:
    """How much of what NF4 costs the prepared base and the calibrated start give back before the first step."""
    by_name = {arm["name"]: arm for arm in comparison["arms"]}
    losses = {name: mean_loss(by_name[name], "loss_before") for name in STARTS if name in by_name}
    dense, plain = losses.get("base"), losses.get("base-nf4")
    if dense is None or plain is None:
        return
    yield "| start | test loss | above 16 bit | of the gap closed |"
    yield "|---|---|---|---|"
    for name, loss in losses.items():
        if loss is not None:
            closed = "-" if name == "base" else f"{(plain - loss) / (plain - dense):.0%}"
            yield f"| {STARTS[name]} | {loss:.4f} | {loss - dense:+.4f} | {closed} |"


STARTS = {
    "base": "16-bit weights",
    "base-nf4": "plain NF4",
    "base-prepared": "prepared NF4",
    "search": "NF4 with searched scales",
    "calibrated": "prepared NF4 with the calibrated start",
    "pissa": "PiSSA",
    "loftq": "LoftQ",
}


def preparing(values: Values) -> Lines:
    yield "Once a model and text, by `nybble quantize --calibration`, before tokens were weighed; every adapter begins"
    yield "at the same folder."
    yield ""
    yield "| model | tokens | minutes | peak of the device GiB | bits a weight |"
    yield "|---|---|---|---|---|"
    for row in values["rows"]:
        cells = [row["model"], f"{row['tokens']:,}", f"{row['seconds'] / 60:.1f}", f"{row['peak_gib']:.1f}"]
        yield f"| {' | '.join(cells)} | {row['bits_per_weight']:.3f} |"


def across(results: Results, parts: Mapping[str, str]) -> Lines:
    """A line a part: LoRA's loss, and the differences of the others."""
    others = ("qlora", "prepared", "calibrated")
    found = {title: comparison for title, name in parts.items() if (comparison := results.part(name))}
    if not found:
        return
    yield f"| | LoRA's test loss | {' | '.join(f'{name} above LoRA' for name in others)} |"
    yield "|---" * (2 + len(others)) + "|"
    for title, comparison in found.items():
        lora = next(arm for arm in comparison["arms"] if arm["name"] == "lora")
        cells = [title, loss_with_interval(lora), *(gap(difference_of(comparison, name)) for name in others)]
        yield f"| {' | '.join(cells)} |"


def merging(comparison: Values) -> Lines:
    found = [(arm["name"], merge) for arm in comparison["arms"] for merge in arm["merges"]]
    if not found:
        return
    yield "| arm | merged into | adapter's loss | merged loss | difference |"
    yield "|---|---|---|---|---|"
    for name, merge in found:
        before, after = merge["adapter_loss"], merge["merged_loss"]
        yield f"| {name} | {merge['base']} | {before:.4f} | {after:.4f} | {after - before:+.4f} |"


def merging_to_nf4(values: Values) -> Lines:
    """What holding a merge in NF4 again costs, as a share of what it costs to round twice."""
    tokens = values["calibration"]["tokens"]
    yield "A QLoRA adapter's merge, held in NF4 again: its loss above that of the 16-bit merge into the weights that it"
    yield "was trained on, and what share that is of rounding those to nearest a second time. Compensated codes are"
    yield f"calibrated by {tokens:,} tokens of training rows."
    yield ""
    yield "| merged into | codes | test loss | above | share |"
    yield "|---|---|---|---|---|"
    for row in values["rows"]:
        found = f"{row['above']:+.4f} | {row['share']:.0%}" if "above" in row else "- | -"
        yield f"| {row['base']} | {row['rounding'] or '16 bit'} | {row['loss']:.4f} | {found} |"


def sweeps(results: Results) -> Lines:
    """Lowest validation loss at each rate."""
    rows = [(part, arm) for part, comparison in results.parts() for arm in comparison["arms"] if arm["sweep"]]
    if not rows:
        return
    yield "Of the first seed. Where the best rate is the last that was tried, one beyond may be better still."
    yield ""
    yield "| part | arm | validation loss at each learning rate |"
    yield "|---|---|---|"
    for part, arm in rows:
        points = [
            f"{point['learning_rate']:g}: {'failed' if point['loss'] is None else format(point['loss'], '.4f')}"
            for point in arm["sweep"]
        ]
        yield f"| {part} | {arm['name']} | {', '.join(points)}{at_the_edge(arm)} |"


def at_the_edge(arm: Values) -> str:
    found = {point["learning_rate"]: point["loss"] for point in arm["sweep"] if point["loss"] is not None}
    best = min(found, key=found.__getitem__, default=None)
    if best is None or len(found) < 2 or best not in (min(found), max(found)):
        return ""
    return f" (best at the {'lowest' if best == min(found) else 'highest'})"


def formats(values: Values) -> Lines:
    yield "| weights | format | scales | block | double quantization | bits a weight | relative error | loss above |"
    yield "|---" * 8 + "|"
    for row in values["rows"]:
        above = f"{row['loss_above']:+.4f}" if "loss_above" in row else "-"
        double = "yes" if row["double_quant"] else "no"
        of = row["weights"] if row["linears"] == 1 else f"{row['weights']}, {row['linears']} linears"
        cells = [of, row["format"].upper(), row["rounding"], str(row["block_size"]), double]
        cells += [format(row["bits_per_weight"], ".3f"), format(row["relative_error"], ".5f"), above]
        yield f"| {' | '.join(cells)} |"


def tried(values: Values) -> Lines:
    """Ways to compensated codes and their corrections, those that were left among them."""
    yield "How much of plain NF4's gap before training is closed, by a trial on 100,000 tokens of each text (its script"
    yield "was not kept), and how far above LoRA's training from there ended:"
    yield ""
    texts = list(values["rows"][0]["closed"])
    yield f"| codes | calibration tokens | correction | {' | '.join(texts)} | after training |"
    yield "|---" * (4 + len(texts)) + "|"
    for row in values["rows"]:
        closed = " | ".join(f"{row['closed'][text]:.1%}" for text in texts)
        yield f"| {row['what']} | {row['tokens']:,} | {row['correction']} | {closed} | {gap(row.get('after'))} |"


def above(reference: Sequence[float], row: Values) -> list[float]:
    """How far training from a row's base ended above LoRA's, by seed."""
    return [loss - other for loss, other in zip(row["losses_after"], reference, strict=True)]


def tried_tuning(values: Values) -> Lines:
    """How near a base predicts what the 16-bit model does, and where training from there ends."""
    text, reference = values["calibration"], values["losses_of_lora"]
    yield f"By {text['tokens']:,} tokens of {text['rows']}. Divergence of the predictions for held-out text from"
    yield "those of the 16-bit model, in nats a token, and the same with an adapter of LoRA's on both; test loss before"
    yield f"training, and how far above LoRA's training at {values['learning_rate']:g} ended ({len(reference)} seeds)."
    yield ""
    yield "| base | divergence | with an adapter | test loss before | above LoRA after |"
    yield "|---|---|---|---|---|"
    for row in values["rows"]:
        keys = ("divergence", "divergence_adapted", "loss_before")
        cells = ["-" if row[key] is None else f"{row[key]:.4f}" for key in keys]
        yield f"| {row['what']} | {' | '.join(cells)} | {fmean(above(reference, row)):+.4f} |"
    yield ""
    yield "What is left after training follows the error that the codes leave, not how near the base predicts at first:"
    yield "tuned scales take an eighth of the divergence away and close the gap before training, and little of the one"
    yield "after it. Codes trained straight through rounding get worse at every rate that changes many of them."


def tried_start(values: Values) -> Lines:
    """Bases by the text's own training rows, and what adapters start from on them."""
    text, reference = values["calibration"], values["losses_of_lora"]
    yield f"By {text['tokens']:,} tokens of {text['rows']}, in windows of 2,048. An adapter starts plain, at"
    yield "corrections in closed form behind corrected layers, or at ones that were tuned as scales are. Test loss"
    yield f"before training, and how far above LoRA's training ended ({len(reference)} seeds, standard deviation)."
    yield ""
    yield "| base | start | learning rate | test loss before | above LoRA after |"
    yield "|---|---|---|---|---|"
    for row in values["rows"]:
        found = above(reference, row)
        cells = [row["what"], row["start"], f"{row['learning_rate']:g}", f"{row['loss_before']:.4f}"]
        yield f"| {' | '.join(cells)} | {fmean(found):+.4f} ({stdev(found):.4f}) |"
    yield ""
    yield "At 0.008 training becomes unstable: the sweep's 0.004 has no better rate above it. Windows of 512 tokens"
    yield "and today's damping, which bring single linears nearer to their outputs, ended 0.003 above *closed form*"
    yield "at 0.004 by the same seeds (calibrated, one a kind, in *Tried for bases*): nearer outputs of single linears"
    yield "need not be a better model."


def tried_shares(values: Values) -> Lines:
    """Starts of adapters of rank 16 on one prepared base."""
    reference = values["losses_of_lora"]
    yield "Adapters of rank 16 on the prepared base of text. Losses of validation rows before training, and how far"
    yield f"above LoRA's at 0.002 ({fmean(reference):.4f}) training ended, seed by seed where its time was enough."
    yield ""
    yield "| start | learning rate | before | above LoRA after, by seed |"
    yield "|---|---|---|---|"
    for row in values["rows"]:
        found = (f"{loss - other:+.4f}" for loss, other in zip(row["losses_after"], reference, strict=False))
        yield f"| {row['start']} | {row['learning_rate']:g} | {row['loss_before']:.4f} | {', '.join(found)} |"
    yield ""
    yield "Half the rank leaves the other half to what is to be learned. It ended nearer here at 0.004, but the grid's"
    yield "rule chose 0.002, and five seeds on test rows ended further (*Tried for bases*): the whole rank stays."
    yield "Directions in which inputs or gradients are largest begin with B at zero; LoRA could begin there too, so"
    yield "what they bring says little about four bits."


def tried_weights(values: Values) -> Lines:
    """How far predictions of quantized models diverge where errors of some tokens count more, or aims for less."""
    yield f"Divergence of the predictions for {values['held_out_tokens']:,} tokens of other Python from those of the"
    yield "16-bit model, in nats a token, before scales are tuned. A token weighs by the squared gradient, at a"
    yield "linear's output, of the loss of labels drawn from the predictions (Fisher's information; GuidedQuant,"
    yield "arXiv 2505.07004), bounded at 50 times the mean. *Outputs*: rows, by blocks of 128, make up for each"
    yield "other's errors too, by the second moments of those gradients. *In place*: linears see what the quantized"
    yield "ones before them give, else what the 16-bit model gives; *aims*: how much of the way a weight is moved"
    yield "first to what makes up for that."
    yield ""
    yield "| calibration tokens | in place | aims | tokens weigh | outputs | divergence |"
    yield "|---|---|---|---|---|---|"
    for row in values["rows"]:
        cells = [f"{row['tokens']:,}", row["in_place"], row["aims"] or "-", row["weights"], row["outputs"]]
        yield f"| {' | '.join(cells)} | {row['divergence']:.4f} |"


def tried_outputs(values: Values) -> Lines:
    """Codes whose rows make up for each other's errors too."""
    text = values["calibration"]
    yield f"By {text['tokens']:,} tokens of {text['rows']}, with aims and weights as they are now. Rows of a weight are"
    yield "quantized by turns, every n-th at once; the errors that those make are made up for by rows that come later,"
    yield "as far as gradients at their outputs go together (their second moments, damped by so much of the diagonal's"
    yield f"median). Divergence of codes as above, for {values['held_out_tokens']:,} tokens of validation rows."
    yield ""
    yield "| turns | damping | divergence |"
    yield "|---|---|---|"
    for row in values["rows"]:
        damping = "-" if row["damping"] is None else f"{row['damping']:g}"
        yield f"| {row['turns']} | {damping} | {row['divergence']:.4f} |"
    yield ""
    yield "A tenth less is left with strong damping. It is not in `nybble quantize` yet: no training from such codes"
    yield "was measured."


def tried_aims(values: Values) -> Lines:
    """The same by as many tokens as the study's, on to what training from there gives."""
    reference = values["losses_of_lora"]
    yield f"By training rows of text. Divergence as above, for {values['held_out_tokens']:,} tokens of validation rows:"
    yield "of codes, with scales tuned together (in two passes, unless four are named), and with corrections of rank 16"
    yield f"added. Last, how far above LoRA's training from there ended at {values['learning_rate']:g}"
    yield f"({len(reference)} seeds, standard deviation)."
    yield ""
    yield "| tokens | aims | they weigh | window, damping | codes | tuned | corrected | above LoRA after |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in values["rows"]:
        of = f"{row['tokens']:,}" + (", four passes" if row["passes"] == 4 else "")
        cells = [of, f"{row['aims']:g}", "by gradients" if row["weighed"] else "alike"]
        cells += [f"{row['window']:,}, {row['damping']}"]
        cells += ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("codes", "tuned", "corrected")]
        found = above(reference, row) if row["losses_after"] else None
        cells.append(f"{fmean(found):+.4f} ({stdev(found):.4f})" if found else "-")
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "Half of the way and tokens weighed by gradients is what `nybble quantize` does; prepared bases are made so."


def tried_answers(values: Values) -> Lines:
    """Scales that are tuned for what training counts, or for all."""
    yield f"By {values['windows']} windows of {values['window']} tokens of docstrings, from searched codes: divergence"
    yield f"at the answers, and at all tokens, of {values['held_out_windows']} other windows."
    yield ""
    yield "| scales | predictions that count | at answers | at all |"
    yield "|---|---|---|---|"
    for row in values["rows"]:
        cells = [row["scales"], f"{row['predictions']:,}" if row["predictions"] else "-"]
        yield f"| {' | '.join(cells)} | {row['at_answers']:.4f} | {row['at_all']:.4f} |"
    yield ""
    yield "All predictions tell more of the scales than the few that are wanted, even about these."


def tried_bases(values: Values) -> Lines:
    """What training from bases that were made in other ways gave."""
    yield "| base | part | arm | above LoRA's |"
    yield "|---|---|---|---|"
    for row in values["rows"]:
        yield f"| {row['what']} | {row['part']} | {row['arm']} | {gap(row['after'])} |"


def failures(results: Results) -> Lines:
    found = [(part, arm) for part, comparison in results.parts() for arm in comparison["arms"] if arm["error"]]
    if not any(True for _ in results.parts()):
        return
    yield from (f"- {part}, {arm['name']}: {arm['error']}" for part, arm in found)
    if not found:
        yield "No run failed."


if __name__ == "__main__":
    main()
