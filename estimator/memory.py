"""Peak memory in closed form: named parts, phase by phase, from a shape and a setup.

Each phase is taken at the moment that can be its highest, and the peak is the highest phase. Between the start and the
end of backward the activations shrink while the gradients grow, both linearly in depth, so one of the ends is the peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.activations import builds_mask, head_input_bytes, layer_activations, logit_bytes
from estimator.arrays import Number, ceil, either, maximum, minimum, where, whole
from estimator.hardware import is_cpu, workspace_bytes
from estimator.result import Part
from estimator.setup import Setup
from estimator.shape import ModelShape
from estimator.states import Placement, States, Widths, keeps_master_weights, placement, states, widths

PHASES = ("forward", "backward", "optimizer", "evaluation")
PART_NAMES = (
    "parameters", "gradients", "optimizer", "activations", "logits", "temporaries", "workspace", "communication",
)  # fmt: skip

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
    peak: Number = 0
    for moment in _Ledger.of(shape, setup).moments():
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

    @classmethod
    def of(cls, shape: ModelShape, setup: Setup) -> _Ledger:
        kept = states(shape, setup)
        # DeepSpeed's flat gradient buffer is never freed.
        accumulates = either(setup.accumulation > 1, setup.zero_grad == "zero" or keeps_master_weights(setup))
        gpipe = setup.pipeline_schedule == "gpipe"
        return cls(
            shape=shape,
            setup=setup,
            size=widths(setup),
            place=placement(setup),
            states=kept,
            tokens=setup.batch * setup.seq / setup.context_parallel,
            layers=ceil(shape.layers / setup.pipeline_parallel),
            in_flight=where(setup.pipeline_parallel > 1, setup.accumulation, 1)
            if gpipe
            else minimum(setup.pipeline_parallel, setup.accumulation),
            held_gradients=where(accumulates, kept.gradients, 0.0),
        )

    def moments(self) -> tuple[_Moment, ...]:
        found = (self.forward(), self.backward_start(), self.backward_end(), self.optimizer_step())
        return (*found, self.evaluation()) if self.setup.eval_batch is not None else found

    # --- what the layers hold -------------------------------------------------------------------------------------

    def _layer(self, *, moe: bool) -> tuple[Number, Number, Number]:
        """(kept, checkpointed, transient) bytes of one layer over the micro-batch."""
        layer = layer_activations(self.shape, self.setup, moe=moe)
        context = self.setup.seq
        kept = self.tokens * (layer.kept + layer.scores * context)
        if builds_mask(self.setup):
            # The mask is of one sequence; more sequences in the batch go without, but never below that.
            masked = layer_activations(self.shape, self.setup, moe=moe, masked=True)
            one = self.tokens / self.setup.batch * (masked.kept + masked.scores * context)
            kept = maximum(kept, one * (self.setup.batch if self.setup.attention_kernel else 1))
        transient = self.tokens * (layer.transient + layer.transient_scores * context)
        return kept, self.tokens * layer.layer_input, transient

    def _activations(self) -> tuple[Number, Number, Number]:
        """(kept through the forward pass, one layer's recomputed, transient) bytes on this device."""
        kept: Number = 0.0
        inputs: Number = 0.0
        largest: Number = 0.0
        transient: Number = 0.0
        for moe, count in ((False, self.shape.plain_layers), (True, self.shape.moe_layers)):
            if count:
                one, entering, momentary = self._layer(moe=moe)
                share = count * self.layers / self.shape.layers
                kept += one * share
                inputs += entering * share
                largest, transient = maximum(largest, one), maximum(transient, momentary)
        if self.setup.method == "freeze" and self.setup.trainable_layers:
            kept *= min(1.0, self.setup.trainable_layers / self.shape.layers)
        if self.setup.method in ("lora", "dora", "qlora") and self.shape.rms_norm:
            # Nothing before the first adapter needs a gradient: the first norm keeps nothing.
            kept -= self.tokens * 4 * self.shape.hidden / self.setup.tensor_parallel
        if self.setup.checkpointing == "full":
            if self.setup.method in ("lora", "dora", "qlora") and not self.shape.experts:
                # Published FSDP peaks with adapters grow by two layers' activations, not one, and by no more logits.
                layers = where(self.place.gathers, 2, 1)
                largest, transient = layers * largest, layers * transient
            return inputs * self.in_flight, largest, transient
        if self.setup.checkpointing == "selective":
            return (inputs + (kept - inputs) * 0.5) * self.in_flight, largest * 0.5, transient
        return kept * self.in_flight, 0.0, transient

    def _autocast_copies(self, phase: str) -> Number:
        """Half-precision casts of fp32 weights. Without checkpointing the graph keeps them until backward has passed;
        with it, autocast's cache keeps them to the end of the forward pass, and then only the head's stays."""
        if not self.size.autocast:
            return 0.0
        if not self.size.casts_weights:  # only the adapters are wider than the compute type
            return self.size.compute * self.states.trainable if self.size.trained == 4 else 0.0
        head = self.states.embedding
        layers = self.states.linear / self.place.parameters  # gathered ones are cast layer by layer
        # Autocast caches the casts of trained weights only; frozen ones live where the graph keeps them.
        cached = phase == "forward" and self.setup.method == "full"
        if cached or self.setup.checkpointing != "full":
            return self.size.compute * (layers + head)
        return self.size.compute * head

    # --- the phases -----------------------------------------------------------------------------------------------

    def forward(self) -> _Moment:
        kept, _, _ = self._activations()
        logits = logit_bytes(self.shape, self.setup)
        return self._phase(
            "forward",
            gradients=self.held_gradients,
            activations=kept + self.tokens * head_input_bytes(self.shape, self.setup),
            logits=self.tokens * logits.forward + logits.head_gradients,
            temporaries=self._autocast_copies("forward"),
        )

    def backward_start(self) -> _Moment:
        kept, recomputed, transient = self._activations()
        logits = logit_bytes(self.shape, self.setup)
        # The softmax's backward, or the recomputation of the last layer with what the caller still holds of the logits.
        chain = self.tokens * logits.backward
        later = recomputed + transient
        head = self.tokens * head_input_bytes(self.shape, self.setup)
        held = maximum(self.tokens * (logits.kept - 4 * self.shape.vocab / self.setup.tensor_parallel), 0.0)
        layers_win = later + held > chain + head
        logits_bytes, activations = where(layers_win, held, chain), kept + where(layers_win, later, head)
        return self._phase(
            "backward",
            gradients=self.held_gradients,
            activations=activations,
            logits=logits_bytes + logits.head_gradients,
            temporaries=self._autocast_copies("backward"),
        )

    def backward_end(self) -> _Moment:
        _, recomputed, transient = self._activations()
        layer = recomputed
        if self.setup.checkpointing != "full" and self.setup.checkpointing != "selective":
            kept, _, _ = self._layer(moe=not self.shape.plain_layers)
            layer = kept if self.setup.method != "freeze" else 0.0
        # A tied table's gradients come from the head and, last, from the lookup; autograd adds the two into a third
        # tensor (in place where autocast's cast made a fresh one), and that to what an earlier micro-batch left.
        table: Number = 0.0
        if self.setup.method == "full" and self.shape.tied_embeddings:
            copies = (1 if self.size.casts_weights else 2) + where(self.held_gradients > 0, 1, 0)
            table = self.states.embedding * self.states.gradient_width * copies
        table_wins = table > layer + transient
        return self._phase(
            "backward",
            gradients=self.states.gradients,
            activations=where(table_wins, 0.0, layer + transient),
            temporaries=where(table_wins, table, 0.0),
        )

    def optimizer_step(self) -> _Moment:
        return self._phase("optimizer", gradients=self.states.gradients, temporaries=self._optimizer_temporaries())

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
            # DeepSpeed casts its partition of the gradients to fp32 before torch's AdamW takes its square roots.
            share = 0.0 if self.setup.offload else self.states.trainable * 4 / self.place.optimizer
            table = self.states.embedding * self.size.compute if self.setup.sharding == "zero3" else 0.0
            return share * (2 if self.setup.optimizer == "adamw" else 1) + table
        trained, shards = self.states.trainable * self.size.trained, self.place.optimizer
        if self.setup.optimizer == "adamw":
            if is_cpu(self.setup.accelerator):  # one tensor at a time: the square root and the scaled denominator
                return 2 * minimum(self._largest_trained(), trained) / shards
            return trained / shards  # foreach: the square roots of all second moments at once
        if self.setup.optimizer == "adafactor":
            return 2 * minimum(self._largest_trained(), trained) / shards
        return 0.0

    def _largest_trained(self) -> Number:
        width = self.size.trained
        if self.setup.method in ("lora", "dora", "qlora"):
            return width * (self.setup.lora_rank or 1) * max(self.shape.plain_ffn, self.shape.hidden)
        matrix = max(self.shape.plain_ffn, self.shape.query_width) * self.shape.hidden
        return width * maximum(self.states.embedding if self.setup.method == "full" else 0.0, matrix)

    def _communication(self, phase: str) -> Number:
        """Buffers of gradient reduction and parameter gathering."""
        kind, ranks = self.setup.sharding, self.setup.data_ranks
        if kind == "ddp":  # torch's reducer: buckets beside the gradients
            return where(ranks > 1, self.states.trainable * self.size.trained, 0.0)
        if str(kind).startswith("zero") and phase in ("forward", "backward"):
            return self._deepspeed_buffers(phase)
        if kind in ("fsdp", "zero3") and phase != "optimizer":
            # Two layers gathered (the current one and the prefetched), and in backward one layer's full gradients.
            tables = self.states.embedding * (1 if self.shape.tied_embeddings else 2)
            layer = minimum(self.states.largest_layer, self.states.total)
            adapters = self.setup.method in ("lora", "dora", "qlora")
            trained = self.states.trainable / self.layers if adapters else layer
            gathered = self.size.compute * ((1 if adapters else 2) * layer + tables)
            reduced = self.states.gradient_width * trained if phase == "backward" else 0.0
            return where(self.place.gathers, gathered + reduced, 0.0)
        return 0.0

    def _deepspeed_buffers(self, phase: str) -> Number:
        """ZeRO-3 keeps up to stage3_max_live_parameters gathered, and its largest table; ZeRO-1 and 2 reduce through
        buckets of 5e8 elements (DeepSpeed's defaults; checked on published peaks of one card)."""
        table = self.states.embedding * self.size.compute
        if self.setup.sharding == "zero3":
            return self.size.compute * minimum(self.states.total, 1e9) + table
        if phase == "forward":
            return 0.0
        return self.size.compute * minimum(self.states.trainable, 5e8) + 2 * table

    def _phase(
        self,
        phase: str,
        *,
        gradients: Number,
        activations: Number = 0.0,
        logits: Number = 0.0,
        temporaries: Number = 0.0,
    ) -> _Moment:
        workspace = workspace_bytes(self.setup.accelerator)
        states, communication = self.states, self._communication(phase)
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
