"""Peak memory in closed form: named parts, phase by phase, from a shape and a setup.

Each phase is taken at the moment that can be its highest, and the peak is the highest phase. Between the start and the
end of backward the activations shrink while the gradients grow, both linearly in depth, so one of the ends is the peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.activations import builds_mask, head_input_bytes, layer_activations, logit_bytes
from estimator.adapters import dora_temporaries
from estimator.arrays import Number, ceil, either, maximum, minimum, where, whole
from estimator.communication import Buffers
from estimator.conventions import conventions
from estimator.hardware import is_cpu, workspace_bytes
from estimator.result import Part
from estimator.setup import Setup
from estimator.shape import ModelShape
from estimator.states import (
    ADAPTER_START,
    Placement,
    States,
    Widths,
    as_built,
    keeps_master_weights,
    placement,
    states,
    widths,
)

PHASES = ("forward", "backward", "optimizer", "evaluation")
PART_NAMES = (
    "parameters", "gradients", "optimizer", "activations", "logits", "temporaries", "workspace", "communication",
)  # fmt: skip

# The allocator's segments over the highest activations with logits, as shares of these: what fragments keep (also among
# gathered parameters), and what expandable segments grow to.
_FRAGMENTED, _FRAGMENTED_GATHERED, _GROWN = 0.11, 0.18, 1.05
# Where lengths vary, what earlier and shorter batches' logits left in segments too short for later ones.
_EARLIER_LOGITS = 1.5

_LOSS_CHUNKS = 8
"""torchtune's, as in ``estimator.losses``."""

_CODE = "transformers 5 modelling code and torch autograd, read; checked on CPU allocator events"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """What is allocated at the highest moment of one phase, in bytes per device."""

    phase: str
    """One of PHASES."""
    parts: tuple[Part, ...]
    """Named from PART_NAMES, whole bytes; a part that is 0 is left out."""

    @property
    def bytes(self) -> int:
        return int(sum(part.amount for part in self.parts))


def memory_phases(shape: ModelShape, setup: Setup) -> tuple[PhaseMemory, ...]:
    """Every candidate for the peak of a step (``setup`` resolved); a phase can appear twice, at its start and end.

    More tokens, parameters or sequences never lower any of them.
    """
    ledger = _Ledger.of(shape, setup)
    return tuple(ledger.described(moment) for moment in ledger.moments())


def peak_bytes(shape: ModelShape, setup: Setup) -> Number:
    """The allocated peak alone, per device; an array where the setup's numbers are arrays."""
    return _highest(_Ledger.of(shape, setup).moments())


def peak_and_segment_bytes(shape: ModelShape, setup: Setup) -> tuple[Number, Number]:
    """The allocated peak, and what the caching allocator's segments add up to while the device has room; per device.

    Arrays where the setup's numbers are arrays. Segments are not given back, and what one phase leaves in them rarely
    suits the next: the rules in ``_Ledger.segments``.
    """
    ledger = _Ledger.of(shape, setup)
    moments = ledger.moments()
    peak = _highest(moments)
    return peak, maximum(ledger.segments(moments), peak)


def _highest(moments: tuple[_Moment, ...]) -> Number:
    peak: Number = 0
    for moment in moments:
        peak = maximum(peak, sum(whole(amount) for amount in moment.amounts))
    return peak


