"""What a model answers, and the scores of it, against the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nybble.data.config import DataConfig
from nybble.evaluation.answers import answer_questions
from nybble.evaluation.questions import read_questions
from nybble.models.config import ModelConfig
from nybble.models.generate import stream_chat
from nybble.models.load import LoadedModel, load_model

Tiny = Callable[..., Path]
ASKED = ("What does add return?", "Is it even?", "How are you today, and what do you want?", "0123")


def loaded(folder: Path) -> LoadedModel:
    return load_model(ModelConfig(name=str(folder)), device=torch.device("cpu"))


def write(folder: Path, rows: list[dict[str, object]]) -> str:
    file = folder / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_open_questions(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    model = loaded(tiny(kind))
    expected = [
        "".join(stream_chat(model.model, model.tokenizer, [{"role": "user", "content": text}], max_new_tokens=9))
        for text in ASKED
    ]
    known = [expected[0], "never said", expected[2], ["neither", expected[3]]]
    rows = [{"question": text, "answer": answer} for text, answer in zip(ASKED, known, strict=True)]
    questions = read_questions(write(tmp_path, rows), model.tokenizer, DataConfig(path="."), max_positions=512)
    found = answer_questions(model.model, model.tokenizer, questions, batch_size=3, max_new_tokens=9)
    assert [answer.given for answer in found.answers] == [text.strip() for text in expected]
    assert [answer.scores["exact match"] for answer in found.answers] == [1.0, 0.0, 1.0, 1.0]
    match = found.scores[0]
    assert (match.name, match.value, match.questions) == ("exact match", 0.75, 4)
    assert match.interval.low < 0.75 < match.interval.high < 1
    assert found.figures()["scores"]["exact match"]["value"] == 0.75
    assert 4 < found.generated_tokens <= 36


def test_choices_are_by_likelihood(tiny: Tiny, tmp_path: Path) -> None:
    model = loaded(tiny("llama"))
    choices = [["fox", "the quick brown fox jumps"], ["dog", "lazy", "a question is asked"], ["it", "returns"]]
    rows = [
        {"question": text, "choices": texts, "answer": index % 2}
        for index, (text, texts) in enumerate(zip(ASKED, choices, strict=False))
    ]
    questions = read_questions(write(tmp_path, rows), model.tokenizer, DataConfig(path="."), max_positions=512)
    found = answer_questions(model.model, model.tokenizer, questions, batch_size=4)
    for index, (answer, texts) in enumerate(zip(found.answers, choices, strict=True)):
        sums = [log_probability(model, ASKED[index], text) for text in texts]
        by_length = [total / len(text) for total, text in zip(sums, texts, strict=True)]
        assert answer.given == texts[sums.index(max(sums))]
        assert answer.scores["accuracy"] == float(sums.index(max(sums)) == index % 2)
        assert answer.scores["accuracy by length"] == float(by_length.index(max(by_length)) == index % 2)
    assert {score.name for score in found.scores} == {"accuracy", "accuracy by length"}
    assert found.generated_tokens == 0


def log_probability(model: LoadedModel, question: str, answer: str) -> float:
    """Of the answer, without the token that ends its turn."""
    turns = [{"role": "user", "content": question}]
    prompt = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    start = len(model.tokenizer(prompt).input_ids)
    ids = torch.tensor([model.tokenizer(f"{prompt}{answer}").input_ids])
    with torch.no_grad():
        shares = model.model.eval()(ids).logits[0, :-1].log_softmax(-1)
    return float(shares.gather(1, ids[0, 1:, None])[start - 1 :].sum())
