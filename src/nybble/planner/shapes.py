"""What a model is made of, read from its config.json alone: the sizes that memory and time follow from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nybble.errors import UserError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class LinearShape:
    """A linear layer of a block: out x in, called as in the checkpoint. bias: whether it has one."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weights + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes. windows: of sliding attention, one a layer (None: all tokens before).

    projections: the linears that read one input each, in the order q/k/v, attention's output, gate/up, down.
    norms: vectors of `hidden` values in a layer. extra: parameters outside of blocks, embedding, head and last norm.
    """

    family: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    projections: tuple[tuple[LinearShape, ...], ...]
    windows: tuple[int | None, ...]
    norms: int = 2
    head_norms: bool = False
    softcap: bool = False  # of attention's scores
    max_positions: int = 0
    rotary_dim: int = 0
    rotations: int = 1  # sets of cos and sin that a pass makes: Gemma 3 has one for sliding layers
    fused: bool = True  # whether nybble has fused kernels for it
    dtype_bytes: int = 2  # of a weight in the checkpoint
    norm_bias: bool = False
    extra: int = 0

    @classmethod
    def from_config(cls, config: Config) -> ModelShape:
        """The shape that config.json describes; raises UserError for an unknown type or a size left out."""
        if "text_config" in config:  # a model of images and text: its decoder
            config = {"torch_dtype": config.get("torch_dtype"), **config, **config["text_config"]}
        kind = str(config.get("model_type"))
        if kind not in _FAMILIES:
            known = ", ".join(sorted(_FAMILIES))
            raise UserError(f"the sizes of a {kind!r} model are not known", where="config.json", fix=f"Known: {known}.")
        try:
            return _FAMILIES[kind](config)
        except KeyError as missing:
            fix = "Fetch the file again: a model of this type cannot be built without it."
            raise UserError(f"does not say {missing}", where="config.json", fix=fix) from None

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """Of one block, in the order in which it computes."""
        return tuple(linear for projection in self.projections for linear in projection)

    @property
    def linear_weights(self) -> int:
        """Weights of one block's linears, without biases."""
        return sum(linear.weights for linear in self.linears)

    @property
    def small_parameters(self) -> int:
        """Norms and biases of one block."""
        norms = self.norms * self.hidden * (2 if self.norm_bias else 1) + (2 * self.head_dim if self.head_norms else 0)
        return norms + sum(linear.parameters - linear.weights for linear in self.linears)

    @property
    def embedding_weights(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model, tied ones counted once."""
        blocks = self.num_layers * (self.linear_weights + self.small_parameters)
        last_norm = self.hidden * (2 if self.norm_bias else 1)
        return blocks + self.embedding_weights * (1 if self.tied else 2) + last_norm + self.extra


def gpt3() -> ModelShape:
    """The 175B model of arXiv 2005.14165, on which LoRA (arXiv 2106.09685) was shown."""
    hidden, layers = 12288, 96
    names = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("fc_in",), ("fc_out",))
    sizes = {"fc_in": (hidden, 4 * hidden), "fc_out": (4 * hidden, hidden)}
    projections = tuple(
        tuple(LinearShape(name, *sizes.get(name, (hidden, hidden)), bias=True) for name in group) for group in names
    )
    return ModelShape(
        "gpt3",
        layers,
        hidden,
        4 * hidden,
        96,
        96,
        128,
        50257,
        tied=True,
        projections=projections,
        windows=(None,) * layers,
        max_positions=2048,
        norm_bias=True,
        fused=False,
        extra=2048 * hidden,
    )


def _decoder(config: Config, **changes: Any) -> ModelShape:
    """A decoder of the common kind: q, k, v and o, gate, up and down, an RMS norm before each half."""
    hidden, heads, layers = (config[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = changes.pop("head_dim", None) or config.get("head_dim") or hidden // heads
    intermediate = config["intermediate_size"]
    biases = {"qkv": config.get("attention_bias"), "o": config.get("attention_bias"), "mlp": config.get("mlp_bias")}
    biases |= changes.pop("biases", {})
    has = {key: bool(value) for key, value in biases.items()}
    sizes = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
    qkv = tuple(LinearShape(name, hidden, outputs, has["qkv"]) for name, outputs in sizes.items())
    gates = tuple(LinearShape(name, hidden, intermediate, has["mlp"]) for name in ("gate_proj", "up_proj"))
    output = LinearShape("o_proj", heads * head_dim, hidden, has["o"])
    down = LinearShape("down_proj", intermediate, hidden, has["mlp"])
    shape: dict[str, Any] = {
        "family": config["model_type"],
        "num_layers": layers,
        "hidden": hidden,
        "intermediate": intermediate,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocabulary": config["vocab_size"],
        "tied": config.get("tie_word_embeddings", False),
        "projections": (qkv, (output,), gates, (down,)),
        "windows": (None,) * layers,
        "max_positions": config.get("max_position_embeddings") or 0,
        "rotary_dim": int(head_dim * (config.get("partial_rotary_factor") or 1.0)),
        "dtype_bytes": 4 if "32" in str(config.get("dtype") or config.get("torch_dtype") or "16") else 2,
    }
    return ModelShape(**(shape | changes))


def _windows(config: Config, default: Callable[[int], bool]) -> tuple[int | None, ...]:
    """By layer_types, or where config.json has none by `default` of a layer's index."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    kinds = config.get("layer_types")
    sliding = [kind == "sliding_attention" for kind in kinds] if kinds else [default(i) for i in range(layers)]
    return tuple(window if slides else None for slides in sliding)


def _llama(config: Config) -> ModelShape:
    return _decoder(config)


def _mistral(config: Config) -> ModelShape:
    none = {"qkv": False, "o": False, "mlp": False}
    return _decoder(config, biases=none, windows=(config.get("sliding_window"),) * config["num_hidden_layers"])


def _qwen2(config: Config) -> ModelShape:
    first = config.get("max_window_layers", 28)
    slides = bool(config.get("use_sliding_window"))
    windows = _windows({**config, "sliding_window": config.get("sliding_window") if slides else None}, first.__le__)
    return _decoder(config, biases={"qkv": True, "o": False, "mlp": False}, windows=windows)


def _qwen3(config: Config) -> ModelShape:
    windows = _qwen2(config).windows
    head_dim = config.get("head_dim") or 128
    return _decoder(config, head_dim=head_dim, biases={"mlp": False}, head_norms=True, windows=windows)


def _gemma2(config: Config) -> ModelShape:
    windows = _windows({"sliding_window": 4096, **config}, lambda layer: layer % 2 == 0)
    tied = config.get("tie_word_embeddings", True)
    head_dim = config.get("head_dim") or 256
    capped = config.get("attn_logit_softcapping", 50.0) is not None
    return _decoder(
        config, head_dim=head_dim, biases={"mlp": False}, tied=tied, windows=windows, norms=4, softcap=capped
    )


def _gemma3(config: Config) -> ModelShape:
    # Gemma 3's files leave out what Transformers' defaults say.
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208, "sliding_window": 4096}
    sizes = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256}
    config = {**heads, **sizes, **config}
    every = config.get("sliding_window_pattern", 6)
    return _decoder(
        config,
        biases={"mlp": False},
        tied=config.get("tie_word_embeddings", True),
        windows=_windows(config, lambda layer: bool((layer + 1) % every)),
        norms=4,
        head_norms=True,
        softcap=config.get("attn_logit_softcapping") is not None,
        rotations=2,
    )


def _phi3(config: Config) -> ModelShape:
    shape = _decoder(
        config,
        biases={"qkv": False, "o": False, "mlp": False},
        windows=(config.get("sliding_window"),) * config["num_hidden_layers"],
    )
    qkv, output, gates, down = shape.projections
    joint = (LinearShape("qkv_proj", shape.hidden, sum(linear.outputs for linear in qkv)),)
    both = (LinearShape("gate_up_proj", shape.hidden, sum(linear.outputs for linear in gates)),)
    return replace(shape, projections=(joint, output, both, down))


_FAMILIES: Mapping[str, Callable[[Config], ModelShape]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gemma3": _gemma3,
    "phi3": _phi3,
}
