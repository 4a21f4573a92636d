"""The same training steps by nybble and by its peers, as generators of the same records.

All adapt all seven linears of each block with adapters in fp32 over products in bf16, use AdamW at a constant rate, and
take a batch to the GPU, clip at norm 1 and zero the gradients within the step. nybble's steps are those of
`nybble train`, from the same functions: loading, injection, loss, optimizer and loop.

A stack is loaded once and can run several rows, each from fresh adapters and with an optimizer of its own.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Row:
    """What a step does, written like `qlora bf16 4 2048 keep` or, with 8-bit moments, `qlora bf16 1 2048 offload 8`."""

    method: str  # lora | qlora
    precision: str  # bf16 | fp8
    batch: int
    seq_len: int
    activations: str  # keep | recompute | offload
    state_bits: int = 32

    @classmethod
    def parse(cls, text: str) -> Row:
        method, precision, batch, seq_len, activations, *bits = text.split()
        row = cls(method, precision, int(batch), int(seq_len), activations, int(bits[0]) if bits else 32)
        known = (("lora", "qlora"), ("bf16", "fp8"), ("keep", "recompute", "offload"), (32, 8))
        given = (row.method, row.precision, row.activations, row.state_bits)
        if len(bits) > 1 or not all(value in values for value, values in zip(given, known, strict=True)):
            raise ValueError(f"{text!r} is not METHOD PRECISION BATCH SEQ ACTIVATIONS [STATE_BITS], like {EXAMPLE!r}")
        return row

    def __str__(self) -> str:
        words = [self.method, self.precision, self.batch, self.seq_len, self.activations]
        return " ".join(map(str, words if self.state_bits == 32 else [*words, self.state_bits]))

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len


EXAMPLE = "qlora bf16 4 2048 keep"


@dataclass(frozen=True)
class Adapter:
    """How the adapters start and learn. folder: of the initial adapter; otherwise a fresh one."""

    rank: int = 16
    lora_alpha: float = 32
    learning_rate: float = 1e-4
    folder: str | None = None


@dataclass(frozen=True)
class Record:
    """One step. Without the time between steps, in which nothing is left to do."""

    loss: float
    grad_norm: float
    seconds: float


class Stack(Protocol):
    """A loaded model. longest: the most tokens a sequence of the rows to come. notes: how a row's steps were done."""

    model: torch.nn.Module
    notes: list[str]

    def __init__(self, model: str, row: Row, adapter: Adapter, *, longest: int) -> None: ...

    def prepare(self, row: Row) -> None:
        """Start anew from the initial adapters: nothing is left of rows before."""

    def steps(self, row: Row, windows: Tensor) -> Iterator[Record]:
        """Train on `windows` (steps, batch, seq_len) of token ids, all of them targets."""


