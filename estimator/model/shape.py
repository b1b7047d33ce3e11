"""The shape of a decoder: everything that the formulas need to know of a model, and its parameters counted structurally.

Letters in the docstrings: L layers, h hidden, a heads, k key/value heads, d head width, f feed-forward width, V vocabulary,
E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, fields

from estimator.errors import InputError
from estimator.model.mixer import Mixer, mixer_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer's dimensions. Widths in elements."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of the feed-forward; of one expert where there are experts."""
    gated: bool
    """The feed-forward has three matrices (gate, up, down) instead of two."""
    vocab: int
    tied_embeddings: bool
    experts: int = 0
    active_experts: int = 0
    shared_experts: int = 0
    dense_layers: int = 0
    """In a mixture of experts: the first layers that have an ordinary feed-forward."""
    dense_ffn: int = 0
    moe_every: int = 1
    """Every n-th layer has the experts, the others an ordinary feed-forward."""
    rms_norm: bool = True
    norm_bias: bool = False
    attention_bias: str = ""
    """Which projections have a bias: "", "qkv", "qkvo" or "o"."""
    mlp_bias: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    """The norms of queries and keys have a weight for each element of all heads, not of one."""
    norms_per_layer: int = 2
    extra_norms: int = 1
    """Norms outside the layers: the last one, and any after the embedding."""
    positions: int = 0
    """Rows of a learned position embedding."""
    head_bias: bool = False
    window: int = 0
    """Sliding attention window in tokens; 0 for none."""
    window_every: int = 1
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    """Multi-head latent attention where above 0."""
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    mixer: Mixer | None = None
    """Of a hybrid: the layers that carry a state along the sequence."""
    attending: int | None = None
    """Of a hybrid: the layers with attention; ``None`` where all have it."""
    lone_feed_forwards: int = 0
    """Layers that are a feed-forward alone, in models whose layers are each a mixer, attention or a feed-forward
    (Nemotron-H); ``dense_layers`` of them are ordinary ones where there are experts."""
    expert_hidden: int = 0
    """Width in which routed experts work, between two projections of the layer (LatentMoE); 0 for the stream's."""
    predicted_ahead: int = 0
    """Further tokens that pretraining predicts, each through one more layer and the head (multi-token prediction), in code
    that trains these: Megatron's. transformers leaves them out, and so do parameter counts."""
    attention_gate: bool = False
    """The query projection also makes a gate for attention's output."""
    shared_gate: bool = False
    """The shared expert has a gate of one number a token."""
    extra_parameters: int = 0
    """Parameters that an inferred shape leaves over: counted in states and checkpoints, not in activations."""
    inferred: bool = False
    guessed: bool = False
    """Read from a config whose type no family describes, as if it were Llama's or GPT's."""
    code_only: bool = False
    """Of a model whose layers no formula knows: only layers, width and vocabulary are its own, the rest stands for nothing."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "moe_every", "window_every"):
            if getattr(self, name) < 1:
                raise InputError(f"model {self.name}: {name} is {getattr(self, name)}; it must be 1 or more")
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, int) and value < 0:
                raise InputError(f"model {self.name}: {spec.name} is {value}; it must not be negative")
        if self.heads % self.kv_heads and not self.inferred:
            raise InputError(f"model {self.name}: {self.heads} heads are not a multiple of {self.kv_heads} kv_heads")
        if self.experts and not 0 < self.active_experts <= self.experts:
            raise InputError(f"model {self.name}: active_experts is {self.active_experts} of {self.experts} experts")

    @property
    def latent_attention(self) -> bool:
        return self.kv_lora_rank > 0

    @property
    def query_width(self) -> int:
        """Elements of all query heads of one token."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of all key heads (as many again for the values) of one token."""
        return self.kv_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Elements of the attention's output before its projection."""
        return self.heads * self.v_head_dim if self.latent_attention else self.query_width

    @property
    def attention_layers(self) -> int:
        return self.layers if self.attending is None else self.attending

    @property
    def feed_forwards(self) -> int:
        """Layers with a feed-forward of either kind."""
        return self.lone_feed_forwards or self.layers

    @property
    def branches(self) -> int:
        """What adds to the residual stream: attention (or a mixer) and feed-forward in each layer, or one of them."""
        return self.layers if self.lone_feed_forwards else 2 * self.layers

    @property
    def moe_layers(self) -> int:
        if not self.experts:
            return 0
        return (self.feed_forwards - self.dense_layers) // self.moe_every

    @property
    def plain_layers(self) -> int:
        """Layers with an ordinary feed-forward."""
        return self.feed_forwards - self.moe_layers

    @property
    def routed_hidden(self) -> int:
        """Width of the tokens that are sent to experts."""
        return self.expert_hidden or self.hidden

    @property
    def plain_ffn(self) -> int:
        return self.dense_ffn if self.experts and self.dense_ffn else self.ffn

    @property
    def matrices(self) -> int:
        """Matrices of one feed-forward."""
        return 3 if self.gated else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters by kind over the whole model; each counted once, a tied head only in ``embedding``."""

    embedding: int
    """Token and learned position embeddings."""
    attention: int
    """Projections and their biases."""
    mlp: int
    """Ordinary feed-forwards and shared experts, with their biases."""
    experts: int
    """All routed experts."""
    router: int
    """And what stands before and behind the routed experts."""
    mixer: int
    """Of a hybrid: what carries a state along the sequence."""
    norm: int
    head: int
    """The output projection where it is not tied."""
    other: int
    """``ModelShape.extra_parameters``."""

    @property
    def total(self) -> int:
        return sum(getattr(self, spec.name) for spec in fields(self))

    @property
    def linear(self) -> int:
        """Parameters in the matrices (and biases) of the layers: what autocast copies, besides the head."""
        return self.attention + self.mlp + self.experts + self.router + self.mixer

    @property
    def layered(self) -> int:
        """Parameters inside the repeated layers, the norms outside them included."""
        return self.linear + self.norm + self.other


def attention_parameters(shape: ModelShape) -> int:
    """Of one layer: h·(2·a·d + 2·k·d) with biases; the low-rank projections of latent attention (DeepSeek-V2 report)."""
    h = shape.hidden
    if shape.latent_attention:
        rope, nope, value = shape.qk_rope_head_dim, shape.qk_nope_head_dim, shape.v_head_dim
        query_out = shape.heads * (nope + rope)
        rank = shape.q_lora_rank
        query = h * rank + rank + rank * query_out if rank else h * query_out
        down = h * (shape.kv_lora_rank + rope) + shape.kv_lora_rank
        up = shape.kv_lora_rank * shape.heads * (nope + value)
        return query + down + up + shape.heads * value * h
    q, kv = shape.query_width, shape.kv_width
    bias = {"": 0, "qkv": q + 2 * kv, "qkvo": q + 2 * kv + h, "o": h}[shape.attention_bias]
    sinks = shape.heads if shape.family == "gpt_oss" else 0
    gate = h * q if shape.attention_gate else 0
    normed = (q + kv if shape.wide_qk_norm else 2 * shape.head_dim) if shape.qk_norm else 0
    return h * (2 * q + 2 * kv) + gate + bias + sinks + normed


def mlp_parameters(shape: ModelShape, width: int) -> int:
    """Of one feed-forward of ``width``: its matrices, and biases where the family has them."""
    return _feed_forward(shape, shape.hidden, width)


def expert_parameters(shape: ModelShape) -> int:
    """Of one routed expert."""
    return _feed_forward(shape, shape.routed_hidden, shape.ffn)


def _feed_forward(shape: ModelShape, hidden: int, width: int) -> int:
    bias = ((shape.matrices - 1) * width + hidden) if shape.mlp_bias else 0
    return shape.matrices * hidden * width + bias


@functools.lru_cache(maxsize=256)
def count_parameters(shape: ModelShape) -> ParameterCount:
    """Every parameter of the model by kind. Checked against ``numel`` of transformers' models on the meta device."""
    h = shape.hidden
    per_norm = h * (2 if shape.norm_bias else 1)
    router_bias = shape.experts if shape.mlp_bias or shape.family == "deepseek_v3" else 0
    if shape.family == "deepseek_v3":
        router_bias = 0  # e_score_correction_bias is a buffer
    latent = 2 * h * shape.expert_hidden + (h if shape.shared_gate else 0)
    return ParameterCount(
        embedding=shape.vocab * h + shape.positions * h,
        attention=shape.attention_layers * attention_parameters(shape),
        mlp=shape.plain_layers * mlp_parameters(shape, shape.plain_ffn)
        + shape.moe_layers * shape.shared_experts * mlp_parameters(shape, shape.ffn),
        experts=shape.moe_layers * shape.experts * expert_parameters(shape),
        router=shape.moe_layers * (h * shape.experts + router_bias + latent),
        mixer=shape.mixer.layers * mixer_parameters(shape.mixer, h) if shape.mixer else 0,
        norm=(shape.layers * shape.norms_per_layer + shape.extra_norms) * per_norm,
        head=(0 if shape.tied_embeddings else shape.vocab * h) + (shape.vocab if shape.head_bias else 0),
        other=shape.extra_parameters,
    )


