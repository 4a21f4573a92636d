"""The calibration: text through a model one decoder layer at a time, each quantized for what it sees.

A linear sees what the quantized ones before it make of the text, those of its own layer too, so a layer is gone through
in stages. Held are one layer twice, the moments of one stage's inputs, and on the host the hidden states of all
windows. For compensated codes a pass forth and back finds beforehand how much each token weighs. They make up for what
is before them: beside it the layer runs as it was, on what the layers as they were give, and each linear aims at what
it would have given there. Behind that pass all scales are tuned together, if the device holds the quantized model; and
in a last one corrections are made, each behind layers and stages that compute with theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, track
from torch import Tensor
from transformers import PreTrainedModel

from nybble.adapters.provenance import Rounding
from nybble.calibrate.calls import LayerCall, record_calls
from nybble.calibrate.correction import CARRIED_RANK, RANK
from nybble.calibrate.finished import FinishedLayers, PreparedLinear
from nybble.calibrate.head import Logits, logits_of
from nybble.calibrate.layer import Layer, find_stages
from nybble.calibrate.prepare import correct_linears, prepare_linears, require_finite_weights
from nybble.calibrate.sensitivity import BOUND, draw_gradients, pass_back, weights_of
from nybble.calibrate.states import States, Stream
from nybble.calibrate.text import CalibrationText, read_calibration_text
from nybble.calibrate.tune import PASSES, SCALE_RATE, STEP_TOKENS, Tuning, tuning_bytes
from nybble.errors import UserError
from nybble.memory.budget import available_bytes
from nybble.memory.host import available_host_bytes
from nybble.memory.lack import is_out_of_memory
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.conversion import ParameterMap
from nybble.models.dtypes import dtype_name, resolve_compute
from nybble.models.load import load_model, load_tokenizer
from nybble.models.skeleton import Skeleton, build_skeleton, decoder_layers
from nybble.plan import MemoryPlan
from nybble.quant.compensation import AIM, DAMPING, ROUNDS
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear

TOKENS = 65_536  # of a calibration, unless said otherwise
# Tokens. As short as rows that models are tuned on: what comes first in a row is unlike all the rest, and so comes as
# often. Layers 3 and 11 of SmolLM2-135M, calibrated on Python: by 2,048 tokens a window outputs on other rows err by 1
# to 4 % more; by rows one by one, which are of no one length, by 1 to 3 % less.
WINDOW = 512
# Hidden states of as many windows as go through a layer together: a small model's kernels are shorter than their
# launches.
_BATCH_BYTES = 20 * 2**20
# Of the host, for what comes to every layer of as many windows as are weighed together.
_WEIGHED_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Calibration:
    """Text to pass through a model. rank: of the corrections at most; 0: none are made."""

    text: CalibrationText
    rank: int = RANK

    @classmethod
    def read(cls, path: str, checkpoint: Checkpoint, *, tokens: int, trust_remote_code: bool = False) -> Calibration:
        """By the text or data at `path`, in windows of `WINDOW` tokens or as long as the model allows."""
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
    """Quantize every linear of the decoder layers on `device`; what is finished lies in `folder`, where it goes on.

    Raises UserError for a model that does not hold its decoder layers as a list or (compensated) makes its logits in an
    unknown way, and with the linear's path for weights or inputs that are not finite.
    """
    config = ModelConfig(name=checkpoint.name, trust_remote_code=trust_remote_code)
    settings = {
        "fingerprint": checkpoint.fingerprint,
        "rounding": rounding,
        "block_size": spec.block_size,
        "group_size": spec.group_size,
        "damping": DAMPING,
        "rounds": ROUNDS,
        "aim": AIM,
        "bound": BOUND,
        "tuning": [PASSES, SCALE_RATE, STEP_TOKENS],
        "rank": calibration.rank,
        "carried_rank": CARRIED_RANK,
        "windows": list(calibration.text.windows.shape),
        "compute": dtype_name(resolve_compute(config.compute, device)),  # says how many windows go together, too
        "text": calibration.text.digest,
    }
    finished = FinishedLayers.open(folder, settings)
    skeleton = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)
    plan = _plan(checkpoint, skeleton)
    last = finished
    if rounding == "compensated":
        last = finished.next("corrected" if calibration.rank else "tuned")
    if last.all(len(plan.layers)):
        return last
    model = load_model(config, device=device, storage="auto", checkpoint=checkpoint, plan=plan).model
    work = _Work(model, frozenset(skeleton.quantizable), calibration, spec, checkpoint.dtype, device, progress)
    if rounding != "compensated":
        work.quantize(finished, rounding, States(work.text(), None), rank=calibration.rank)
        return finished
    logits, tuned = logits_of(model), finished if finished.untuned_bytes else finished.next("tuned")
    work.weigh(finished, logits)
    if not tuned.all(len(plan.layers)):
        originals = work.text()
        work.quantize(finished, rounding, States(work.text(), originals), rank=0)
        tuned = work.tune(finished, logits, wanted=originals)
        del originals
    return work.correct(tuned, States(work.text(), work.text())) if calibration.rank else tuned


class _Work:
    """A model and a text. Each method makes a stage of all layers; what was kept of it is not done again."""

    def __init__(
        self,
        model: PreTrainedModel,
        quantizable: frozenset[str],
        calibration: Calibration,
        spec: NF4Spec,
        dtype: torch.dtype,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.model, self.quantizable, self.calibration = model, quantizable, calibration
        self.spec, self.dtype, self.device = spec, dtype, device
        self.console = Console(stderr=True)  # standard output is for figures
        self.hides = not (progress and self.console.is_terminal)
        self.windows = calibration.text.windows
        number, length = self.windows.shape
        self.a_step = _at_once(number, STEP_TOKENS // length)
        self.step_calls, [states] = record_calls(model, self.windows[: self.a_step], at_once=self.a_step)
        self.step_bytes = states.nbytes
        self.at_once = _at_once(number, _BATCH_BYTES * self.a_step // states.nbytes)
        self.calls, _ = record_calls(model, self.windows[: self.at_once], at_once=self.at_once)
        self.token_weights: dict[str, Tensor] = {}  # (batches, tokens of a batch), by the first path of a stage

    def text(self) -> Stream:
        """What comes to the first layer."""
        return Stream(record_calls(self.model, self.windows, at_once=self.at_once)[1], self.device)

    def weigh(self, finished: FinishedLayers, logits: Logits) -> None:
        """From here on tokens count as much as the 16-bit model's predictions depend on them."""
        kept = finished.token_weights(self.device)
        if kept is not None:
            self.token_weights = kept
            return
        found: dict[str, list[Tensor]] = {}
        chance = torch.Generator(self.device).manual_seed(0)
        for part in self.text().parts(_WEIGHED_BYTES // len(self.calls)):
            for stage, squares in self._squares(part, logits, chance):
                found.setdefault(stage, []).append(squares)
        self.token_weights = {stage: weights_of(torch.cat(parts)) for stage, parts in found.items()}
        finished.write_token_weights(self.token_weights)

    def _squares(self, text: Stream, logits: Logits, chance: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Squared gradients (batches, tokens of a batch) at the outputs of every stage's linears, by its first path."""
        before, gradients = [], text
        for _, layer in self._layers("Reading", self.calls):
            require_finite_weights(self._linears(layer))  # here, or a text would be blamed for what they make of it
            before.append(gradients)
            gradients = gradients.behind(layer)
        draw_gradients(self.model, logits, gradients, chance)
        for _, layer in self._layers("Weighing", self.calls, backwards=True):
            given = before.pop()
            yield from pass_back(layer, self._stages(layer, given), given, gradients).items()

    def quantize(self, finished: FinishedLayers, rounding: Rounding, states: States, *, rank: int) -> None:
        for index, layer in self._layers("Calibrating", self.calls):
            if finished.has(index):
                prepared = finished.linears(index, self.device)
            else:
                prepared = self._quantized(layer, rounding, states, rank)
                finished.write(index, prepared, self.dtype)
            if states.original is not None or index + 1 < len(self.calls):
                quantized = layer.copy()
                quantized.quantize_(prepared)
                states.advance(quantized, layer)
                del quantized
            del layer, prepared  # before the next one comes

    def _quantized(self, layer: Layer, rounding: Rounding, states: States, rank: int) -> dict[str, PreparedLinear]:
        """The linears of `layer`, by path, stage by stage: each for what those before it make of the text."""
        quantized = layer.copy()
        prepared: dict[str, PreparedLinear] = {}
        for stage in self._stages(layer, states.changed):
            moments = states.moments(quantized, layer, stage, self.token_weights.get(stage[0]))
            made = dict(prepare_linears(layer.dense(stage), moments, self.spec, rounding, rank=rank))
            quantized.quantize_(made)
            prepared |= made
        return prepared

    def tune(self, finished: FinishedLayers, logits: Logits, *, wanted: Stream) -> FinishedLayers:
        """The same with scales tuned, unless memory lacks. wanted: what the last layer of the 16-bit model gives."""
        layers = ((layer.module, self._linears(layer).values()) for layer in self._held(self.step_calls))
        needed = tuning_bytes(layers, states_bytes=self.step_bytes, block_size=self.spec.block_size)
        if needed > self._available_bytes():
            return replace(finished, untuned_bytes=needed)
        try:
            return self._tuned(finished, Tuning(self.model, logits, self.text(), wanted, self.a_step))
        except (MemoryError, RuntimeError) as error:  # as it is about so much
            if not is_out_of_memory(error):
                raise
            return replace(finished, untuned_bytes=needed)

    def _tuned(self, finished: FinishedLayers, tuning: Tuning) -> FinishedLayers:
        layers, tuned = [], finished.next("tuned")
        for index, layer in self._layers("Loading", self.step_calls):
            layer.tune_(finished.linears(index, self.device))
            layers.append(layer)
        if not any(layer.tuned() for layer in layers):
            return finished
        with Progress(console=self.console, transient=True, disable=self.hides) as bar:
            task = bar.add_task("Tuning", total=tuning.steps)
            tuning.scales(layers, lambda: bar.advance(task))
        for index, layer in enumerate(layers):
            prepared = finished.linears(index, self.device)
            found = {path: linear.trained(prepared[path]) for path, linear in layer.tuned().items()}
            tuned.write(index, prepared | found, self.dtype)
        return tuned

    def _available_bytes(self) -> int:
        return available_bytes(self.device) if self.device.type == "cuda" else available_host_bytes()

    def correct(self, finished: FinishedLayers, states: States) -> FinishedLayers:
        """The same with corrections, each made behind layers and stages that compute with theirs."""
        finished.settle()
        corrected = finished.next("corrected")
        for index, layer in self._layers("Correcting", self.calls):
            if corrected.has(index):
                prepared = corrected.linears(index, self.device)
            else:
                prepared = self._corrected(layer, states, finished.linears(index, self.device))
                corrected.write(index, prepared, self.dtype)
            if index + 1 < len(self.calls):
                changed = layer.copy()
                changed.correct_(prepared)
                states.advance(changed, layer)
        return corrected

    def _corrected(
        self, layer: Layer, states: States, prepared: Mapping[str, PreparedLinear]
    ) -> dict[str, PreparedLinear]:
        """`prepared` with corrections, stage by stage. What the text did not reach has none."""
        changed, found = layer.copy(), dict(prepared)
        for stage in self._stages(layer, states.changed):
            reached = [path for path in stage if prepared[path].reached]
            moments = states.moments(changed, layer, reached, self.token_weights.get(stage[0]))
            weights = {path: prepared[path].weight for path in reached}
            for path, correction in correct_linears(layer.dense(reached), moments, weights, self.calibration.rank):
                found[path] = replace(found[path], correction=correction)
            changed.correct_({path: found[path] for path in stage})
        return found

    def _layers(self, verb: str, calls: Sequence[LayerCall], *, backwards: bool = False) -> Iterator[tuple[int, Layer]]:
        """Each layer in a copy on the device, with its number."""
        held = list(enumerate(self._held(calls)))
        if backwards:
            held.reverse()
        for index, layer in track(held, verb, console=self.console, transient=True, disable=self.hides):
            yield index, replace(layer, module=copy.deepcopy(layer.module).to(self.device))

    def _held(self, calls: Sequence[LayerCall]) -> list[Layer]:
        """The layers wherever their weights are."""
        held = decoder_layers(self.model).items()
        return [Layer(path, module, call) for (path, module), call in zip(held, calls, strict=True)]

    def _linears(self, layer: Layer) -> dict[str, DenseLinear]:
        """What is to be quantized."""
        return {path: linear for path, linear in layer.dense().items() if path in self.quantizable}

    def _stages(self, layer: Layer, stream: Stream) -> list[list[str]]:
        return find_stages(self._linears(layer), partial(layer.call, layer.module, next(stream.on_device())))


def _at_once(windows: int, most: int) -> int:
    """How many of that number leave no smaller batch at the end, for which layers would be called in another way."""
    return max((number for number in range(1, most + 1) if windows % number == 0), default=1)


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