class Nybble:
    """The steps of `nybble train`. train: what differs from its defaults."""

    def __init__(
        self,
        model: str,
        row: Row,
        adapter: Adapter,
        *,
        longest: int,  # noqa: ARG002
        train: dict[str, Any] | None = None,
    ) -> None:
        from nybble.memory.budget import expand_segments
        from nybble.models.dtypes import resolve_device, resolve_storage
        from nybble.models.load import load_model

        expand_segments()
        self.name, self.adapter, self.train = model, adapter, train or {}
        config = self.config(row)
        storage = resolve_storage(config.model.storage, config.method)
        self.loaded = load_model(config.model, device=resolve_device(), storage=storage)
        self.model: torch.nn.Module = self.loaded.model
        self.notes: list[str] = []
        self.optimizer: torch.optim.Optimizer | None = None  # of the last row

    def config(self, row: Row) -> Any:
        from nybble.config import RunConfig

        settings = {
            "method": row.method,
            "output": "unused",
            "model.name": self.name,
            "data.path": "unused",
            "lora.r": self.adapter.rank,
            "lora.lora_alpha": self.adapter.lora_alpha,
            "optim.learning_rate": self.adapter.learning_rate,
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
            "optim.state_bits": row.state_bits,
            "train.precision": row.precision,
            "train.batch_size": row.batch,
            "memory.activations": row.activations,
            "memory.weights": "resident",
            "memory.embedding": "device",
            "memory.head": "device",
            "memory.moments": "resident",
        }
        return RunConfig.read(None, settings | self.train)

    def prepare(self, row: Row) -> None:
        from nybble.adapters.inject import adapter_slots
        from nybble.adapters.io import load_adapter
        from nybble.train.trainable import make_trainable

        self.optimizer = None
        for path, slot in list(adapter_slots(self.model)):
            self.model.set_submodule(path, slot.base)
        if self.adapter.folder:
            load_adapter(self.model, Path(self.adapter.folder), trainable=True)
        else:
            make_trainable(self.loaded, self.config(row))

    def steps(self, row: Row, windows: Tensor) -> Iterator[Record]:
        return self.steps_over(row, batches(windows), total=len(windows), samples_a_row=1)

    def steps_over(self, row: Row, micro_batches: Iterable[Any], *, total: int, samples_a_row: int) -> Iterator[Record]:
        from nybble.optim.adamw import build_optimizer
        from nybble.train.card import card_here
        from nybble.train.fuse import make_loss
        from nybble.train.loop import training_steps
        from nybble.train.plan import Rows, plan_run

        config, rows = self.config(row), Rows(row.seq_len, samples=samples_a_row)
        card = card_here(self.loaded.model.device)
        plan = plan_run(config, self.loaded.checkpoint.config, card, rows=rows, on_gpu=_GPU)
        loss, self.notes = make_loss(self.loaded, config, plan, samples_a_row=samples_a_row)
        self.optimizer = build_optimizer(loss, config.optim)
        graph = _GPU and config.train.cuda_graph and getattr(loss, "capturable", False)
        self.notes.append("a step is one CUDA graph" if graph else "kernels are launched one by one")
        results = training_steps(loss, micro_batches, self.optimizer, config, total_steps=total)
        while True:
            began = time.perf_counter()
            result = next(results, None)
            if result is None:
                return
            _synchronize()
            yield Record(result.loss, result.grad_norm, time.perf_counter() - began)
            self.notes += [result.note] if result.note else []


class NybbleEager(Nybble):
    """The fused kernels, launched one by one."""

    def __init__(self, model: str, row: Row, adapter: Adapter, *, longest: int) -> None:
        super().__init__(model, row, adapter, longest=longest, train={"train.cuda_graph": False})


class NybbleGeneric(Nybble):
    """Transformers' own modules around our linears, as for models without fused kernels."""

    def __init__(self, model: str, row: Row, adapter: Adapter, *, longest: int) -> None:
        super().__init__(model, row, adapter, longest=longest, train={"train.fused": False})


class _Peer:
    """A PEFT model in a plain loop, in the configuration nearest to the row."""

    def __init__(self, model: Any, adapter: Adapter) -> None:
        model.config.use_cache = False
        model.train()
        self.model, self.adapter = model, adapter
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.initial = [p.detach().to("cpu", copy=True) for p in self.trained]
        self.notes: list[str] = []

    def prepare(self, row: Row) -> None:  # noqa: ARG002
        for parameter, initial in zip(self.trained, self.initial, strict=True):
            parameter.data.copy_(initial)

    def steps(self, row: Row, windows: Tensor) -> Iterator[Record]:
        optimizer = _peer_optimizer(self.trained, row, self.adapter.learning_rate)
        device = self.trained[0].device
        for window in windows.pin_memory() if _GPU else windows:
            began = time.perf_counter()
            batch = window.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = self.model(input_ids=batch, labels=batch).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            figures = loss.item(), norm.item()
            _synchronize()
            yield Record(*figures, time.perf_counter() - began)


