"""What the caching allocator's segments add up to while the device has room: segments are not given back, and what one phase
leaves in them rarely suits the next. The shares are fitted to published reserved and device peaks of five sources.
"""

from __future__ import annotations

from estimator.arrays import Number, maximum, where
from estimator.conventions import conventions, shards_flat
from estimator.memory.flat_parameters import ADAPTERS
from estimator.memory.ledger import Ledger, Moment
from estimator.memory.phases import optimizer_temporaries
from estimator.memory.widths import accumulates_in_fp32

# The allocator's segments over the highest activations with logits, as shares of these: what fragments keep (also among
# gathered parameters), and what expandable segments grow to.
_FRAGMENTED, _FRAGMENTED_GATHERED, _GROWN = 0.11, 0.18, 1.05
# Where lengths vary, what earlier and shorter batches' logits left in segments too short for later ones.
_EARLIER_LOGITS = 1.5
# FSDP1 gathers frozen units on a stream whose blocks come back late (``record_stream``): the least that segments have beyond the
# tensors, full device or not. 70B with adapters on two devices fits to 43 of 79 GiB, and not to 66.
LATE_BLOCKS = 0.20


def segment_bytes(ledger: Ledger, moments: tuple[Moment, ...]) -> Number:
    """Beside what persists and the highest activations with logits stand, in segments of their own,

    - what the phases after them need (gradients and the optimizer's temporaries), or what their own fragments keep: the
      logits before and after their conversion, or a share of all, whichever is more;
    - communication buffers once more, which live in the pools of other streams;
    - where lengths vary, the logits of the longest batches before.

    Expandable segments grow in place, and lose a small share only.
    """
    setup, states, buffers = ledger.setup, ledger.states, ledger.buffers
    tensors: Number = 0.0
    logits: Number = 0.0
    for moment in moments:
        if moment.phase != "optimizer":
            tensors = maximum(tensors, _tensors(moment))
            logits = maximum(logits, moment.part("logits"))
    persistent = states.parameters + states.optimizer + ledger.workspace + ledger.held_gradients
    later = states.gradients - ledger.held_gradients + optimizer_temporaries(ledger)
    expandable = setup.expandable_segments or conventions(setup).expandable_segments
    if str(setup.sharding).startswith("zero") and not accumulates_in_fp32(setup):
        return buffers.engine.segments(persistent, tensors, _FRAGMENTED * tensors, expandable=expandable)
    converted = ledger.logits.converted * ledger.tokens if setup.loss in ("standard", "fused-kernel") else 0.0
    if expandable:
        if conventions(setup).drops_logits:  # their block stays
            tensors = tensors + converted / 3
        grown = persistent + _GROWN * tensors + states.gradients - ledger.held_gradients
        return maximum(grown, persistent + later) + buffers.pools()
    fragments = maximum(converted, where(ledger.place.gathers, _FRAGMENTED_GATHERED, _FRAGMENTED) * tensors)
    if setup.varying_lengths:
        fragments = fragments + _EARLIER_LOGITS * logits
    if setup.sharding == "fsdp" and setup.method == "full":
        return persistent + _streams(ledger, moments, fragments)
    total = persistent + tensors + maximum(later, fragments) + 2 * buffers.pools()
    if setup.method in ADAPTERS and shards_flat(setup):
        late = (1 + LATE_BLOCKS) * (persistent + tensors + buffers.pools())
        total = where(ledger.place.gathers, maximum(total, late), total)
    return total


def _tensors(moment: Moment) -> Number:
    return moment.part("activations") + moment.part("logits") + moment.part("temporaries")


def _streams(ledger: Ledger, moments: tuple[Moment, ...], fragments: Number) -> Number:
    """FSDP2's three pools, which never mix: the all-gathers' outputs, the reduced gradients, and the rest."""
    buffers = ledger.buffers
    tensors: Number = 0.0
    for moment in moments:
        if moment.phase != "optimizer":
            rest = _tensors(moment) + moment.part("communication")
            tensors = maximum(tensors, rest - (buffers.output() if moment.phase == "forward" else 0.0))
    reduced = maximum(ledger.states.gradients - ledger.held_gradients, 0.0)
    return reduced + buffers.outputs() + maximum(tensors + fragments, optimizer_temporaries(ledger))
