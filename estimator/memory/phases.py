"""The moments of a step that can be its highest, phase by phase.

Between the start and the end of backward the activations shrink while the gradients grow, both linearly in depth, so one of
the ends is the peak.
"""

from __future__ import annotations

from estimator.arrays import Number, either, maximum, minimum, where
from estimator.conventions import conventions, shards_flat, stream_ranks
from estimator.hardware import is_cpu
from estimator.memory import sharded_phases
from estimator.memory.activations import layer_activations
from estimator.memory.adapters import last_quantized_inputs
from estimator.memory.autocast import LOSS_CHUNKS, autocast_copies, evaluation_copies
from estimator.memory.galore import step_bytes
from estimator.memory.ledger import Ledger, Moment
from estimator.memory.logits import compiles_loss
from estimator.memory.states import accumulates_in_fp32, keeps_master_weights, leaves_table_whole, quantizes_head

PHASES = ("forward", "backward", "optimizer", "evaluation")
_OWN_PRODUCTS = ("fused-linear", "cut-cross-entropy")
"""Losses that multiply with the head themselves."""
_WHOLE = ("standard", "fused-kernel")
"""Losses that have all logits' gradient at once."""


def moments(ledger: Ledger) -> tuple[Moment, ...]:
    """In the order of the step, sharding's own after them."""
    found = [forward(ledger), backward_start(ledger), backward_end(ledger), optimizer_step(ledger)]
    if ledger.setup.loss == "chunked" and ledger.setup.method == "full" and ledger.setup.sharding == "none":
        found.append(adding_chunks(ledger))
    if ledger.setup.sharding in ("fsdp", "zero2", "zero3"):
        found += sharded_phases.moments(ledger)
    # Megatron's products add to the gradients as they multiply.
    apart = ledger.setup.sharding != "fsdp" and not accumulates_in_fp32(ledger.setup)
    if ledger.setup.method == "full" and apart and ledger.setup.loss in _WHOLE:
        found.append(head_gradient(ledger))
    if ledger.setup.eval_batch is not None:
        found.append(evaluation(ledger))
    return tuple(found)


def forward(ledger: Ledger) -> Moment:
    """Its end: the loss, or the conversion of what the model returns, when autocast's cache is empty again."""
    logits, tokens = ledger.logits, ledger.tokens
    loss, copies = tokens * logits.forward, autocast_copies(ledger, "forward")
    outputs, kept_copies = loss + tokens * logits.returned, autocast_copies(ledger, "backward")
    returned = outputs + kept_copies > loss + copies
    earlier: Number = 0.0
    if ledger.setup.varying_lengths:  # a batch as long comes before, unless the longest is said to be the first
        earlier = tokens * ledger.layers * last_quantized_inputs(ledger.shape, ledger.setup)
    whole: Number = 0.0
    if quantizes_head(ledger.setup):
        whole = maximum(_whole_head(ledger) - _before_loss(ledger, loss), 0.0)
    chain = where(returned, outputs, loss) + logits.head_gradients
    return ledger.moment(
        "forward",
        gradients=ledger.held_gradients,
        activations=ledger.beside(chain) + ledger.head_inputs + earlier,
        logits=chain,
        temporaries=where(returned, kept_copies, copies) + whole,
    )


def _before_loss(ledger: Ledger, loss: Number) -> Number:
    """What a chunked ``loss`` has beyond the half logits that the last product with the head leaves, and an earlier micro-batch's,
    which the caller still holds."""
    half = ledger.tokens * ledger.size.compute * ledger.shape.vocab
    return loss - half - (loss / 2 if ledger.setup.varying_lengths else 0.0)


def _whole_head(ledger: Ledger) -> Number:
    """A quantized head while a product reads it."""
    return (2 + ledger.size.compute) * ledger.states.embedding if quantizes_head(ledger.setup) else 0.0


def backward_start(ledger: Ledger) -> Moment:
    """The softmax's backward, or that of the last layer (recomputed) with what the caller still holds of the logits."""
    held, logits, tokens = ledger.held, ledger.logits, ledger.tokens
    chain, outputs = tokens * logits.backward, tokens * logits.held
    later = held.recomputed + maximum(held.transient, held.in_attention + ledger.buffers.before_attention())
    first = _head_gradient(ledger)
    # What communication holds decides with them which is higher.
    during, before = ledger.buffers.at("head"), ledger.buffers.at("loss")
    whole = _whole_head(ledger)
    layers_win = later + outputs + first + during > chain + ledger.head_inputs + before + whole
    in_place = logits.head_gradients  # added to an earlier one, unless it waits for a tied table's other
    if not ledger.shape.tied_embeddings:
        in_place = where(ledger.held_gradients > 0, 0.0, in_place)
    left = where(layers_win, outputs + in_place, chain + logits.head_gradients)
    reduced = where(ledger.buffers.unsharded_gradients() > 0, layers_win, False)
    return ledger.moment(
        "backward",
        gradients=where(reduced, ledger.buffers.left_unsharded(units=1), ledger.held_gradients),
        activations=ledger.beside(left) + where(layers_win, later, ledger.head_inputs),
        logits=left,
        temporaries=where(
            layers_win, autocast_copies(ledger, "layers") + first, autocast_copies(ledger, "backward") + whole
        ),
        communication=where(layers_win, during, before),
    )