class Peft(_Peer):
    """PEFT with bitsandbytes for QLoRA; what is not kept is recomputed from the blocks' inputs on the card."""

    def __init__(self, model: str, row: Row, adapter: Adapter, *, longest: int) -> None:  # noqa: ARG002
        from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        base = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.bfloat16,
            quantization_config=quantization if row.method == "qlora" else None,
            device_map={"": 0 if _GPU else "cpu"},
            attn_implementation="sdpa",
        )
        checkpointing, reentrant = row.activations != "keep", {"use_reentrant": False}
        if row.method == "qlora":
            base = prepare_model_for_kbit_training(
                base, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=reentrant
            )
        elif checkpointing:
            base.gradient_checkpointing_enable(reentrant)
            base.enable_input_require_grads()
        if adapter.folder:
            super().__init__(PeftModel.from_pretrained(base, adapter.folder, is_trainable=True), adapter)
            return
        settings = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=0.0,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
        )
        super().__init__(get_peft_model(base, settings), adapter)


class PeftLiger(Peft):
    """PEFT over Liger Kernel's norm, rotation, SwiGLU and loss."""

    def __init__(self, model: str, row: Row, adapter: Adapter, *, longest: int) -> None:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
        super().__init__(model, row, adapter, longest=longest)


class Unsloth(_Peer):
    """Unsloth's own model, kernels and checkpointing."""

    def __init__(self, model: str, row: Row, adapter: Adapter, *, longest: int) -> None:
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # it asks the network otherwise
        from unsloth import FastLanguageModel

        base, _ = FastLanguageModel.from_pretrained(
            model,
            max_seq_length=longest,
            dtype=torch.bfloat16,
            load_in_4bit=row.method == "qlora",
            device_map={"": 0},
        )
        adapted = FastLanguageModel.get_peft_model(
            base,
            r=adapter.rank,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=0,
            target_modules=TARGETS,
            bias="none",
            use_gradient_checkpointing={"keep": False, "recompute": True, "offload": "unsloth"}[row.activations],
            random_state=0,
        )
        FastLanguageModel.for_training(adapted)
        super().__init__(adapted, adapter)


STACKS: dict[str, Callable[..., Stack]] = {
    "nybble": Nybble,
    "nybble-eager": NybbleEager,
    "nybble-generic": NybbleGeneric,
    "peft": Peft,
    "peft-liger": PeftLiger,
    "unsloth": Unsloth,
}


_PACKAGES = {"peft": ("peft", "bitsandbytes"), "unsloth": ("unsloth",)}
_PACKAGES["peft-liger"] = (*_PACKAGES["peft"], "liger_kernel")


def installed(stack: str) -> bool:
    return all(importlib.util.find_spec(package) for package in _PACKAGES.get(stack, ()))


def can_run(stack: str, row: Row) -> bool:
    """Peers have no fp8, nor has nybble without its fused kernels."""
    return row.precision == "bf16" or stack in ("nybble", "nybble-eager")


def load_key(stack: str, row: Row) -> tuple[str, ...]:
    """Rows with the same key can run after one load: most stacks set activations up as they load."""
    return (stack, row.method) if stack in ("nybble", "nybble-eager") else (stack, row.method, row.activations)


def batches(windows: Tensor) -> Iterator[Any]:
    """Windows of token ids as the batches of one sample a row that the loop takes."""
    from nybble.data.collate import Batch

    for window in windows:
        positions = torch.arange(window.shape[1]).expand_as(window)
        yield Batch(window, window, positions, window.shape[0] * (window.shape[1] - 1))


def _peer_optimizer(trained: list[torch.nn.Parameter], row: Row, learning_rate: float) -> torch.optim.Optimizer:
    if row.state_bits == 32:
        return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(trained, lr=learning_rate, weight_decay=0.0)
    return optimizer


def _synchronize() -> None:
    if _GPU:
        torch.cuda.synchronize()
