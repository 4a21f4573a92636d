"""Where a model's weights go while it is loaded, as its plan of memory says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from nybble.models.skeleton import decoder_layers
from nybble.plan import MemoryPlan

Where = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Placement:
    """Where the weights of linears, embeddings and experts lie; norms and biases are on the device always.

    places: by the path of a module, for all within it; disk: they stay in the checkpoint's files, mapped.
    """

    places: Mapping[str, Where]

    @classmethod
    def of(cls, model: PreTrainedModel, plan: MemoryPlan | None) -> Placement:
        """As `plan` says; without one all are on the device. What is there anyway is not looked for in the model."""
        if plan is None or (not plan.streamed() and plan.embedding == plan.head == "device"):
            return cls({})
        where: dict[str, Where] = {"resident": "device", "streamed": "host", "disk": "disk"}
        layers = zip(decoder_layers(model), plan.layers, strict=True)
        places = {path: where[policy.weights] for path, policy in layers}
        path_of = {module: path for path, module in model.named_modules()}
        ends = {model.get_output_embeddings(): plan.head, model.get_input_embeddings(): plan.embedding}
        return cls(places | {path_of[module]: place for module, place in ends.items()})

    def at(self, path: str) -> Where:
        """Where the module at `path` has its weights."""
        while path:
            if path in self.places:
                return self.places[path]
            path = path.rpartition(".")[0]
        return "device"