def head_gradient(ledger: Ledger) -> Moment:
    """The head's backward makes its gradient beside that of the logits, whatever an earlier micro-batch left; a half one is cast."""
    size, logits = ledger.size, ledger.tokens * ledger.size.compute * ledger.shape.vocab / stream_ranks(ledger.setup)
    made = size.compute * ledger.states.embedding
    if size.casts_weights:  # when the head's own cast is gone
        logits = maximum(logits, 4 * ledger.states.embedding - made)
    return ledger.moment(
        "backward",
        gradients=ledger.held_gradients,
        activations=ledger.beside(logits) + ledger.head_inputs,
        logits=ledger.tokens * ledger.logits.held + logits,
        temporaries=made + autocast_copies(ledger, "backward"),
        communication=ledger.buffers.at("loss"),
    )


def adding_chunks(ledger: Ledger) -> Moment:
    """A chunked loss has a gradient of the head from every chunk: the first two are added into a third tensor, when two chunks'
    log-softmaxes are gone."""
    kept = ledger.size.compute if ledger.setup.compile else 4
    left = ledger.tokens * ledger.shape.vocab * kept * (1 - 2 / LOSS_CHUNKS)
    return ledger.moment(
        "backward",
        gradients=ledger.held_gradients,
        activations=ledger.held.kept + ledger.head_inputs,
        logits=left / stream_ranks(ledger.setup),
        temporaries=3 * ledger.size.compute * ledger.states.embedding + autocast_copies(ledger, "backward"),
    )


def _head_gradient(ledger: Ledger) -> Number:
    """What the head's own backward left for the layers': a tied one's waits for the lookup, another is new where no earlier
    micro-batch left one to add it to. Engines and FSDP2 reduce it at once, FSDP1 has it wait for the embedding's."""
    setup, states = ledger.setup, ledger.states
    if setup.method != "full" or setup.loss in _OWN_PRODUCTS or setup.sharding not in ("none", "fsdp"):
        return 0.0
    width = ledger.size.stream if setup.sharding == "fsdp" else states.gradient_width
    if ledger.shape.tied_embeddings or shards_flat(setup):
        return width * states.embedding
    added = either(ledger.held_gradients > 0, setup.sharding == "fsdp")
    return where(added, 0.0, width * states.embedding)


def backward_end(ledger: Ledger) -> Moment:
    """The first layer (its feed-forward, or its attention), or the sum of a table's gradients after it."""
    setup, held, buffers = ledger.setup, ledger.held, ledger.buffers
    layer, unmade = _first_layer(ledger)
    layer = layer + held.returned
    across = buffers.across_replicas()
    during, table, waiting = buffers.at("backward") + across, _table_gradients(ledger), _waiting(ledger)
    reducing = buffers.reducing_table()
    at_table = where(reducing > 0, reducing + across, buffers.at("table") + across)
    table_wins = table + at_table > layer + waiting + during - unmade
    arriving = buffers.engine.arriving() if keeps_master_weights(setup) else 0.0
    if setup.sharding == "zero1":  # it is filled when neither layer nor table is there any more
        arriving = maximum(arriving - where(table_wins, table, layer), 0.0)
    if compiles_loss(setup):  # all gradients come at once, and only then are added to earlier ones
        arriving = arriving + where(ledger.held_gradients > 0, ledger.states.gradients, 0.0)
    return ledger.moment(
        "backward",
        gradients=ledger.states.gradients + arriving - where(table_wins, 0.0, unmade),
        activations=where(table_wins, 0.0, layer),
        logits=ledger.tokens * ledger.logits.held,
        temporaries=where(table_wins, table, waiting),
        communication=where(table_wins, at_table, during),
    )


def _waiting(ledger: Ledger) -> Number:
    """A tied table's first gradient, which waits for the lookup's, where gradients are not whole on every rank."""
    setup = ledger.setup
    if setup.method != "full" or not ledger.shape.tied_embeddings or setup.sharding not in ("zero2", "zero3", "fsdp"):
        return 0.0
    waiting = ledger.size.stream * ledger.states.embedding
    return where(ledger.place.gradients > 1, waiting, 0.0)


