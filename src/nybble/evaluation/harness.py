"""Tasks of lm-evaluation-harness (the package lm-eval) on a model that is loaded here.

The harness reads the task's data, writes the prompts and counts; it asks a model for three things, which
`HarnessModel` gives: the likelihood of given words, that of whole documents, and greedy answers.
This module is imported only when tasks are asked for, as lm-eval is an extra: `pip install 'nybble[eval]'`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.data.example import Example, single
from nybble.errors import UserError
from nybble.evaluation.ask import generate_texts, likelihoods, text_of
from nybble.evaluation.progress import counted
from nybble.models.generate import max_positions
from nybble.models.likelihood import Likelihood
from nybble.models.loss import CausalLMLoss

DEFAULT_MAX_NEW_TOKENS = 256  # the harness's own, for tasks that name none
LONGEST_KNOWN = 2**20  # tokens; beyond it, a limit means that there is none

_MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # what tasks call it

_Tokens = list[int]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What the harness takes for a model. Prompts that are too long lose their beginning, as is the harness's rule."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, progress: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.progress = progress
        # The harness lets a window predict one token that it does not read; here it is read as well.
        self.max_length = min(max_positions(model), tokenizer.model_max_length, LONGEST_KNOWN) - 1
        self._loss = CausalLMLoss(model)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> _Tokens:
        """Without a BOS where the text, written by a chat template, has one already."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False).input_ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance], **_: Any) -> list[float]:
        """Of each whole text, in windows of the model's length, each token predicted once."""
        windows: list[tuple[_Tokens, _Tokens]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            own = list(map(make_disjoint_window, rolling))
            counts.append(len(own))
            windows += own
        found = iter(self._likelihoods(windows, "texts"))
        return [sum(next(found).log_probability for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance], **_: Any) -> list[str]:
        """Greedy answers, each up to the first of its request's stop texts, or to the tokens that it allows."""
        wanted: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for index, (_, options) in enumerate(request.args for request in requests):
            wanted.setdefault(_limits(options), []).append(index)
        answers = [""] * len(requests)
        with counted("answers", len(requests), progress=self.progress) as done:
            for (until, most), indices in wanted.items():
                contexts = [requests[index].args[0] for index in indices]
                for index, answer in zip(indices, self._answers(contexts, until, most, done), strict=True):
                    answers[index] = answer
                    self.cache_hook.add_partial("generate_until", requests[index].args, answer)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], _Tokens, _Tokens]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = self._likelihoods([(context, said) for _, context, said in requests], "likelihoods")
        return [(likelihood.log_probability, likelihood.greedy) for likelihood in found]

    def _likelihoods(self, pairs: Sequence[tuple[_Tokens, _Tokens]], what: str) -> list[Likelihood]:
        examples = [_example(context, said, self.max_length + 1) for context, said in pairs]
        with counted(what, len(examples), progress=self.progress) as done:
            return likelihoods(self._loss, examples, batch_size=self.batch_size, done=done)

    def _answers(
        self, contexts: Sequence[str], until: tuple[str, ...], most: int, done: Callable[[int], None]
    ) -> list[str]:
        room = self.max_length - most
        if room <= 0:
            raise UserError(f"asks for {most} tokens, the model reads {self.max_length}", where="--tasks")
        said = generate_texts(
            self.model,
            self.tokenizer,
            [self.tok_encode(context)[-room:] for context in contexts],
            chat_template=None,
            max_new_tokens=most,
            batch_size=self.batch_size,
            ended=lambda tokens: self._stopped(tokens, until),
            done=done,
        )
        return [_before(answer.text, until) for answer in said]

    def _stopped(self, tokens: _Tokens, until: tuple[str, ...]) -> bool:
        # A stop text of n bytes lies within the last n tokens once its last one has come.
        recent = max((len(text.encode()) for text in until), default=0)
        tail = text_of(self.tokenizer, tokens[-recent - 1 :]) if recent else ""
        return any(text in tail for text in until)


def _example(context: _Tokens, said: _Tokens, longest: int) -> Example:
    """The end of both together, of which `said` is predicted."""
    tokens = torch.tensor((context + said)[-longest:], dtype=torch.int32)
    return single(tokens, torch.arange(len(tokens)) >= len(tokens) - len(said), 0)


def _limits(options: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """The stop texts and the number of tokens of a request's generation options."""
    temperature = options.get("temperature")
    if options.get("do_sample", bool(temperature)) and temperature != 0:
        raise UserError("the task draws tokens at random; answers are greedy here", where="--tasks")
    until = options.get("until") or ()
    most = next((options[name] for name in _MOST_TOKENS if options.get(name)), DEFAULT_MAX_NEW_TOKENS)
    return ((until,) if isinstance(until, str) else tuple(until)), int(most)


def _before(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.partition(stop)[0] if stop else text
    return text
