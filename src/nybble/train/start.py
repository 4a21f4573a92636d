"""Where a run's adapter begins: what is taken out of the base while it is loaded, and what the pairs hold first."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from nybble.adapters.difference import require_kept_base
from nybble.adapters.initialize import calibrated_start, held_start, set_start
from nybble.adapters.residual import FoundResidual, KnownResidual
from nybble.adapters.saved import read_adapter
from nybble.adapters.start import AdapterStart
from nybble.config import RunConfig
from nybble.errors import UserError
from nybble.models.checkpoint import Checkpoint
from nybble.models.dtypes import resolve_storage
from nybble.models.load import LoadedModel, WeightChange, quantize_weight
from nybble.quant.correction import FILE as CORRECTIONS
from nybble.quant.correction import read_corrections
from nybble.quant.format import NF4Spec
from nybble.train.state import newest_checkpoint


def check_start(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raise UserError, before anything is loaded, for a start that the base does not allow."""
    init, where = config.lora.init, f"lora.init={config.lora.init}"
    if config.method == "full":
        return
    storage = resolve_storage(config.model.storage, config.method)
    in_nf4 = storage == "nf4" or (storage == "auto" and bool(checkpoint.nf4_weights))
    if init in ("calibrated", "loftq") and not in_nf4:
        what = f"makes up for NF4's error, and the base is held in {storage}"
        raise UserError(what, where=where, fix="Use method qlora, or init plain or pissa.")
    if init in ("pissa", "loftq") and checkpoint.nf4_weights:
        what = f"needs the original weights, and {checkpoint.name} is in 4 bit"
        raise UserError(what, where=where, fix="Give the 16-bit checkpoint as the model.")
    if init == "calibrated":
        if not (checkpoint.folder / CORRECTIONS).exists():
            what = f"needs a folder with {CORRECTIONS}, and {checkpoint.name} has none"
            fix = "Make one with `nybble quantize --calibration TEXT`, and give it as the model."
            raise UserError(what, where=where, fix=fix)
        read_corrections(checkpoint.folder, paths=())  # which linears there are is known when they are loaded
    if config.lora.save_as == "difference" and init == "plain":
        what = "an adapter that begins at zero is the difference already"
        raise UserError(what, where="lora.save_as", fix="Leave it out.")
    if config.lora.save_as == "difference":
        require_kept_base(checkpoint.folder)


def change_of_base(config: RunConfig) -> WeightChange | None:
    """What is to be taken out of the base's weights; a run that goes on takes out what it did when it began."""
    if config.method == "full" or config.lora.init not in ("pissa", "loftq"):
        return None
    begun, _ = newest_checkpoint(Path(config.output).expanduser() / "checkpoints")
    if begun is not None and (start := read_adapter(begun).start) is not None:
        return KnownResidual(start)
    model = config.model
    spec = NF4Spec.of(model.block_size, double_quant=model.double_quant)

    def quantize(weight: Tensor) -> Tensor:
        return quantize_weight("a weight", weight, spec, model.rounding).dequantize(weight.dtype)

    return FoundResidual(config.lora, config.train.seed, quantize)


def begin(loaded: LoadedModel, config: RunConfig) -> AdapterStart | None:
    """Have the fresh adapter of `loaded` begin where `config` says, and say where that is; None: at zero."""
    if config.lora.init == "plain":
        return None
    model: PreTrainedModel = loaded.model
    change = loaded.change
    if isinstance(change, KnownResidual):
        set_start(model, change.start.initial)
        return change.start
    if isinstance(change, FoundResidual):
        set_start(model, change.initial)
        return AdapterStart(held_start(model), change.removed)
    set_start(model, calibrated_start(model, loaded.checkpoint.folder))
    return AdapterStart(held_start(model))
