"""The calibration pass: text through a model one decoder layer at a time, each quantized for what it sees.

A linear sees what the quantized ones before it make of the text, those of its own layer too, so a layer is gone through
in stages. Compensated codes make up for them: beside it the layer runs as it was, on what the layers as they were give,
and each linear aims at what it would have given there. Their corrections are made in the same way once more, behind
layers and stages that compute with their corrections. Held are one layer twice, the moments of one stage's inputs, and
on the host the hidden states of all windows: of the quantized layers, and for compensated codes of the layers as they
were and of the corrected ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from nybble.adapters.provenance import Rounding
from nybble.calibrate.calls import record_calls
from nybble.calibrate.correction import CARRIED_RANK, RANK
from nybble.calibrate.finished import FinishedLayers, PreparedLinear
from nybble.calibrate.layer import Layer, find_stages
from nybble.calibrate.prepare import correct_linears, prepare_linears
from nybble.calibrate.states import States, Stream
from nybble.calibrate.text import CalibrationText, read_calibration_text
from nybble.errors import UserError
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.conversion import ParameterMap
from nybble.models.load import load_model, load_tokenizer
from nybble.models.skeleton import Skeleton, build_skeleton, decoder_layers
from nybble.plan import MemoryPlan
from nybble.quant.compensation import DAMPING, ROUNDS
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear

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
        "damping": DAMPING,
        "rounds": ROUNDS,
        "rank": calibration.rank,
        "carried_rank": CARRIED_RANK,
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
    states = _states(hidden, rounding, calibration.rank, device)
    del hidden
    for index, ((path, held), call) in enumerate(shown):
        layer = Layer(path, copy.deepcopy(held).to(device), call)
        if finished.has(index):
            prepared = finished.linears(index)
        else:
            linears = {name: linear for name, linear in layer.dense().items() if name in skeleton.quantizable}
            prepared = _prepare(layer, linears, states, spec, rounding, calibration.rank)
            finished.write(index, prepared, checkpoint.dtype)
        if index + 1 < len(layers):
            states.advance(layer, prepared)
    return finished


def _states(hidden: list[Tensor], rounding: Rounding, rank: int, device: torch.device) -> States:
    """What comes to the first layer, as often as it is needed."""
    compensated = rounding == "compensated"
    return States(
        quantized=Stream(hidden, device),
        original=Stream(hidden, device) if compensated else None,
        corrected=Stream(hidden, device) if compensated and rank else None,
    )


def _prepare(
    layer: Layer, linears: Mapping[str, DenseLinear], states: States, spec: NF4Spec, rounding: Rounding, rank: int
) -> dict[str, PreparedLinear]:
    """The linears of `layer`, by path, stage by stage: each for what those before it make of the text."""
    quantized = layer.copy()
    stages = find_stages(linears, partial(layer.call, layer.module, next(states.quantized.on_device())))
    rank_at_once = rank if states.corrected is None else 0
    prepared: dict[str, PreparedLinear] = {}
    for stage in stages:
        moments = states.moments(states.quantized, quantized, layer, stage)
        made = dict(prepare_linears(layer.dense(stage), moments, spec, rounding, rank=rank_at_once))
        quantized.quantize_(made)
        prepared |= made
    del quantized
    return prepared if states.corrected is None else _correct(layer, stages, states, prepared, rank)


def _correct(
    layer: Layer, stages: list[list[str]], states: States, prepared: Mapping[str, PreparedLinear], rank: int
) -> dict[str, PreparedLinear]:
    """`prepared` with corrections, made stage by stage too: each for what those before it make of the text corrected.

    What the text did not reach has none.
    """
    assert states.corrected is not None
    corrected, found = layer.copy(), dict(prepared)
    for stage in stages:
        reached = [path for path in stage if prepared[path].reached]
        moments = states.moments(states.corrected, corrected, layer, reached)
        weights = {path: prepared[path].weight for path in reached}
        for path, correction in correct_linears(layer.dense(reached), moments, weights, rank):
            found[path] = replace(found[path], correction=correction)
        corrected.correct_({path: found[path] for path in stage})
    return found


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
