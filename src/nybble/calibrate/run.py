"""The calibration pass: text through a model one decoder layer at a time, each quantized for what it sees.

A layer sees what the quantized layers before it make of the text, so it makes up for them too. Held are one layer, the
second moments of its inputs, and on the host the hidden states of all windows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from nybble.adapters.provenance import Rounding
from nybble.calibrate.calls import record_calls
from nybble.calibrate.correction import RANK
from nybble.calibrate.finished import FinishedLayers
from nybble.calibrate.moments import InputMoments
from nybble.calibrate.prepare import prepare_linears
from nybble.calibrate.text import CalibrationText, read_calibration_text
from nybble.errors import UserError
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.conversion import ParameterMap
from nybble.models.load import load_model, load_tokenizer
from nybble.models.skeleton import Skeleton, build_skeleton, decoder_layers
from nybble.plan import MemoryPlan
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear
from nybble.quant.weight import NF4Weight

TOKENS = 65_536  # of a calibration, unless said otherwise
WINDOW = 2048


@dataclass(frozen=True)
class Calibration:
    """Text to pass through a model, a window at a time. rank: of the corrections; 0: none are made."""

    text: CalibrationText
    rank: int = RANK

    @classmethod
    def read(cls, path: str, checkpoint: Checkpoint, *, tokens: int, trust_remote_code: bool = False) -> Calibration:
        """By the text or data at `path`, in windows of 2,048 tokens or as long as the model allows."""
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        length = min(WINDOW, checkpoint.max_positions or WINDOW, tokens)
        return cls(read_calibration_text(path, tokenizer, tokens=tokens, length=length))


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    spec: NF4Spec,
    rounding: Rounding,
    calibration: Calibration,
    folder: Path,
    *,
    device: torch.device,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> FinishedLayers:
    """Quantize every linear of the decoder layers on `device`; finished layers lie in `folder`, where a pass goes on.

    Raises UserError for a model that does not hold its decoder layers as a list, and with the linear's path for weights
    or inputs that are not finite.
    """
    settings = {
        "fingerprint": checkpoint.fingerprint,
        "rounding": rounding,
        "block_size": spec.block_size,
        "group_size": spec.group_size,
        "rank": calibration.rank,
        "windows": list(calibration.text.windows.shape),
        "text": calibration.text.digest,
    }
    finished = FinishedLayers.open(folder, settings)
    skeleton = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)
    plan = _plan(checkpoint, skeleton)
    config = ModelConfig(name=checkpoint.name, trust_remote_code=trust_remote_code)
    model = load_model(config, device=device, storage="auto", checkpoint=checkpoint, plan=plan).model
    calls, hidden = record_calls(model, calibration.text.windows)
    layers = list(zip(decoder_layers(model).items(), calls, strict=True))
    console = Console(stderr=True)  # standard output is for figures
    shown = track(
        layers, "Calibrating", console=console, transient=True, disable=not (progress and console.is_terminal)
    )
    for index, ((path, held), call) in enumerate(shown):
        layer = copy.deepcopy(held).to(device)
        if not finished.has(index):
            linears = _quantizable(path, layer, skeleton)
            moments = InputMoments()
            with moments.watching(linears):
                for window in hidden:
                    call(layer, window.to(device))
            prepared = prepare_linears(linears, moments, spec, rounding, rank=calibration.rank)
            finished.write(index, dict(prepared), checkpoint.dtype)
        if index + 1 < len(layers):
            _put_in_place(path, layer, finished.weights(index), device)
            hidden = [call(layer, window.to(device)).cpu() for window in hidden]
    return finished


def _quantizable(path: str, layer: nn.Module, skeleton: Skeleton) -> dict[str, DenseLinear]:
    inside = {f"{path}.{name}": module for name, module in layer.named_modules() if isinstance(module, DenseLinear)}
    return {name: module for name, module in inside.items() if name in skeleton.quantizable}


def _put_in_place(path: str, layer: nn.Module, weights: dict[str, NF4Weight], device: torch.device) -> None:
    """Have `layer` compute with its quantized weights."""
    for name, weight in weights.items():
        inside = name.removeprefix(f"{path}.")
        dense = layer.get_submodule(inside)
        assert isinstance(dense, DenseLinear)
        layer.set_submodule(inside, NF4Linear(weight, dense.bias, dense.compute_dtype).to(device))


def _plan(checkpoint: Checkpoint, skeleton: Skeleton) -> MemoryPlan:
    """Layers stay in the files where they lie there as they are held; otherwise the host holds them."""
    layers = decoder_layers(skeleton.model)
    if not layers:
        what = "does not hold its decoder layers as a list, so they cannot be calibrated one by one"
        raise UserError(what, where=checkpoint.folder, fix="Quantize without --calibration, by nearest or search.")
    names = ParameterMap.build(skeleton.model, checkpoint.weights)
    linears = {f"{path}.weight" for path in skeleton.quantizable if any(path.startswith(f"{at}.") for at in layers)}
    in_file = {parameter: checkpoint.entries[key].dtype for key, parameter in names.parameter_of.items()}
    as_held = all(in_file.get(name) == checkpoint.dtype for name in linears)
    transposed = any(skeleton.is_transposed(name.removesuffix(".weight")) for name in linears)
    return MemoryPlan.uniform(len(layers), weights="disk" if as_held and not transposed else "streamed")