def active_parameters(shape: ModelShape) -> int:
    """Parameters that one token's forward pass uses: all, less the experts that it is not routed to."""
    count = count_parameters(shape)
    if not shape.experts:
        return count.total
    return count.total - count.experts + count.experts * shape.active_experts // shape.experts


def with_predictions(shape: ModelShape) -> ModelShape:
    """The shape with the layers of ``predicted_ahead`` among its own (a layer each; Nemotron-H: attention and experts)."""
    ahead = shape.predicted_ahead
    if not ahead:
        return shape
    if not shape.lone_feed_forwards:
        return dataclasses.replace(shape, layers=shape.layers + ahead)
    return dataclasses.replace(
        shape,
        layers=shape.layers + 2 * ahead,
        attending=shape.attention_layers + ahead,
        lone_feed_forwards=shape.lone_feed_forwards + ahead,
    )


_LORA_DEFAULT = ("q_proj", "k_proj", "v_proj", "o_proj")
_LORA_ALL = (*_LORA_DEFAULT, "gate_proj", "up_proj", "down_proj")
# What other families and tables call the same projections.
_LORA_NAMES = {
    "query_key_value": ("q_proj", "k_proj", "v_proj"), "c_attn": ("q_proj", "k_proj", "v_proj"), "W_pack": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"), "dense": ("o_proj",), "c_proj": ("o_proj", "down_proj"), "output_proj": ("o_proj",), "out_proj": ("o_proj",),
    "Wqkv": ("q_proj", "k_proj", "v_proj"), "wq": ("q_proj",), "wk": ("k_proj",), "wv": ("v_proj",), "wo": ("o_proj",), "w1": ("gate_proj",), "w2": ("down_proj",), "w3": ("up_proj",),
    "fc1": ("up_proj",), "c_fc": ("up_proj",), "fc_in": ("up_proj",), "fc2": ("down_proj",), "fc_out": ("down_proj",), "dense_h_to_4h": ("up_proj",), "dense_4h_to_h": ("down_proj",), "mlp": ("gate_proj", "up_proj", "down_proj"),
    "query": ("q_proj",), "key": ("k_proj",), "value": ("v_proj",), "projection": ("o_proj",), "head": (), "lm_head": (),
    "all-linear": _LORA_ALL, "all": _LORA_ALL,
}  # fmt: skip


