"""The same training steps by nybble and by PEFT (with bitsandbytes for QLoRA), as generators of the same records.

Both adapt all seven linears of each block, hold the adapter in fp32, multiply in bf16, use AdamW at a constant rate
and clip at norm 1. nybble's steps are those of `nybble train`: the same loader, injection, loss and loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Work:
    """What one process trains: `windows` (steps, batch, seq_len) of token ids, all of them targets."""

    model: str
    method: str  # lora | qlora
    windows: Tensor
    rank: int = 16
    lora_alpha: float = 32
    learning_rate: float = 1e-4
    checkpointing: bool = True
    adapter: str | None = None  # folder of the initial adapter; otherwise a fresh one


@dataclass(frozen=True)
class Record:
    loss: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class Loaded:
    """A stack that is ready to step, and what it took to get there."""

    steps: Iterator[Record]
    load_seconds: float
    resident_bytes: int
    trainable: int


def nybble_stack(work: Work) -> Loaded:
    from nybble.adapters.inject import inject
    from nybble.adapters.io import load_adapter
    from nybble.config import RunConfig
    from nybble.data.collate import Batch
    from nybble.models.dtypes import resolve_device
    from nybble.models.load import load_model
    from nybble.models.loss import CausalLMLoss
    from nybble.optim.adamw import build_optimizer
    from nybble.train.activation_checkpointing import enable_activation_checkpointing
    from nybble.train.loop import training_steps

    started = time.perf_counter()
    device = resolve_device()
    config = RunConfig.read(
        None,
        {
            "method": work.method,
            "output": "unused",
            "model.name": work.model,
            "data.path": "unused",
            "lora.r": work.rank,
            "lora.lora_alpha": work.lora_alpha,
            "optim.learning_rate": work.learning_rate,
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
        },
    )
    storage = {"lora": "bf16", "qlora": "nf4"}[work.method]
    model = load_model(config.model, device=device, storage=storage).model
    if work.adapter:
        load_adapter(model, Path(work.adapter), trainable=True)
    else:
        inject(model, config.lora)
    if work.checkpointing:
        enable_activation_checkpointing(model)
    resident = _allocated()
    load_seconds = time.perf_counter() - started
    loss_module = CausalLMLoss(model)
    optimizer = build_optimizer(loss_module, config.optim)

    def micro_batches() -> Iterator[Batch]:
        for window in work.windows:
            positions = torch.arange(window.shape[1]).expand_as(window)
            yield Batch(window, window, positions, window.shape[0] * (window.shape[1] - 1))

    def steps() -> Iterator[Record]:
        results = training_steps(loss_module, micro_batches(), optimizer, config, total_steps=len(work.windows))
        while True:
            began = time.perf_counter()
            result = next(results, None)
            if result is None:
                return
            _synchronize()
            yield Record(result.loss, result.grad_norm, time.perf_counter() - began)

    return Loaded(steps(), load_seconds, resident, _trainable(model))


def peft_stack(work: Work) -> Loaded:
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    started = time.perf_counter()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        work.model,
        dtype=torch.bfloat16,
        quantization_config=quantization if work.method == "qlora" else None,
        device_map={"": 0},
        attn_implementation="sdpa",
    )
    reentrant = {"use_reentrant": False}
    if work.method == "qlora":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=work.checkpointing, gradient_checkpointing_kwargs=reentrant
        )
    elif work.checkpointing:
        model.gradient_checkpointing_enable(reentrant)
        model.enable_input_require_grads()
    if work.adapter:
        model = PeftModel.from_pretrained(model, work.adapter, is_trainable=True)
    else:
        settings = LoraConfig(
            r=work.rank, lora_alpha=work.lora_alpha, target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.0
        )
        model = get_peft_model(model, settings)
    model.config.use_cache = False
    model.train()
    resident = _allocated()
    load_seconds = time.perf_counter() - started
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=work.learning_rate, weight_decay=0.0, fused=True)

    def steps() -> Iterator[Record]:
        for window in work.windows:
            began = time.perf_counter()
            batch = window.to("cuda", non_blocking=True)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            figures = loss.item(), norm.item()
            _synchronize()
            yield Record(*figures, time.perf_counter() - began)

    return Loaded(steps(), load_seconds, resident, _trainable(model))


STACKS = {"nybble": nybble_stack, "peft": peft_stack}


def _trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
