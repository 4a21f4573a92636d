"""Tasks of lm-evaluation-harness, against the harness's own way to run a Transformers model."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nybble.errors import UserError
from nybble.evaluation.tasks import PACKAGE, Tasks, TaskScore, _scores
from nybble.models.config import ModelConfig
from nybble.models.load import load_model

harness = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="lm-eval is not installed")
# Warnings of the harness and of what it imports are its own.
own_warnings = pytest.mark.filterwarnings("ignore")

Tiny = Callable[..., Path]
TASK = """\
task: tiny_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICES = 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]'
ANSWERS = (
    'doc_to_target: "{{gold}}"\ngeneration_kwargs: {until: ["e", "\\n"], max_gen_toks: 12}\n'
    "metric_list: [{metric: exact_match}]"
)
TEXTS = 'doc_to_target: "{{text}}"\nmetric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]'


@pytest.fixture
def tasks(tmp_path: Path) -> list[str]:
    """Three tasks in files: of choices, of answers, of whole texts, some longer than the model reads at once."""
    rows = [
        {
            "question": f"What is {number}? ",
            "choices": ["odd", f"even, as {number} shows", "neither"],
            "answer": number % 3,
            "gold": "0",
            "text": f"The fox and {number} dogs. " * (1 + 20 * (number % 3)),
        }
        for number in range(7)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {"multiple_choice": CHOICES, "generate_until": ANSWERS, "loglikelihood_rolling": TEXTS}
    files = []
    for name, (kind, rest) in enumerate(kinds.items()):
        file = tmp_path / f"{kind}.yaml"
        file.write_text(TASK.format(name=name, file=data, kind=kind, rest=rest))
        files.append(str(file))
    return files


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the package lm-eval"):
        Tasks.find(["arc_easy"])


@harness
@own_warnings
def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'arc_easy'"):
        Tasks.find(["arc_eazy"])
    with pytest.raises(UserError, match="cannot be loaded"):
        Tasks.find(["nowhere/none.yaml"])


@harness
@own_warnings
@pytest.mark.parametrize("add_bos", [False, True])
def test_it_is_what_the_harness_finds(tiny: Tiny, tasks: list[str], add_bos: bool) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    loaded = load_model(ModelConfig(name=str(tiny("llama", add_bos=add_bos))), device=torch.device("cpu"))
    found = Tasks.find(tasks)
    scores = found.run(loaded.model, loaded.tokenizer, batch_size=3)
    # The same window as ours, and HFLM's own rule for BOS is the tokenizer's.
    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1, max_length=511)
    expected = simple_evaluate(theirs, tasks=tasks, task_manager=found.manager, bootstrap_iters=0)["results"]
    assert len(scores) == 5
    for score in scores:
        assert score.value == pytest.approx(expected[score.task][f"{score.metric},none"], rel=1e-5)
        assert score.questions == 7


@harness
@own_warnings
def test_a_group_has_the_questions_of_its_tasks(tiny: Tiny, tasks: list[str], tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    (tmp_path / "other.yaml").write_text(Path(tasks[0]).read_text().replace("tiny_0", "tiny_other"))
    group = "group: tiny_group\ntask: [tiny_0, tiny_other]\naggregate_metric_list: [{metric: acc}]\n"
    (tmp_path / "group.yaml").write_text(group)
    found = Tasks(("tiny_group",), TaskManager(include_path=str(tmp_path), include_defaults=False))
    loaded = load_model(ModelConfig(name=str(tiny("llama"))), device=torch.device("cpu"))
    scores = found.run(loaded.model, loaded.tokenizer, batch_size=3)
    questions = {(score.task, score.metric): score.questions for score in scores}
    assert questions.pop(("tiny_group", "acc")) == 14
    assert list(questions.values()) == [7] * 4


def test_figures_of_a_group_bring_their_own_counts() -> None:
    """As the harness has them, which need not be installed for it."""
    figures = {
        "alias": "mmlu",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict": 0.25,
        "exact_match_stderr,strict": "N/A",
        "sample_len": 40,
        "sample_count": {"acc,none": 40, "exact_match,strict": 24},
    }
    assert _scores("mmlu", figures, 0) == [
        TaskScore("mmlu", "acc", 0.5, 0.1, 40),
        TaskScore("mmlu", "exact_match (strict)", 0.25, None, 24),
    ]
    del figures["sample_count"]
    assert [score.questions for score in _scores("arc", figures, 7)] == [7, 7]


@harness
@own_warnings
def test_requests_are_answered_as_transformers_does(tiny: Tiny) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from nybble.evaluation.harness import HarnessModel

    loaded = load_model(ModelConfig(name=str(tiny("qwen3"))), device=torch.device("cpu"))
    ours = HarnessModel(loaded.model, loaded.tokenizer, batch_size=4)
    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1, max_length=511)

    def requests(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
        return [Instance(kind, {}, values, number) for number, values in enumerate(arguments)]

    likelihoods = requests("loglikelihood", ("The quick", " brown fox"), ("", "It is"), ("x " * 400, " y"), ("a ", "b"))
    mine, others = ours.loglikelihood(likelihoods), theirs.loglikelihood(likelihoods, disable_tqdm=True)
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in others], rel=1e-5)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in others]
    options = {"until": ["o", "qu"], "max_gen_toks": 30, "do_sample": False}
    answers = requests("generate_until", *((f"What is {n}?", options) for n in range(6)), ("x " * 600, options))
    assert ours.generate_until(answers) == theirs.generate_until(answers, disable_tqdm=True)
    with pytest.raises(UserError, match="at random"):
        ours.generate_until(requests("generate_until", ("x", {"do_sample": True, "temperature": 0.7})))
