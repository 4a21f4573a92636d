# ruff: noqa: E501 - templates keep their lines
"""Chat templates of the families that differ in how turns begin, end and change later on."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer

# SmolLM2-Instruct's, word for word: a default system message, ChatML.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_MARKED_TURN = "{{ '<|im_start|>assistant\n' }}{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration -%}{{ '\n' }}"
CHATML_MARKED = CHATML.replace(
    "{{'<|im_start|>' + message['role']",
    "{% if message['role'] == 'assistant' %}" + _MARKED_TURN + "{% else %}{{'<|im_start|>' + message['role']",
).replace("{% endfor %}", "{% endif %}{% endfor %}")

# Marks that leave the end token out, as many hand-written ones do.
CHATML_MARKED_SHORT = CHATML_MARKED.replace(
    "message['content'] + '<|im_end|>' }}{%- endgeneration -%}{{ '\n' }}",
    "message['content'] }}{%- endgeneration -%}{{ '<|im_end|>\n' }}",
)

# BOS comes from the template; content is stripped; no line break behind the end token.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# The system message goes into the first user turn; roles must alternate; no generation prompt.
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)

# As some versions of Mistral's do: the system message goes into the *last* user turn, so earlier turns change.
MISTRAL_LAST = MISTRAL.replace(
    "system if loop.first", "system if message is sameas (rest | selectattr('role', 'eq', 'user') | list | last)"
)

# Closes a finished conversation with a second end token.
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Reasoning is kept only behind the last question; the last answer always has a <think> block.
QWEN3 = (
    "{%- set state = namespace(question=0) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set state.question = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{%- set answer = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in message.content else '' %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > state.question and (loop.last or thought) %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- answer + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

# Qwen3 with marks around all that the assistant writes.
QWEN3_MARKED = QWEN3.replace(
    "{{- '<|im_start|>assistant\n' }}{%- if loop", "{{- '<|im_start|>assistant\n' }}{% generation %}{%- if loop"
).replace("{{- answer + '<|im_end|>\n' }}", "{{- answer + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}")

# The generation prompt opens a <think> block that finished answers do not have (DeepSeek-R1's distillations).
R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}"
    "{% else %}{{ '<|Assistant|>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)

# Plain words without any special token.
WORDS = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)

# Tools are declared in the system turn, calls are JSON in the assistant's turn (Qwen2.5's way).
TOOLS = (
    "{{- '<|im_start|>system\n' }}{%- if tools %}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- if message.tool_calls %}{%- for call in message.tool_calls %}"
    "{{- '<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson + '</tool_call>' }}"
    "{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

# The mark begins with what already closed the tool's result before there was an answer (as in DeepSeek-R1's).
MARKED_FROM_TOOL = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
    "{{ '</tool>' if loop.index0 and messages[loop.index0 - 1].role == 'tool' else '' }}"
    "{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message.content + '\n' }}{% endif %}{% endfor %}"
    "{% if messages[-1].role == 'tool' %}{{ '</tool>' }}{% endif %}"
)

_SPECIAL = [
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|User|>",
    "<|Assistant|>",
    "</s>",
    "[INST]",
    "[/INST]",
]


def tokenizer_with(template: str | None, **options: Any) -> PreTrainedTokenizerFast:
    """The tests' BPE with a template, and with the special tokens of all of them."""
    tokenizer = tiny_tokenizer(**options)
    tokenizer.add_special_tokens({"extra_special_tokens": _SPECIAL})
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template = template
    return tokenizer
