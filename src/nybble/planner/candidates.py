"""The plans that are worth a look: how many layers are kept, what becomes of the others, and where the rest lies.

The last layers are those kept: their memory is free again before the backward pass comes to the ones that are made
again. Streamed layers are spread, so that their copies hide behind the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from nybble.plan import Activations, LayerPolicy, MemoryPlan, Place, Weights
from nybble.planner.run_shape import RunShape
from nybble.planner.shapes import ModelShape

Auto = Literal["auto"]
Moments = Literal["resident", "paged"]
Ends = tuple[Place, Place]  # of embedding and head

# Rows of an MLP at a time: products of 4,096 rows run at full speed.
_MLP_ROWS = 4096
# Into so many parts the layers are divided for the question how many are kept, before it is asked more exactly.
_PARTS = 8
# Of so many layers one may keep its activations on the host.
_ON_HOST = (2, 3, 6)


@dataclass(frozen=True)
class Choices:
    """What is fixed of a plan; the names are those of MemoryConfig, `auto` and 0 are the planner's to choose.

    in_files: whether the checkpoint's files hold the weights as the run does, so that `auto` may leave them there.
    budget_bytes: of the device, all counted; None: all that it has.
    """

    activations: Activations | Auto = "auto"
    weights: Weights | Auto = "auto"
    embedding: Place | Auto = "auto"
    head: Place | Auto = "auto"
    moments: Moments | Auto = "auto"
    span: int = 0
    mlp_rows: int = 0
    in_files: bool = True
    budget_bytes: int | None = None


@dataclass(frozen=True)
class Retention:
    """How activations are held: the last `kept` layers keep theirs, the others as `lean` says.

    on_host: before all that, the first of every so many layers keeps its own on the host, so that copies have the time
    of as many layers each; 0: none does. The kept ones then keep no norms either, which cost more memory than time.
    """

    lean: Activations
    kept: int = 0
    on_host: int = 0
    span: int = 1
    keep_middle: bool = False
    mlp_rows: int | None = None

    @property
    def keeps_on_host(self) -> bool:
        return self.on_host > 0 or self.lean == "keep_on_host"

    def plan(self, num_layers: int) -> MemoryPlan:
        """With everything on the device."""
        lean = num_layers - self.kept
        kept = LayerPolicy("keep_matmuls" if self.on_host else "keep")
        layers = [LayerPolicy(self.lean)] * lean + [kept] * self.kept
        if self.on_host:
            layers[:: self.on_host] = [LayerPolicy("keep_on_host")] * len(layers[:: self.on_host])
        middle = self.keep_middle or LayerPolicy("offload") not in layers
        return MemoryPlan(tuple(layers), span=self.span, keep_middle=middle, mlp_rows=self.mlp_rows)


@dataclass(frozen=True)
class Placement:
    """Where all else lies. streamed: the number of layers whose weights come from `away`."""

    embedding: Place
    head: Place
    moments: Moments
    streamed: int = 0
    away: Weights = "streamed"

    @property
    def from_disk(self) -> bool:
        return self.away == "disk" and self.streamed > 0

    def applied(self, plan: MemoryPlan) -> MemoryPlan:
        layers = list(plan.layers)
        for number in range(self.streamed):
            layer = number * len(layers) // self.streamed
            layers[layer] = replace(layers[layer], weights=self.away)
        return replace(plan, layers=tuple(layers), moments=self.moments, embedding=self.embedding, head=self.head)


def retentions(model: ModelShape, run: RunShape, fixed: Choices) -> list[Retention]:
    """How activations may be held, with no layer kept, the simplest first."""
    if not run.is_fused(model):
        return [Retention("recompute")]
    rows = [fixed.mlp_rows] if fixed.mlp_rows else [None, _MLP_ROWS] if run.tokens > 2 * _MLP_ROWS else [None]
    spans = [fixed.span] if fixed.span else [1, 2]
    if fixed.activations == "keep":
        return [Retention("recompute", span=spans[0], mlp_rows=rows[0])]  # of no layer
    found = [Retention("keep_matmuls"), Retention("keep_on_host")]
    for mlp_rows in rows:
        found += [Retention("recompute", span=span, mlp_rows=mlp_rows) for span in spans]
        if 1 in spans and middles(model):
            found.append(Retention("offload", keep_middle=True, mlp_rows=mlp_rows))
        found += [Retention("offload", span=span, mlp_rows=mlp_rows) for span in spans]
    return [retention for retention in found if fixed.activations in ("auto", retention.lean)]


def middles(model: ModelShape) -> bool:
    """Whether it spares anything to keep the stream after attention: not with a norm there."""
    return model.norms == 2


def kept_counts(model: ModelShape, run: RunShape, fixed: Choices) -> list[int]:
    """How many layers may be kept; with activations fixed, and by stock modules, all or none."""
    layers = model.num_layers
    if fixed.activations != "auto":
        return [layers if fixed.activations == "keep" else 0]
    if not run.is_fused(model):
        return [layers, 0]
    return sorted({layers * part // _PARTS for part in range(_PARTS + 1)}, reverse=True)


def on_host_intervals(model: ModelShape, run: RunShape, fixed: Choices, retention: Retention) -> tuple[int, ...]:
    """Of how many layers one may keep its activations on the host, beside the others' fastest ways."""
    fastest = retention.lean == "recompute" or (retention.lean == "offload" and retention.keep_middle == middles(model))
    possible = run.is_fused(model) and fixed.activations == "auto" and fastest and retention.span == 1
    return (0, *_ON_HOST) if possible else (0,)


def counts_between(model: ModelShape, run: RunShape, fixed: Choices, kept: int) -> range:
    """The counts of kept layers above `kept`, one of `kept_counts`, and below the next of these."""
    next_more = min((count for count in kept_counts(model, run, fixed) if count > kept), default=kept)
    return range(kept + 1, next_more) if run.is_fused(model) else range(0)


def ends(fixed: Choices, *, tied: bool) -> list[Ends]:
    """Places of embedding and head; tied: they are one matrix."""
    places: list[Ends] = [("device", "device"), ("host", "device"), ("host", "host"), ("device", "host")]
    if tied:
        places = [place for place in places if place[0] == place[1]]
    elif (fixed.embedding, fixed.head) == ("auto", "auto"):
        places = places[:3]
    return [place for place in places if fixed.embedding in ("auto", place[0]) and fixed.head in ("auto", place[1])]


def moments_places(fixed: Choices) -> list[Moments]:
    return ["resident", "paged"] if fixed.moments == "auto" else [fixed.moments]