def peak_phase(phases: tuple[PhaseMemory, ...]) -> PhaseMemory:
    """The highest."""
    return max(phases, key=lambda phase: phase.bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moment:
    """One candidate for the peak: bytes in the order of PART_NAMES (numbers or arrays)."""

    phase: str
    amounts: tuple[Number, ...]


_Activations = tuple[Number, Number, Number]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ledger:
    """The amounts that several phases share."""

    shape: ModelShape
    setup: Setup
    size: Widths
    place: Placement
    states: States
    tokens: Number
    """Of one micro-batch on this device."""
    layers: Number
    in_flight: Number
    """Micro-batches whose activations a pipeline's first stage holds at once."""
    held_gradients: Number
    """Gradients that exist while a forward pass runs."""
    buffers: Buffers

    @classmethod
    def of(cls, shape: ModelShape, setup: Setup) -> _Ledger:
        shape = as_built(shape, setup)
        kept = states(shape, setup)
        accumulates = either(setup.accumulation > 1, setup.zero_grad == "zero")
        gpipe = setup.pipeline_schedule == "gpipe"
        size, place, layers = widths(setup), placement(setup), ceil(shape.layers / setup.pipeline_parallel)
        buffers = Buffers(shape=shape, setup=setup, size=size, place=place, states=kept, layers=layers)
        gradients = maximum(where(accumulates, kept.gradients, 0.0), buffers.unsharded_gradients())
        return cls(
            shape=shape,
            setup=setup,
            size=size,
            place=place,
            states=kept,
            tokens=setup.batch * setup.seq / setup.context_parallel,
            layers=layers,
            in_flight=where(setup.pipeline_parallel > 1, setup.accumulation, 1)
            if gpipe
            else minimum(setup.pipeline_parallel, setup.accumulation),
            held_gradients=buffers.engine.held_gradients() if keeps_master_weights(setup) else gradients,
            buffers=buffers,
        )

    def moments(self) -> tuple[_Moment, ...]:
        held = self._activations()
        found = [self.forward(held), self.backward_start(held), self.backward_end(held), self.optimizer_step()]
        if self.setup.sharding == "fsdp":
            found += [self.gathering(held), self.reducing(held), self.accumulated()]
        if self.setup.eval_batch is not None:
            found.append(self.evaluation())
        return tuple(found)

    # --- what the layers hold -------------------------------------------------------------------------------------

    def _layer(self, *, moe: bool) -> tuple[Number, Number, Number, Number]:
        """(kept, with full and with selective checkpointing, transient) bytes of one layer over the micro-batch."""
        layer = layer_activations(self.shape, self.setup, moe=moe)
        context = self.setup.seq
        kept = self.tokens * (layer.kept + layer.scores * context)
        if builds_mask(self.setup):
            # The mask is of one sequence; more sequences in the batch go without, but never below that.
            masked = layer_activations(self.shape, self.setup, moe=moe, masked=True)
            one = self.tokens / self.setup.batch * (masked.kept + masked.scores * context)
            kept = maximum(kept, one * (self.setup.batch if self.setup.attention_kernel else 1))
            kept = where(self.setup.batch > 1, kept, one)
        products = layer.transient_scores * context
        if builds_mask(self.setup) and self.setup.attention_kernel is None:
            products = where(self.setup.batch > 1, products, 0.0)
        attention = layer.attention_transient + products - layer.mlp
        transient = maximum(self.tokens * maximum(layer.transient, attention), dora_temporaries(self.shape, self.setup))
        if self.setup.base_quantization:  # one matrix in the compute type at a time
            matrix = self.shape.hidden * (self.shape.ffn if moe else self.shape.plain_ffn)
            transient = transient + self.size.compute * matrix / self.setup.tensor_parallel
        unreached = 0.0 if self.setup.checkpoint_reentrant else layer.quantized_inputs
        inputs = layer.layer_input + unreached
        selective = layer.selective + layer.selective_scores * context + unreached
        return kept, self.tokens * inputs, self.tokens * selective + layer.selective_fixed, transient

    def _activations(self) -> _Activations:
        """(kept through the forward pass, one layer's recomputed, transient) bytes on this device."""
        kept: Number = 0.0
        inputs: Number = 0.0
        selective: Number = 0.0
        largest: Number = 0.0
        transient: Number = 0.0
        for moe, count in ((False, self.shape.plain_layers), (True, self.shape.moe_layers)):
            if count:
                one, entering, saved, momentary = self._layer(moe=moe)
                share = count * self.layers / self.shape.layers
                kept += one * share
                inputs += entering * share
                selective += saved * share
                largest, transient = maximum(largest, one), maximum(transient, momentary)
        if self.setup.method == "freeze" and self.setup.trainable_layers:
            kept *= min(1.0, self.setup.trainable_layers / self.shape.layers)
        if self.setup.method == "adapter":  # nothing before the first prompt needs a gradient
            kept *= 1 - ADAPTER_START / self.shape.layers
        if self.setup.method in ("lora", "dora", "qlora") and self.shape.rms_norm:
            # Nothing before the first adapter needs a gradient: the first norm keeps nothing.
            kept -= self.tokens * 4 * self.shape.hidden / self.setup.tensor_parallel
        if self.setup.offload == "activations":  # only what the next layers need is on the device
            return 0.0, maximum(largest, kept / self.layers), transient
        if self.setup.checkpointing == "full":
            if self.setup.method in ("lora", "dora", "qlora") and not self.shape.experts:
                # Published FSDP peaks with adapters, 3B to 70B: once backward recomputes, the layers' inputs count twice.
                largest = largest + where(self.place.gathers, inputs, 0.0)
            return inputs * self.in_flight, largest, transient
        if self.setup.checkpointing == "selective":
            kept = minimum(kept, selective) if self.setup.method not in ("dora", "freeze") else selective
            return kept * self.in_flight, maximum(largest - kept / self.layers, 0.0), transient
        return kept * self.in_flight, 0.0, transient

    def _autocast_copies(self, phase: str) -> Number:
        """Half-precision casts of fp32 weights. Without checkpointing the graph keeps them until backward has passed;
        with it, autocast's cache keeps them to the end of the forward pass, and then only the head's stays."""
        if not self.size.autocast:
            return 0.0
        if not self.size.casts_weights:  # only the adapters are wider than the compute type
            return self.size.compute * self.states.trainable if self.size.trained == 4 else 0.0
        head = self.states.embedding
        if self.setup.loss == "chunked" and self.setup.method != "full":
            head = _LOSS_CHUNKS * head  # every chunk casts a frozen head anew
        if phase == "layers" or (self.setup.loss in ("fused-linear", "cut-cross-entropy") and phase != "forward"):
            head = 0.0  # backward is through with it, or the loss was with its own products
        if self.setup.loss == "fused-linear" and phase == "forward" and self.setup.method == "full":
            head = 2 * head  # the kernel's own cast beside the cached one
        # Autocast does not reach grouped experts; gathered matrices are cast layer by layer.
        layers = (self.states.linear - self.states.experts) / self.place.parameters
        if self.setup.base_quantization:
            layers = 0.0
        if self.setup.method == "freeze":  # no graph before the first trained layer
            layers = layers * ((self.setup.trainable_layers or 0) / self.shape.layers)
        # Autocast caches the casts of trained weights only; frozen ones live where the graph keeps them.
        cached = phase == "forward" and self.setup.method in ("full", "freeze")
        if cached or self.setup.checkpointing == "none":
            return self.size.compute * (layers + head)
        return self.size.compute * head

    # --- the phases -----------------------------------------------------------------------------------------------

    def forward(self, held: _Activations) -> _Moment:
        kept, _, _ = held
        logits = logit_bytes(self.shape, self.setup)
        # The loss, or the conversion of what the model returns, when autocast's cache is empty again.
        loss, copies = self.tokens * logits.forward, self._autocast_copies("forward")
        outputs, kept_copies = loss + self.tokens * logits.returned, self._autocast_copies("backward")
        returned = outputs + kept_copies > loss + copies
        return self._phase(
            "forward",
            gradients=self.held_gradients,
            activations=kept + self.tokens * head_input_bytes(self.shape, self.setup),
            logits=where(returned, outputs, loss) + logits.head_gradients,
            temporaries=where(returned, kept_copies, copies),
        )

    def gathering(self, held: _Activations) -> _Moment:
        """FSDP gathers the head, before there are logits; a tied one before everything else."""
        kept, communication = 0.0 if self.shape.tied_embeddings else held[0], self.buffers.gathering()
        return self._phase(
            "forward", gradients=self.held_gradients, activations=kept, communication=communication,
        )  # fmt: skip

    def reducing(self, held: _Activations) -> _Moment:
        """FSDP reduces the head's gradients, when only what the caller holds is left of the logits."""
        outputs = self.tokens * logit_bytes(self.shape, self.setup).held
        if self.setup.loss == "chunked":  # the log-softmaxes of the chunks to come, when the first two have been added
            outputs = self.tokens * self.shape.vocab * 4 * (1 - 2 / _LOSS_CHUNKS) / self.setup.tensor_parallel
        communication = self.buffers.reducing_head()
        return self._phase(
            "backward", gradients=self.held_gradients, activations=held[0], logits=outputs, communication=communication,
        )  # fmt: skip

    def accumulated(self) -> _Moment:
        """A micro-batch ends whose gradients are not reduced."""
        return self._phase("backward", gradients=self.held_gradients, communication=self.buffers.adding_table())

    def backward_start(self, held: _Activations) -> _Moment:
        kept, recomputed, transient = held
        logits = logit_bytes(self.shape, self.setup)
        # The softmax's backward, or the recomputation of the last layer with what the caller still holds of the logits.
        chain = self.tokens * logits.backward
        later = recomputed + transient
        first = self._head_gradient()
        head = self.tokens * head_input_bytes(self.shape, self.setup)
        outputs = self.tokens * logits.held
        layers_win = later + outputs + first > chain + head
        logits_bytes, activations = where(layers_win, outputs, chain), kept + where(layers_win, later, head)
        return self._phase(
            "backward",
            gradients=self.held_gradients,
            activations=activations,
            logits=logits_bytes + logits.head_gradients,
            temporaries=where(layers_win, self._autocast_copies("layers") + first, self._autocast_copies("backward")),
            communication=where(layers_win, self.buffers.at("head"), self.buffers.at("loss")),
        )

    def _head_gradient(self) -> Number:
        """What the head's own backward left for the layers': a tied one's waits for the lookup, another is new where no
        earlier micro-batch left one to add it to. Engines and FSDP reduce it at once."""
        if self.setup.method != "full" or self.setup.loss in ("fused-linear", "cut-cross-entropy"):
            return 0.0
        if self.setup.sharding not in ("none", "fsdp"):
            return 0.0
        width = self.size.stream if self.setup.sharding == "fsdp" else self.states.gradient_width
        if self.shape.tied_embeddings:
            return width * self.states.embedding
        new = either(self.held_gradients > 0, self.setup.sharding == "fsdp")
        return where(new, 0.0, width * self.states.embedding)

    def backward_end(self, held: _Activations) -> _Moment:
        _, recomputed, transient = held
        layer = recomputed
        if self.setup.checkpointing != "full" and self.setup.checkpointing != "selective":
            kept, _, _, _ = self._layer(moe=not self.shape.plain_layers)
            layer = kept if self.setup.method != "freeze" else 0.0
        # A tied table's gradients come from the head and, last, from the lookup; autograd adds the two into a third
        # tensor (in place where autocast's cast made a fresh one), and that to what an earlier micro-batch left.
        table: Number = 0.0
        if self.setup.method == "full" and self.shape.tied_embeddings:
            linear = self.setup.loss in (
                "fused-linear",
                "cut-cross-entropy",
            )  # the head's gradient came with the forward pass
            copies = (1 if self.size.casts_weights or linear else 2) + where(self.held_gradients > 0, 1, 0)
            table = self.states.embedding * self.states.gradient_width * copies
        buffers: Number = self.buffers.at("backward")
        reducing = self.buffers.reducing_table()
        table = where(self.place.gathers, 0.0, table) if self.setup.sharding == "fsdp" else table
        table_wins = table + reducing > layer + transient + buffers
        arriving = self.buffers.engine.arriving() if keeps_master_weights(self.setup) else 0.0
        return self._phase(
            "backward",
            gradients=self.states.gradients + arriving,
            activations=where(table_wins, 0.0, layer + transient),
            logits=self.tokens * logit_bytes(self.shape, self.setup).held,
            temporaries=where(table_wins, table, 0.0),
            communication=where(table_wins, where(reducing > 0, reducing, buffers), buffers),
        )

    def optimizer_step(self) -> _Moment:
        gradients = self.states.gradients
        if keeps_master_weights(self.setup):
            gradients = self.buffers.engine.step_gradients()
        return self._phase("optimizer", gradients=gradients, temporaries=self._optimizer_temporaries())

    def evaluation(self) -> _Moment:
        assert self.setup.eval_batch is not None
        tokens = self.setup.eval_batch * self.setup.seq / self.setup.context_parallel
        layer = layer_activations(self.shape, self.setup, moe=not self.shape.plain_layers)
        return self._phase(
            "evaluation",
            gradients=self.states.gradients if self.setup.zero_grad == "zero" else 0.0,
            activations=tokens * 2 * layer.layer_input,
            logits=tokens * logit_bytes(self.shape, self.setup).evaluation,
            temporaries=self._autocast_copies("backward"),
        )

    def _optimizer_temporaries(self) -> Number:
        if keeps_master_weights(self.setup):
            return self.buffers.engine.step_temporaries()
        trained, shards = self.states.trainable * self.size.trained, self.place.optimizer
        if self.setup.optimizer == "adamw":
            if conventions(self.setup).fused_optimizer:
                return 0.0
            if is_cpu(self.setup.accelerator):  # one tensor at a time: the square root and the scaled denominator
                return 2 * minimum(self._largest_trained(), trained) / shards
            return trained / shards  # foreach: the square roots of all second moments at once
        if self.setup.optimizer == "adafactor":
            # The update and what it is made from, fp32; of half parameters also their fp32 copy and the gradient's.
            tensors = 2 * 4 if self.size.trained == 4 else 4 * 4
            return tensors / self.size.trained * minimum(self._largest_trained(), trained) / shards
        return 0.0

    def _largest_trained(self) -> Number:
        width = self.size.trained
        if self.setup.method in ("lora", "dora", "qlora"):
            return width * (self.setup.lora_rank or 1) * max(self.shape.plain_ffn, self.shape.hidden)
        matrix = max(self.shape.plain_ffn, self.shape.query_width) * self.shape.hidden
        return width * maximum(self.states.embedding if self.setup.method == "full" else 0.0, matrix)

    # --- the allocator --------------------------------------------------------------------------------------------

    def segments(self, moments: tuple[_Moment, ...]) -> Number:
        """Beside what persists and the highest activations with logits stand, in segments of their own,

        - what the phases after them need (gradients and the optimizer's temporaries), or what their own fragments keep:
          the logits before and after their conversion, or a share of all, whichever is more;
        - communication buffers once more, which live in the pools of other streams;
        - where lengths vary, the logits of the longest batches before.

        Expandable segments grow in place, and lose a small share only. The shares are fitted to published reserved and
        device peaks of five sources (docs/accuracy.md).
        """
        tensors: Number = 0.0
        logits: Number = 0.0
        for moment in moments:
            if moment.phase != "optimizer":
                part = dict(zip(PART_NAMES, moment.amounts, strict=True))
                tensors = maximum(tensors, part["activations"] + part["logits"] + part["temporaries"])
                logits = maximum(logits, part["logits"])
        communication = self.buffers.pools()
        persistent = self.states.parameters + self.states.optimizer + workspace_bytes(self.setup.accelerator)
        later = self.states.gradients - self.held_gradients + self._optimizer_temporaries()
        persistent = persistent + self.held_gradients
        expandable = self.setup.expandable_segments or conventions(self.setup).expandable_segments
        if str(self.setup.sharding).startswith("zero"):
            fragments = _FRAGMENTED * tensors
            return self.buffers.engine.segments(persistent, tensors, fragments, expandable=expandable)
        converted = 0.0
        if self.setup.loss in ("standard", "fused-kernel"):
            converted = logit_bytes(self.shape, self.setup).converted * self.tokens
        if expandable:
            if conventions(self.setup).drops_logits:  # their block stays
                tensors = tensors + converted / 3
            grown = persistent + _GROWN * tensors + self.states.gradients - self.held_gradients
            return maximum(grown, persistent + later) + communication
        fragments = maximum(converted, where(self.place.gathers, _FRAGMENTED_GATHERED, _FRAGMENTED) * tensors)
        if self.setup.varying_lengths:
            fragments = fragments + _EARLIER_LOGITS * logits
        if self.setup.sharding == "fsdp" and self.setup.method == "full":
            return persistent + self._streams(moments, fragments)
        return persistent + tensors + maximum(later, fragments) + 2 * communication

    def _streams(self, moments: tuple[_Moment, ...], fragments: Number) -> Number:
        """FSDP2's three pools, which never mix: the all-gathers' outputs, the reduced gradients, and the rest."""
        tensors: Number = 0.0
        for moment in moments:
            if moment.phase != "optimizer":
                part = dict(zip(PART_NAMES, moment.amounts, strict=True))
                rest = part["activations"] + part["logits"] + part["temporaries"] + part["communication"]
                tensors = maximum(tensors, rest - (self.buffers.output() if moment.phase == "forward" else 0.0))
        reduced = maximum(self.states.gradients - self.held_gradients, 0.0)
        return reduced + self.buffers.outputs() + maximum(tensors + fragments, self._optimizer_temporaries())

    def _phase(
        self,
        phase: str,
        *,
        gradients: Number,
        activations: Number = 0.0,
        logits: Number = 0.0,
        temporaries: Number = 0.0,
        communication: Number | None = None,
    ) -> _Moment:
        workspace, states = workspace_bytes(self.setup.accelerator), self.states
        communication = self.buffers.at(phase) if communication is None else communication
        return _Moment(
            phase=phase,
            amounts=(
                states.parameters, gradients, states.optimizer, activations, logits, temporaries, workspace, communication,
            ),
        )  # fmt: skip

    def described(self, moment: _Moment) -> PhaseMemory:
        """With each part's formula and source."""
        setup = self.setup
        descriptions = (
            (f"{self.states.total:,.0f} parameters, {setup.precision}", _CODE),
            (f"{self.states.trainable:,.0f} trained x {self.states.gradient_width:g} B", _CODE),
            (f"{setup.optimizer} states of the trained parameters", _CODE),
            (f"{self.layers} layers x {self.tokens:,.0f} tokens, checkpointing {setup.checkpointing}", _CODE),
            (f"{self.tokens:,.0f} tokens x {self.shape.vocab:,} vocabulary, {setup.loss} loss", _CODE),
            ("casts of weights, the optimizer's square roots, or a second table gradient", _CODE),
            ("cuBLAS workspaces of two threads", "PyTorch CUDABlas defaults by architecture"),
            (f"{setup.sharding} over {setup.data_ranks} ranks", "framework defaults"),
        )
        parts = tuple(
            Part(name=name, amount=round(amount), formula=formula, source=source)
            for name, amount, (formula, source) in zip(PART_NAMES, moment.amounts, descriptions, strict=True)
            if round(amount)
        )
        return PhaseMemory(phase=moment.phase, parts=parts)
