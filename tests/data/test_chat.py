"""Which characters, and then tokens, carry loss: exactly what the assistant says, and the token that ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from nybble.data.chat import Renderer
from nybble.data.encode import Encoded, Encoder, overlap
from nybble.data.formats import Chat, Plain, RowError, Sample
from nybble.data.preview import trained_runs
from nybble.data.turns import common_prefix
from nybble.errors import UserError
from tests.data import templates
from tests.data.templates import tokenizer_with

TWO_TURNS = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "I am well, thank you.\nAnd you ☃?"},
    {"role": "user", "content": "I am well, thank you."},
    {"role": "assistant", "content": "The weather is fine.  "},
]
ANSWERS = [TWO_TURNS[1]["content"], TWO_TURNS[3]["content"]]
SYSTEM = {"role": "system", "content": "Be quick."}


def encode(tokenizer: PreTrainedTokenizerFast, sample: Sample, max_length: int = 500, **options: Any) -> list[Encoded]:
    rendered = Renderer(tokenizer, **options).render(sample)
    return list(Encoder(tokenizer, max_length).encode([(0, text) for text in rendered]))


def chat(messages: list[dict[str, Any]], **options: Any) -> Sample:
    return Sample("messages", chat=Chat(messages, **options))


def trained_texts(tokenizer: PreTrainedTokenizerFast, encoded: list[Encoded]) -> list[list[str]]:
    return [[tokenizer.decode(ids) for trained, ids in trained_runs(sample.example) if trained] for sample in encoded]


ONE_RENDERING = {
    "chatml": (templates.CHATML, "{}<|im_end|>"),
    "chatml with marks": (templates.CHATML_MARKED, "{}<|im_end|>"),
    "marks without the end token": (templates.CHATML_MARKED_SHORT, "{}<|im_end|>"),
    "mistral": (templates.MISTRAL, " {}<|im_end|>"),
}


@pytest.mark.parametrize("name", ONE_RENDERING)
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
def test_loss_is_on_each_answer_and_its_end_token(name: str, system: list[dict[str, str]]) -> None:
    template, form = ONE_RENDERING[name]
    tokenizer = tokenizer_with(template)
    encoded = encode(tokenizer, chat([*system, *TWO_TURNS]))
    assert trained_texts(tokenizer, encoded) == [[form.format(answer) for answer in ANSWERS]]
    whole = tokenizer.apply_chat_template([*system, *TWO_TURNS], return_dict=True)["input_ids"]
    assert encoded[0].example.input_ids.tolist() == whole  # the tokens are those of inference
    assert encoded[0].ends


def test_llama3_strips_answers_and_has_one_bos_from_the_template() -> None:
    tokenizer = tokenizer_with(templates.LLAMA3, add_bos=True)
    (encoded,) = encode(tokenizer, chat([SYSTEM, *TWO_TURNS]))
    assert trained_texts(tokenizer, [encoded]) == [[f"{answer.strip()}<|eot_id|>" for answer in ANSWERS]]
    assert encoded.leading_bos == 1
    assert encoded.example.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert encoded.ends  # <|eot_id|>, though the tokenizer's EOS is another


def test_phi3_keeps_one_rendering_though_it_closes_conversations_with_another_token() -> None:
    tokenizer = tokenizer_with(templates.PHI3)
    encoded = encode(tokenizer, chat(TWO_TURNS))
    assert trained_texts(tokenizer, encoded) == [
        [f"{ANSWERS[0]}<|end|>", f"{ANSWERS[1]}<|end|>\n<|im_end|>"],
    ]


def test_a_template_without_end_tokens_gets_eos_behind_the_last_answer() -> None:
    tokenizer = tokenizer_with(templates.WORDS)
    (encoded,) = encode(tokenizer, chat(TWO_TURNS[:2]))
    # " I" is one token, and begins in the prompt.
    assert trained_texts(tokenizer, [encoded]) == [[f" {ANSWERS[0]}\n\n<|im_end|>"]]
    assert encoded.ends


def test_marks_and_prefix_differences_agree() -> None:
    conversation = [SYSTEM, *TWO_TURNS, {"role": "user", "content": "Bye"}]
    by_marks, by_prefix = (
        encode(tokenizer_with(template), chat(conversation))[0].example
        for template in (templates.CHATML_MARKED, templates.CHATML)
    )
    assert torch.equal(by_marks.trained[: len(by_prefix)], by_prefix.trained)
    assert torch.equal(by_marks.input_ids, by_prefix.input_ids)


@pytest.mark.parametrize("template", [templates.QWEN3, templates.QWEN3_MARKED], ids=["prefixes", "marks"])
def test_turns_whose_reasoning_is_dropped_later_are_trained_where_they_still_have_it(template: str) -> None:
    tokenizer = tokenizer_with(template)
    conversation = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "<think>\nfirst\n</think>\n\none"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "<think>\nsecond\n</think>\n\ntwo"},
    ]
    encoded = encode(tokenizer, chat(conversation))
    assert trained_texts(tokenizer, encoded) == [
        ["<think>\nfirst\n</think>\n\none<|im_end|>"],
        ["<think>\nsecond\n</think>\n\ntwo<|im_end|>"],
    ]
    last = tokenizer.decode(encoded[1].example.input_ids)
    assert "first" not in last
    assert "assistant\none<|im_end|>" in last  # the context is that of inference


def test_steps_of_one_answer_share_a_rendering_and_earlier_answers_have_their_own() -> None:
    tokenizer = tokenizer_with(templates.QWEN3)
    conversation = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "<think>\na\n</think>\n\none"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "<think>\nb\n</think>\n\nlook"},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "<think>\nc\n</think>\n\ntwo"},
    ]
    texts = trained_texts(tokenizer, encode(tokenizer, chat(conversation)))
    assert [[text.partition("<|im_end|>")[0][-4:].strip() for text in sample] for sample in texts] == [
        ["one"],
        ["look", "two"],
    ]


def test_a_system_message_that_wanders_to_the_last_question_splits_the_turns() -> None:
    tokenizer = tokenizer_with(templates.MISTRAL_LAST)
    encoded = encode(tokenizer, chat([SYSTEM, *TWO_TURNS]))
    assert trained_texts(tokenizer, encoded) == [[f" {answer}<|im_end|>"] for answer in ANSWERS]


def test_a_generation_prompt_that_opens_a_block_does_not_hide_the_answer() -> None:
    tokenizer = tokenizer_with(templates.R1)
    conversation = [TWO_TURNS[0], {"role": "assistant", "content": "<thanks> I am well"}, *TWO_TURNS[2:]]
    encoded = encode(tokenizer, chat(conversation))
    assert trained_texts(tokenizer, encoded) == [["<thanks> I am well<|im_end|>", f"{ANSWERS[1]}<|im_end|>"]]


def test_tool_calls_are_trained_and_tools_and_their_results_are_not() -> None:
    tokenizer = tokenizer_with(templates.TOOLS)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"first": 1}}}
    conversation = [
        {"role": "user", "content": "sum?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "It is 1."},
    ]
    (encoded,) = encode(tokenizer, chat(conversation, tools=tools))
    assert trained_texts(tokenizer, [encoded]) == [
        ['<tool_call>add {"first": 1}</tool_call><|im_end|>', "It is 1.<|im_end|>"]
    ]
    assert '"name": "add"' in tokenizer.decode(encoded.example.input_ids)


def test_marks_may_begin_before_the_generation_prompt_ends() -> None:
    tokenizer = tokenizer_with(templates.MARKED_FROM_TOOL)
    conversation = [*TWO_TURNS[:2], {"role": "tool", "content": "found"}, TWO_TURNS[3]]
    encoded = encode(tokenizer, chat(conversation))
    assert trained_texts(tokenizer, encoded) == [[f"{ANSWERS[0]}<|im_end|>", f"</tool>{ANSWERS[1]}<|im_end|>"]]


def test_turns_with_weight_zero_and_turns_of_the_prompt_carry_no_loss() -> None:
    tokenizer = tokenizer_with(templates.CHATML)
    weighted = [TWO_TURNS[0], TWO_TURNS[1] | {"weight": 0}, *TWO_TURNS[2:]]
    expected = [[f"{ANSWERS[1]}<|im_end|>"]]
    assert trained_texts(tokenizer, encode(tokenizer, chat(weighted))) == expected
    assert trained_texts(tokenizer, encode(tokenizer, chat(TWO_TURNS, first_trained=3))) == expected


def test_a_question_behind_the_last_answer_is_left_out() -> None:
    tokenizer = tokenizer_with(templates.CHATML)
    (encoded,) = encode(tokenizer, chat(TWO_TURNS[:3]))
    assert tokenizer.decode(encoded.example.input_ids).endswith(f"{ANSWERS[0]}<|im_end|>\n")


def test_train_on_all_trains_every_token_but_the_first_up_to_the_end() -> None:
    tokenizer = tokenizer_with(templates.CHATML)
    (encoded,) = encode(tokenizer, chat(TWO_TURNS), train_on="all")
    assert encoded.example.target_tokens == len(encoded.example) - 2  # nor the line feed behind the last end token
    assert encoded.ends
    (plain,) = encode(tokenizer, Sample("prompt/completion", plain=Plain("How are", " you?")), train_on="all")
    assert trained_texts(tokenizer, [plain]) == [[" are you?<|im_end|>"]]  # "How" is the first token


def test_a_tokenizer_with_two_templates_chooses_the_one_for_tools() -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = {"default": templates.CHATML, "tool_use": templates.TOOLS}
    renderer = Renderer(tokenizer)
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert '"name": "add"' in renderer.render(chat(TWO_TURNS, tools=tools))[0].text
    assert "named SmolLM" in renderer.render(chat(TWO_TURNS))[0].text


def test_prompt_and_completion_without_a_template_have_one_bos_and_a_trained_eos() -> None:
    tokenizer = tokenizer_with(None, add_bos=True)
    plain = Sample("prompt/completion", plain=Plain("How are", " you?"))
    (encoded,) = encode(tokenizer, plain)
    assert tokenizer.decode(encoded.example.input_ids) == "<|bos|>How are you?<|im_end|>"
    assert trained_texts(tokenizer, [encoded]) == [[" you?<|im_end|>"]]
    assert encoded.leading_bos == 1
    (again,) = encode(tokenizer, Sample("text", plain=Plain("", "<|bos|>already here<|im_end|>")))
    assert tokenizer.decode(again.example.input_ids) == "<|bos|>already here<|im_end|>"


def test_a_token_across_the_border_of_prompt_and_completion_is_trained() -> None:
    offsets = torch.tensor([[0, 3], [3, 8], [8, 9], [9, 9]])
    assert overlap(offsets, [(4, 9)]).tolist() == [False, True, True, False]
    tokenizer = tokenizer_with(None)
    # " you" is one token: were it not trained, a completion of one word would train nothing.
    (encoded,) = encode(tokenizer, Sample("prompt/completion", plain=Plain("How are ", "you")))
    assert trained_texts(tokenizer, [encoded]) == [[" you<|im_end|>"]]


def test_plain_rendering_can_be_asked_for_where_there_is_a_template() -> None:
    tokenizer = tokenizer_with(templates.CHATML)
    sample = Sample("prompt/completion", chat=Chat(TWO_TURNS[:2]), plain=Plain("How", " are"))
    (encoded,) = encode(tokenizer, sample, use_chat_template=False)
    assert tokenizer.decode(encoded.example.input_ids) == "How are<|im_end|>"


def test_a_template_file_replaces_the_tokenizers(tmp_path: Path) -> None:
    file = tmp_path / "words.jinja"
    file.write_text(templates.WORDS)
    tokenizer = tokenizer_with(templates.CHATML)
    renderer = Renderer(tokenizer, template_file=str(file))
    assert renderer.template == templates.WORDS
    assert renderer.render(chat(TWO_TURNS[:2]))[0].text.startswith("USER: How are you?")


def test_rows_that_cannot_be_rendered_or_aligned_say_why() -> None:
    tokenizer = tokenizer_with(templates.MISTRAL)
    with pytest.raises(RowError, match="roles must alternate"):
        encode(tokenizer, chat([TWO_TURNS[0], TWO_TURNS[0], TWO_TURNS[1]]))
    with pytest.raises(RowError, match="no assistant turn"):
        encode(tokenizer, chat([TWO_TURNS[0]]))
    counts = (
        "{{ messages | length }}"
        + templates.CHATML
        + "{% if not add_generation_prompt %}{{ messages[-1].content }}{% endif %}"
    )
    shifting = counts.replace("messages | length", "messages[-1].content | length")
    with pytest.raises(RowError, match="message 1"):
        encode(tokenizer_with(shifting), chat(TWO_TURNS[:2]))
    silent = "{% for message in messages if message.role != 'assistant' %}{{ message.content }}{% endfor %}"
    with pytest.raises(RowError, match="leaves the answer out"):
        encode(tokenizer_with(silent), chat(TWO_TURNS[:2]))
    wordless = templates.CHATML.replace(
        "message['content']", "('' if message['role'] == 'assistant' else message['content'])"
    )
    with pytest.raises(RowError, match="leaves the answer out"):
        encode(tokenizer_with(wordless), chat(TWO_TURNS[:2]))


def test_tool_calls_that_a_template_leaves_out_are_refused() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    calling = [TWO_TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(RowError, match="loses a call of 'add' in message 1"):
        encode(tokenizer_with(templates.CHATML), chat(calling))


def test_answers_that_a_template_alters_are_counted() -> None:
    conversation = [TWO_TURNS[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\none"}, *TWO_TURNS[2:]]

    def altered(template: str) -> list[int]:
        rendered = Renderer(tokenizer_with(template)).render(chat(conversation))
        return [text.altered for text in rendered]

    assert altered(templates.R1) == [1]  # drops reasoning everywhere
    assert altered(templates.QWEN3) == [0, 0]  # and only where the model would not see it any more
    assert altered(templates.LLAMA3) == [0]  # white space does not count


def test_chats_without_any_template_are_refused_and_missing_template_files_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template") as caught:
        encode(tokenizer_with(None), chat(TWO_TURNS))
    assert caught.value.where == "data.chat_template"
    with pytest.raises(UserError, match="no such file"):
        Renderer(tokenizer_with(None), template_file=str(tmp_path / "none.jinja"))


def test_cutting_keeps_the_beginning_and_is_told() -> None:
    tokenizer = tokenizer_with(templates.CHATML)
    (whole,), (cut,) = (encode(tokenizer, chat(TWO_TURNS), max_length=length) for length in (500, 60))
    assert not whole.truncated
    assert cut.truncated
    assert torch.equal(cut.example.input_ids, whole.example.input_ids[:60])
    assert torch.equal(cut.example.trained, whole.example.trained[:60])


def test_common_prefix() -> None:
    assert [common_prefix("abc", "abd"), common_prefix("ab", "abc"), common_prefix("", "a")] == [2, 2, 0]
