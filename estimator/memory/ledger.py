"""The amounts of one setup that the phases of a step share; bytes per device."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number, ceil, either, maximum, minimum, where
from estimator.hardware import workspace_bytes
from estimator.memory.communication import Buffers
from estimator.memory.held import Held, held
from estimator.memory.logits import LogitBytes, head_input_bytes, logit_bytes
from estimator.memory.states import Placement, States, Widths, as_built, keeps_master_weights, placement, states, widths
from estimator.model.shape import ModelShape
from estimator.setup import Setup

PART_NAMES = (
    "parameters", "gradients", "optimizer", "activations", "logits", "temporaries", "workspace", "communication",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One candidate for the peak: bytes in the order of PART_NAMES (numbers or arrays)."""

    phase: str
    amounts: tuple[Number, ...]

    def part(self, name: str) -> Number:
        return self.amounts[PART_NAMES.index(name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Of one resolved setup."""

    shape: ModelShape
    setup: Setup
    size: Widths
    place: Placement
    states: States
    tokens: Number
    """Of one micro-batch on this device."""
    layers: Number
    held: Held
    """By the layers."""
    logits: LogitBytes
    head_inputs: Number
    """What the last norm and the head keep."""
    held_gradients: Number
    """Gradients that exist while a forward pass runs."""
    workspace: Number
    buffers: Buffers

    @classmethod
    def of(cls, shape: ModelShape, setup: Setup) -> Ledger:
        shape = as_built(shape, setup)
        kept = states(shape, setup)
        size, place, layers = widths(setup), placement(setup), ceil(shape.layers / setup.pipeline_parallel)
        tokens = setup.batch * setup.seq / setup.context_parallel
        buffers = Buffers(shape=shape, setup=setup, size=size, place=place, states=kept, layers=layers)
        return cls(
            shape=shape,
            setup=setup,
            size=size,
            place=place,
            states=kept,
            tokens=tokens,
            layers=layers,
            held=held(shape, setup, size, place, tokens=tokens, layers=layers, in_flight=_in_flight(setup)),
            logits=logit_bytes(shape, setup),
            head_inputs=tokens * head_input_bytes(shape, setup),
            held_gradients=_held_gradients(setup, kept, buffers),
            workspace=workspace_bytes(setup.accelerator),
            buffers=buffers,
        )

    def moment(
        self,
        phase: str,
        *,
        gradients: Number,
        activations: Number = 0.0,
        logits: Number = 0.0,
        temporaries: Number = 0.0,
        communication: Number | None = None,
    ) -> Moment:
        """``communication``: the phase's usual buffers where it is not given."""
        communication = self.buffers.at(phase) if communication is None else communication
        states = self.states
        return Moment(
            phase=phase,
            amounts=(
                states.parameters, gradients, states.optimizer, activations, logits, temporaries, self.workspace,
                communication,
            ),
        )  # fmt: skip

    def beside(self, logits: Number) -> Number:
        """What the layers hold beside ``logits``: 1F1B's last stage, which alone has these, holds one micro-batch's, where the
        first holds as many as there are stages. Whichever stage has more."""
        alone = 0.0 if self.setup.pipeline_schedule == "gpipe" else 1 - 1 / _in_flight(self.setup)
        return self.held.kept - minimum(self.held.kept * alone, logits)


def _in_flight(setup: Setup) -> Number:
    """Micro-batches whose activations a pipeline's first stage holds at once."""
    if setup.pipeline_schedule == "gpipe":
        return where(setup.pipeline_parallel > 1, setup.accumulation, 1)
    return minimum(setup.pipeline_parallel, setup.accumulation)


def _held_gradients(setup: Setup, kept: States, buffers: Buffers) -> Number:
    if keeps_master_weights(setup):
        return buffers.engine.held_gradients()
    accumulates = either(setup.accumulation > 1, setup.zero_grad == "zero")
    return maximum(where(accumulates, kept.gradients, 0.0), buffers.unsharded_gradients())
