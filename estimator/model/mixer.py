"""Layers that carry a state along the sequence instead of attending to it: Mamba-2 mixers and gated delta nets.

Letters as in shape.py, and d the width of the values (heads times their width), g·n that of the keys (B and C in Mamba-2),
Q the chunk. Both are one projection in, a short convolution over what is keyed, a scan in chunks, a gated norm, and one projection out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from estimator.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixer:
    """The layers of a hybrid that have one, and its dimensions. Widths in elements."""

    layers: int
    heads: int
    head_dim: int
    state: int
    """Width of one key."""
    groups: int
    """Heads of the keys: a group of value heads shares one."""
    conv: int = 4
    """Tokens that the convolution sees."""
    chunk: int = 128
    """Tokens that the scan takes as one product."""
    delta_rule: bool = False
    """A gated delta net (Qwen3-Next) instead of Mamba-2: no skip of the input, no bias, a norm of one head's width."""
    norm: bool = True
    """Its output has a norm of its own."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if not isinstance(value, bool) and value < 1:
                raise InputError(f"model: {spec.name} of its mixers is {value}; it must be 1 or more")

    @property
    def values(self) -> int:
        """d."""
        return self.heads * self.head_dim

    @property
    def convolved(self) -> int:
        """What goes through the convolution: values, and keys for writing and for reading."""
        return self.values + 2 * self.groups * self.state

    @property
    def projected(self) -> int:
        """Outputs of the projection in: what is convolved, the gate, a step size a head (the delta rule: and a decay)."""
        return self.convolved + self.values + self.heads * (2 if self.delta_rule else 1)


def mixer_tensors(mixer: Mixer, hidden: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of one layer's parameters: h·(2d + 2gn + a) in, d·h out, the convolution, its bias, and three numbers a
    head (Mamba-2: arXiv:2405.21060, section 7; transformers modeling_nemotron_h and modeling_qwen3_next)."""
    found = [(mixer.projected, hidden), (hidden, mixer.values), (mixer.convolved, mixer.conv)]
    if not mixer.delta_rule:
        found.append((mixer.convolved, 1))
    if mixer.norm:
        found.append((mixer.head_dim if mixer.delta_rule else mixer.values, 1))
    return (*found, *((mixer.heads, 1),) * (2 if mixer.delta_rule else 3))


def mixer_parameters(mixer: Mixer, hidden: int) -> int:
    """Of one layer."""
    return sum(rows * columns for rows, columns in mixer_tensors(mixer, hidden))


def scan_flops(mixer: Mixer) -> float:
    """Of one token in one layer, forward: within a chunk scores 2Qgn and their sums 2Qd (the masked half counted, as of
    attention), and the state's writing and reading 2nd each. The delta rule solves a triangular system of a chunk beside that:
    Q·(n + d/a) a head twice more (arXiv:2412.06464, section 3)."""
    within = 2.0 * mixer.chunk * (mixer.groups * mixer.state + mixer.values)
    solved = 2.0 * mixer.chunk * (mixer.heads * mixer.state + mixer.values) if mixer.delta_rule else 0.0
    return within + solved + 4.0 * mixer.state * mixer.values


def scan_bytes(mixer: Mixer, compute: float) -> float:
    """Of one token in one layer, forward: the convolution reads and writes its input; the scan reads that and writes its
    result; every chunk's state is written, passed on and read in fp32; the gated norm reads two and writes one."""
    states = 3.0 * 4.0 * mixer.values * mixer.state / mixer.chunk
    return compute * (3.0 * mixer.convolved + 4.0 * mixer.values) + states


def mixer_activation_bytes(mixer: Mixer, compute: float, *, trains: bool) -> float:
    """What one layer keeps of a token for backward, as mamba_ssm's fused kernels have it (mamba_split_conv1d_scan_combined): the
    projection's outputs and the scan's result; convolution, step sizes and states are computed again, the gated norm with
    them. The projection out keeps its input where it trains. Not checked against a measurement.

    Without those kernels (transformers' own code in torch) a layer keeps many times that.
    """
    return compute * (mixer.projected + mixer.values * (2 if trains else 1)) + 4.0 * mixer.heads