def lora_modules(shape: ModelShape, targets: str | None) -> tuple[tuple[str, int, int], ...]:
    """The adapted matrices of one layer as (name, inputs, outputs). Raises InputError for a name that no layer has."""
    h, f = shape.hidden, shape.plain_ffn
    sizes = {
        "q_proj": (h, shape.query_width),
        "k_proj": (h, shape.kv_width),
        "v_proj": (h, shape.kv_width),
        "o_proj": (shape.value_width, h),
        "gate_proj": (h, f),
        "up_proj": (h, f),
        "down_proj": (f, h),
    }
    names: list[str] = []
    for target in (targets or " ".join(_LORA_DEFAULT)).replace(",", " ").split():
        short = target.rsplit(".", 1)[-1]
        if short not in sizes and short not in _LORA_NAMES:
            raise InputError(
                f"lora_targets: {target!r} is not a projection; write all-linear or some of {' '.join(sizes)}"
            )
        names += _LORA_NAMES.get(short, (short,))
    if not shape.gated:
        names = [name for name in names if name != "gate_proj"]
    return tuple((name, *sizes[name]) for name in dict.fromkeys(names))


def lora_parameters(shape: ModelShape, rank: int, targets: str | None, *, dora: bool = False) -> int:
    """Adapter parameters over all layers: rank·(inputs + outputs) a matrix, and with DoRA one magnitude an output."""
    modules = lora_modules(shape, targets)
    per_layer = sum(rank * (inputs + outputs) + (outputs if dora else 0) for _, inputs, outputs in modules)
    return shape.layers * per_layer