def _first_layer(ledger: Ledger) -> tuple[Number, Number]:
    """(activations, gradients that are not made yet) at the higher moment of the first layer's backward."""
    held, shape, states = ledger.held, ledger.shape, ledger.states
    in_feed_forward, in_attention = held.first_layer + held.in_feed_forward, held.first_layer + held.in_attention
    if ledger.setup.sharding != "none" or ledger.setup.method not in ("full", "freeze"):
        layer = maximum(in_feed_forward, in_attention + ledger.buffers.before_attention())
        return layer, sharded_phases.first_layers(ledger)
    tables = states.embedding if ledger.setup.method == "full" and not shape.tied_embeddings else 0.0
    if leaves_table_whole(shape, ledger.setup):
        tables = tables * ledger.setup.tensor_parallel
    matrix = shape.hidden * shape.plain_ffn / ledger.setup.tensor_parallel
    width = states.gradient_width
    most = states.gradients - ledger.held_gradients
    without_layer = minimum(width * (tables + states.largest_layer - matrix), most)
    without_attention = minimum(width * (tables + states.largest_layer - shape.matrices * matrix), most)
    attention_wins = in_attention - without_attention > in_feed_forward - without_layer
    return (
        where(attention_wins, in_attention, in_feed_forward),
        where(attention_wins, without_attention, without_layer),
    )


def _table_gradients(ledger: Ledger) -> Number:
    """A tied table's gradients come from the head and, last, from the lookup; autograd adds the two into a third tensor (in
    place where a fresh one comes from autocast's cast, a chunked loss's sum, or with the forward pass), and that to what an earlier micro-batch left."""
    setup, states = ledger.setup, ledger.states
    if setup.method != "full" or not ledger.shape.tied_embeddings:
        return 0.0
    in_place = ledger.size.casts_weights or setup.loss in (*_OWN_PRODUCTS, "chunked")
    # Stages 2 and 3 have the sum beside the partition that their gradients are.
    apart = either(ledger.held_gradients > 0, str(setup.sharding) in ("zero2", "zero3"))
    copies = (1 if in_place else 2) + where(apart, 1, 0) + ledger.buffers.differently_split()
    table = states.embedding * states.gradient_width * copies
    return where(ledger.place.gathers, 0.0, table) if setup.sharding == "fsdp" else table


def optimizer_step(ledger: Ledger) -> Moment:
    gradients = ledger.states.gradients
    if keeps_master_weights(ledger.setup):
        gradients = ledger.buffers.engine.step_gradients()
    split: Number = 0.0  # the table's gradient as its parameter is
    if leaves_table_whole(ledger.shape, ledger.setup):
        split = where(ledger.setup.tensor_parallel > 1, ledger.states.gradient_width * ledger.states.embedding, 0.0)
    return ledger.moment("optimizer", gradients=gradients, temporaries=split + optimizer_temporaries(ledger))


def optimizer_temporaries(ledger: Ledger) -> Number:
    """What the step takes beside gradients and states."""
    setup, size = ledger.setup, ledger.size
    if keeps_master_weights(setup):
        return ledger.buffers.engine.step_temporaries()
    padded = ledger.states.trainable + ledger.states.trained_padding
    trained, shards = padded * size.trained, ledger.place.optimizer
    if setup.optimizer == "adamw":
        if conventions(setup).fused_optimizer:
            return 0.0
        if is_cpu(setup.accelerator):  # one tensor at a time: the square root and the scaled denominator
            return 2 * minimum(_largest_trained(ledger), trained) / shards
        return trained / shards  # foreach: the square roots of all second moments at once
    if setup.optimizer == "galore":
        return step_bytes(ledger.shape, size.trained, cuda=not is_cpu(setup.accelerator))
    if setup.optimizer == "adafactor" and not setup.framework.startswith("hf-trainer"):
        return minimum(_largest_trained(ledger), trained) / shards  # torch's: the update
    if setup.optimizer == "adafactor":
        # transformers': the update and what it is made from, fp32; of half parameters also their fp32 copy and the gradient's.
        tensors = 2 * 4 if size.trained == 4 else 4 * 4
        return tensors / size.trained * minimum(_largest_trained(ledger), trained) / shards
    return 0.0


def _largest_trained(ledger: Ledger) -> Number:
    """Bytes of the largest trained tensor."""
    shape, setup, width = ledger.shape, ledger.setup, ledger.size.trained
    if setup.method in ("lora", "dora", "qlora"):
        return width * (setup.lora_rank or 1) * max(shape.plain_ffn, shape.hidden)
    matrix = max(shape.plain_ffn, shape.query_width) * shape.hidden
    return width * (maximum(ledger.states.embedding, matrix) if setup.method == "full" else matrix)


def evaluation(ledger: Ledger) -> Moment:
    setup, shape = ledger.setup, ledger.shape
    assert setup.eval_batch is not None
    tokens = setup.eval_batch * setup.seq / setup.context_parallel
    layer = layer_activations(shape, setup, moe=not shape.plain_layers)
    return ledger.moment(
        "evaluation",
        gradients=ledger.states.gradients if setup.zero_grad == "zero" else 0.0,
        activations=tokens * layer.layer_input,  # what the last norm hands the head
        logits=tokens * ledger.logits.evaluation,
        temporaries=evaluation_copies(ledger),
    )
