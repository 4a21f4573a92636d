"""An adapter trained by nybble, served by Transformers and PEFT alone: nothing here imports nybble.

pip install peft
python examples/serve_with_peft.py MODEL runs/demo/lora/adapter "What does Python's json.loads do?"
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_name: str, adapter: str, question: str, max_new_tokens: int = 60) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype).to(device)
    model = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)  # the chat template that it was trained with

    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt.to(device), max_new_tokens=max_new_tokens, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(answer)


if __name__ == "__main__":
    print(main(*sys.argv[1:4]))
