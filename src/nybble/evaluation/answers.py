"""Ask a loaded model questions, and score what it says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.evaluation.ask import BATCH_SIZE, generate_texts, likelihoods
from nybble.evaluation.questions import ChoiceQuestion, OpenQuestion, Questions
from nybble.evaluation.scores import Score, answer_scores
from nybble.models.loss import CausalLMLoss

MAX_NEW_TOKENS = 128

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
class Answers:
    """In the order of the questions, open ones first. generated_tokens: without those of choices."""

    answers: tuple[Answer, ...]
    generated_tokens: int
    seconds: float

    @property
    def scores(self) -> tuple[Score, ...]:
        names = dict.fromkeys(name for answer in self.answers for name in answer.scores)
        return tuple(
            Score.over_questions(name, [answer.scores[name] for answer in self.answers if name in answer.scores])
            for name in names
        )

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
    said = generate_texts(
        model,
        tokenizer,
        [question.tokens for question in questions.open],
        chat_template=questions.chat_template,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        done=done,
    )
    answers = [_scored(question, answer.text.strip()) for question, answer in zip(questions.open, said, strict=True)]
    answers += _choose(model, questions.choice, batch_size, done)
    generated = sum(answer.num_tokens for answer in said)
    return Answers(tuple(answers), generated, time.perf_counter() - started)


def _scored(question: OpenQuestion, given: str) -> Answer:
    scores = answer_scores(given, question.expected)
    return Answer(question.where, question.text, question.expected, given, scores)


def _choose(model: PreTrainedModel, questions: Sequence[ChoiceQuestion], batch_size: int, done: _Done) -> list[Answer]:
    if not questions:
        return []
    candidates = [candidate for question in questions for candidate in question.candidates]
    waiting = iter(likelihoods(CausalLMLoss(model), candidates, batch_size=batch_size))
    answers = []
    for question in questions:
        sums = [next(waiting).log_probability for _ in question.choices]
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


def _likeliest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
