"""Ask a loaded model questions, and score what it says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.data.collate import collate
from nybble.data.example import Example
from nybble.evaluation.batching import in_batches
from nybble.evaluation.intervals import Interval, bootstrap_mean, wilson_interval
from nybble.evaluation.questions import ChoiceQuestion, OpenQuestion, Questions
from nybble.evaluation.scores import exact_match, rouge_l
from nybble.models.device import compute_device
from nybble.models.generate import stop_token_ids
from nybble.models.generate_batch import generate_batch
from nybble.models.likelihood import target_likelihoods
from nybble.models.loss import CausalLMLoss

BATCH_SIZE = 16
MAX_NEW_TOKENS = 128

EXACT_MATCH, ROUGE_L = "exact match", "ROUGE-L"
ACCURACY, ACCURACY_BY_LENGTH = "accuracy", "accuracy by length"

_Done = Callable[[int], None]


@dataclass(frozen=True)
class Answer:
    """What the model said to the question at `where`, and its scores by name, each from 0 to 1.

    Of a choice: the likeliest one, and the scores `accuracy` (its tokens' log-probabilities summed) and
    `accuracy by length` (their sum over the choice's characters).
    """

    where: str
    question: str
    expected: tuple[str, ...]
    given: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Score:
    """The mean of one score over the questions that have it. Higher is better."""

    name: str
    value: float
    interval: Interval
    questions: int


@dataclass(frozen=True)
class Answers:
    """In the order of the questions, open ones first. generated_tokens: without those of choices."""

    answers: tuple[Answer, ...]
    generated_tokens: int
    seconds: float

    @property
    def scores(self) -> tuple[Score, ...]:
        names = dict.fromkeys(name for answer in self.answers for name in answer.scores)
        return tuple(self._score(name) for name in names)

    def figures(self) -> dict[str, Any]:
        """As JSON values, without the answers."""
        scores = {
            score.name: {
                "value": score.value,
                "interval": [score.interval.low, score.interval.high],
                "level": score.interval.level,
                "how": score.interval.how,
                "questions": score.questions,
            }
            for score in self.scores
        }
        return {"scores": scores, "generated_tokens": self.generated_tokens, "seconds": self.seconds}

    def _score(self, name: str) -> Score:
        values = [answer.scores[name] for answer in self.answers if name in answer.scores]
        right = sum(values)
        all_or_nothing = all(value in (0.0, 1.0) for value in values)
        interval = wilson_interval(int(right), len(values)) if all_or_nothing else bootstrap_mean(values)
        return Score(name, right / len(values), interval, len(values))


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    *,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    done: _Done = lambda _: None,
) -> Answers:
    """Every question's answer: the likeliest tokens for open ones, the likeliest choice for the others.

    The model may be dense or quantized, with adapters or without. Leaves its mode and the randomness as they were.
    done: told how many questions were finished, time after time.
    """
    started = time.perf_counter()
    stops = stop_token_ids(model, tokenizer, questions.chat_template)

    def generate(asked: list[OpenQuestion]) -> list[list[int]]:
        prompts = [question.tokens for question in asked]
        return generate_batch(model, prompts, max_new_tokens=max_new_tokens, stops=stops)

    said = in_batches(
        questions.open, generate, length=lambda question: len(question.tokens), batch_size=batch_size, done=done
    )
    texts = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in said]
    answers = [_scored(question, text.strip()) for question, text in zip(questions.open, texts, strict=True)]
    answers += _choose(model, questions.choice, batch_size, done)
    return Answers(tuple(answers), sum(map(len, said)), time.perf_counter() - started)


def _scored(question: OpenQuestion, given: str) -> Answer:
    scores = {EXACT_MATCH: exact_match(given, question.expected), ROUGE_L: rouge_l(given, question.expected)}
    return Answer(question.where, question.text, question.expected, given, scores)


def _choose(model: PreTrainedModel, questions: Sequence[ChoiceQuestion], batch_size: int, done: _Done) -> list[Answer]:
    if not questions:
        return []
    candidates = [candidate for question in questions for candidate in question.candidates]
    waiting = iter(_log_probabilities(model, candidates, batch_size))
    answers = []
    for question in questions:
        sums = [next(waiting) for _ in question.choices]
        by_length = [total / len(choice) for total, choice in zip(sums, question.choices, strict=True)]
        chosen = _likeliest(sums)
        scores = {
            ACCURACY: float(chosen == question.right),
            ACCURACY_BY_LENGTH: float(_likeliest(by_length) == question.right),
        }
        expected = (question.choices[question.right],)
        answers.append(Answer(question.where, question.text, expected, question.choices[chosen], scores))
        done(1)
    return answers


def _log_probabilities(model: PreTrainedModel, candidates: Sequence[Example], batch_size: int) -> list[float]:
    """Of each sequence's target tokens, summed."""
    loss, device = CausalLMLoss(model), compute_device(model)

    def run(examples: list[Example]) -> list[float]:
        batch = collate(examples).to(device)
        found = target_likelihoods(loss, batch.input_ids, batch.labels, batch.position_ids)
        return [likelihood.log_probability for likelihood in found]

    return in_batches(candidates, run, length=len, batch_size=batch_size)


def _likeliest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
