"""Which parameters of a loaded model train: an adapter's, or all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import inject
from nybble.adapters.report import InjectionReport, ParameterCounts, count_parameters, report_injection
from nybble.adapters.targets import find_targets
from nybble.config import RunConfig
from nybble.errors import UserError
from nybble.models.checkpoint import Checkpoint
from nybble.models.device import compute_device
from nybble.models.load import LoadedModel
from nybble.models.skeleton import build_skeleton, replace_modules
from nybble.train.preflight import check_coverage
from nybble.train.start import begin
from nybble.train.weights import AdapterWeights, FullWeights


@dataclass(frozen=True)
class Trainable:
    """What was made to train. injection: None for method full.

    final_bytes: about what the result takes of the disk, at most. start_bytes: of where the adapter began, which lies
    in each checkpoint too.
    """

    weights: AdapterWeights | FullWeights
    parameters: ParameterCounts
    injection: InjectionReport | None
    final_bytes: int
    start_bytes: int = 0
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        counts = self.injection.lines() if self.injection else [str(self.parameters)]
        return [*counts, *self.notes]


def check_method(config: RunConfig) -> None:
    """Raise UserError when method and storage contradict each other."""
    storage = config.model.storage
    fixes = {
        ("qlora", "bf16"): "Use method lora, which adapts 16-bit weights.",
        ("qlora", "fp16"): "Use method lora, which adapts 16-bit weights.",
        ("qlora", "fp32"): "Use method lora, which adapts weights in any precision.",
        ("full", "nf4"): "4-bit weights cannot be trained; use method qlora.",
        ("full", "fp16"): "Updates vanish or overflow in fp16 weights; use fp32 or bf16.",
    }
    if fix := fixes.get((config.method, storage)):
        raise UserError(f"is {storage}, which method {config.method} does not train", where="model.storage", fix=fix)
    if config.method == "full" and config.model.head == "nf4":
        raise UserError("is nf4, which method full does not train", where="model.head", fix="Leave it out.")


def check_reach(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raise UserError, before any weight is read, if the adapter does not fit the model or reaches too little of it."""
    if config.method == "full":
        return
    model = build_skeleton(checkpoint, trust_remote_code=config.model.trust_remote_code).model
    replace_modules(model, torch.float32)  # targets are linears of ours
    targets = find_targets(model, config.lora)
    check_coverage(model, report_injection(model, targets, "default"), config.lora)


def make_trainable(loaded: LoadedModel, config: RunConfig) -> Trainable:
    """Inject the adapter, or for method full unfreeze every parameter; what it reaches, `check_reach` has seen."""
    return _unfreeze(loaded, config) if config.method == "full" else _inject(loaded, config)


def _inject(loaded: LoadedModel, config: RunConfig) -> Trainable:
    report = inject(loaded.model, config.lora, seed=config.train.seed, device=compute_device(loaded.model))
    trained = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    start = begin(loaded, config)
    start_bytes = start.nbytes if start is not None else 0
    as_difference = config.lora.save_as == "difference"
    # The difference is of twice the rank, and the adapter that it is made of lies beside it until it is whole.
    final_bytes = trained_bytes * (3 if as_difference else 1) + start_bytes
    origin = loaded.provenance
    fingerprint = start.residual_fingerprint(origin.base_fingerprint) if start is not None else None
    origin = origin.model_copy(update={"init": config.lora.init, "residual_fingerprint": fingerprint})
    weights = AdapterWeights(loaded.model, origin, start, as_difference=as_difference)
    return Trainable(weights, report.parameters, report, final_bytes, start_bytes)


def _unfreeze(loaded: LoadedModel, config: RunConfig) -> Trainable:
    loaded.model.requires_grad_(True)
    counts = count_parameters(loaded.model)
    dtype = loaded.checkpoint.dtype
    notes = []
    if loaded.storage == "bf16":
        notes.append("weights are trained in bf16: updates below 1/256 of a weight round away; storage fp32 keeps them")
    if config.lora != LoraConfig():
        notes.append("method full makes no adapter: the settings under lora do not count")
    final_bytes = counts.total * dtype.itemsize
    return Trainable(FullWeights(loaded.model, dtype), counts, None, final_bytes, notes=tuple(notes))
