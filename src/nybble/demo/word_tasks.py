"""A task with exact answers: lists of words and numbers to be sorted, counted, reversed and added, from a seed.

Every answer is right or wrong, so exact match measures it; no two splits share a question; any number of rows can be
made, the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from nybble.demo.splits import Row, Splits

_WORDS = (
    "apple arrow autumn bread bridge bottle cloud candle copper daisy desert dragon engine elbow eagle forest feather "
    "finger garden glass guitar hammer harbor honey island iron ivory jacket jungle jewel kettle kitchen king ladder "
    "lemon lion meadow mirror monkey needle night number ocean orange oven pencil planet pocket quarter queen quilt "
    "river ribbon rocket silver shadow spider table tiger tunnel uncle umbrella unit valley velvet violin window "
    "winter wagon yellow yard yogurt zebra zipper"
)

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_FROM_TWENTY = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS, _ONES, _TENS = (tuple(text.split()) for text in (_WORDS, _BELOW_TWENTY, _FROM_TWENTY))


@dataclass(frozen=True)
class WordTask:
    kind: str
    question: str
    answer: str

    def row(self) -> Row:
        """In the `messages` format."""
        turns = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]
        return {"messages": turns, "kind": self.kind}


def word_tasks(train: int = 4000, validation: int = 200, test: int = 500, *, seed: int = 0) -> Splits:
    """So many rows of each split, all kinds of questions in turn. The test rows of a seed do not depend on the others'.

    A training row whose question is held out is replaced by another.
    """
    seen: set[str] = set()
    held_out = [_distinct(count, f"{seed} {name}", seen) for name, count in (("test", test), ("valid", validation))]
    return Splits(_distinct(train, f"{seed} train", seen), held_out[1], held_out[0])


def in_words(number: int) -> str:
    """0 to 199: "forty-two"."""
    if number >= 100:
        rest = f" and {in_words(number - 100)}" if number > 100 else ""
        return f"one hundred{rest}"
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


def _distinct(count: int, seed: str, seen: set[str]) -> list[Row]:
    draw = random.Random(seed)
    rows: list[Row] = []
    while len(rows) < count:
        kind = list(KINDS)[len(rows) % len(KINDS)]
        question, answer = KINDS[kind](draw)
        if question not in seen:
            seen.add(question)
            rows.append(WordTask(kind, question, answer).row())
    return rows


def _listed(words: list[str]) -> str:
    return ", ".join(words)


def _words(draw: random.Random, fewest: int = 3, most: int = 6) -> list[str]:
    return draw.sample(WORDS, draw.randint(fewest, most))


def _sort(draw: random.Random) -> tuple[str, str]:
    words = _words(draw, most=5)
    return f"Put these words in alphabetical order: {_listed(words)}.", _listed(sorted(words))


def _reverse(draw: random.Random) -> tuple[str, str]:
    words = _words(draw)
    return f"Say these words in reverse order: {_listed(words)}.", _listed(words[::-1])


def _pick(draw: random.Random) -> tuple[str, str]:
    words = _words(draw)
    at = draw.randrange(len(words))
    return f"What is the {ORDINALS[at]} word of this list: {_listed(words)}?", words[at]


def _leave_out(draw: random.Random) -> tuple[str, str]:
    words = _words(draw)
    word = draw.choice(words)
    return f"Leave out {word} from this list: {_listed(words)}.", _listed([other for other in words if other != word])


def _count(draw: random.Random) -> tuple[str, str]:
    letter = draw.choice(WORDS)[0]
    own = draw.sample([word for word in WORDS if word[0] == letter], draw.randint(1, 2))
    words = own + draw.sample([word for word in WORDS if word[0] != letter], draw.randint(1, 4))
    draw.shuffle(words)
    return f"How many of these words begin with {letter}: {_listed(words)}?", in_words(len(own))


def _largest(draw: random.Random) -> tuple[str, str]:
    numbers = draw.sample(range(10, 100), draw.randint(3, 5))
    return f"Which of these numbers is the largest: {_listed(list(map(str, numbers)))}?", str(max(numbers))


def _add(draw: random.Random) -> tuple[str, str]:
    one, other = draw.randint(2, 99), draw.randint(2, 99)
    return f"What is {in_words(one)} plus {in_words(other)}?", in_words(one + other)


def _subtract(draw: random.Random) -> tuple[str, str]:
    one, other = sorted(draw.sample(range(1, 100), 2), reverse=True)
    return f"What is {in_words(one)} minus {in_words(other)}?", in_words(one - other)


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "sort": _sort,
    "reverse": _reverse,
    "pick": _pick,
    "leave out": _leave_out,
    "count": _count,
    "largest": _largest,
    "add": _add,
    "subtract": _subtract,
}
