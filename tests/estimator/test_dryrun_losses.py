"""Losses, selective checkpointing, attention kernels and offload in the dry run, against real steps on this CPU where one exists."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest

from estimator.building.model import build_model
from estimator.dryrun.result import DryRun
from estimator.dryrun.run import dry_run
from estimator.errors import InputError
from estimator.model.catalog import resolve_model
from estimator.setup import Setup

sys.path.insert(0, str(Path(__file__).parent))
from cpu_truth import measured_peaks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TRAINED_LOSSES = ("chunked", "fused-linear", "fused-kernel")


def _setup(**values: Any) -> Setup:
    return Setup(**({"model": "nano-llama", "precision": "fp32", "seq": 64, "batch": 4, "accelerator": "cpu"} | values)).resolved()  # fmt: skip


@functools.cache
def _gradients(loss: str, method: str) -> tuple[Any, dict[str, Any], Any]:
    """Of one training batch with positions to be ignored: the loss, the gradients; then the loss of an evaluation."""
    import torch

    model: Any = build_model(_setup(loss=loss, method=method)).train()
    ids = torch.randint(0, model.config.vocab_size, (3, 37), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :9] = -100
    outputs = model(input_ids=ids, labels=labels)
    (outputs.loss / 2).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        evaluated = model.eval()(input_ids=ids, labels=labels).loss
    return outputs.loss.detach(), gradients, evaluated


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("loss", TRAINED_LOSSES)
def test_every_loss_that_trains_is_transformers_loss_with_its_gradients(loss: str, method: str) -> None:
    import torch

    value, gradients, evaluated = _gradients(loss, method)
    wanted, standard, held_out = _gradients("standard", method)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(evaluated, held_out)
    torch.testing.assert_close(gradients, standard, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", TRAINED_LOSSES)
def test_a_model_without_labels_still_returns_logits(loss: str) -> None:
    import torch

    model: Any = build_model(_setup(loss=loss))
    ids = torch.zeros(1, 3, dtype=torch.int64)
    model(input_ids=ids, labels=ids)
    assert model(input_ids=ids).logits.shape == (1, 3, model.config.vocab_size)


@pytest.mark.parametrize(
    "values",
    [
        {"loss": "chunked"},
        {"loss": "chunked", "precision": "bf16", "framework": "torch-loop", "batch": 8},
        {"loss": "fused-linear", "precision": "bf16"},
        {"loss": "fused-linear", "precision": "bf16-mixed", "model": "nano", "batch": 8},
        {"loss": "fused-linear", "method": "lora", "checkpointing": "selective"},
        {"loss": "fused-kernel", "precision": "bf16", "framework": "torch-loop"},
        {"loss": "fused-kernel", "precision": "bf16-mixed"},
        {"checkpointing": "selective", "precision": "bf16", "batch": 8},
        {"checkpointing": "selective", "model": "nano", "loss": "fused-linear", "batch": 8},
        {"checkpointing": "full", "checkpoint_reentrant": True, "loss": "fused-linear", "batch": 8},
        {"checkpointing": "full", "checkpoint_reentrant": True, "precision": "bf16-mixed", "method": "lora"},
    ],
    ids=str,
)
def test_a_real_step_on_this_cpu_peaks_where_the_dry_run_says(values: dict[str, Any]) -> None:
    setup = _setup(**values)
    highest = max(measured_peaks(setup).phases, key=lambda phase: phase.allocated_bytes)
    found = dry_run(setup)
    assert found.peak_allocated_bytes == pytest.approx(highest.allocated_bytes, rel=0.003)
    assert found.peak_phase == highest.phase


@pytest.mark.parametrize(
    "values",
    [
        {"loss": "chunked"},
        {"loss": "fused-linear", "precision": "bf16-mixed", "framework": "torch-loop"},
        {"loss": "fused-kernel", "method": "lora", "checkpointing": "full"},
        {"loss": "compiled", "eval_batch": 8},
        {"loss": "cut-cross-entropy", "precision": "bf16-mixed"},
        {"checkpointing": "selective"},
        {"checkpointing": "selective", "precision": "bf16-mixed", "method": "lora", "loss": "fused-linear"},
        {"checkpointing": "full", "checkpoint_reentrant": True, "accumulation": 2},
        {"attention": "flex", "checkpointing": "full"},
        {"attention_kernel": "math"},
        {"attention_kernel": "efficient", "checkpointing": "selective"},
        {"attention_kernel": "cudnn"},
        {"offload": "activations"},
        {"offload": "activations", "checkpointing": "full", "loss": "fused-linear"},
        {"optimizer_in_backward": True, "loss": "chunked", "checkpointing": "selective"},
        {"compile": True, "precision": "bf16-mixed", "accumulation": 2, "eval_batch": 4},
        {"compile": True, "checkpointing": "selective", "method": "lora"},
    ],
    ids=str,
)
def test_five_of_nine_layers_written_out_are_the_full_model_to_the_byte(
    values: dict[str, Any], nine_layers: str
) -> None:
    setup = Setup(**({"model": nine_layers, "precision": "bf16", "seq": 256, "batch": 2, "accelerator": "RTX-3090"} | values))  # fmt: skip
    few, all_layers = dry_run(setup), dry_run(setup, every_layer=True)
    assert (few.layers_run, all_layers.layers_run) == (5, 9)
    assert few.phases == all_layers.phases
    assert few.peak_reserved_bytes == all_layers.peak_reserved_bytes
    assert few.categories_bytes == all_layers.categories_bytes


@pytest.fixture
def nine_layers(tmp_path: Path) -> str:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=9, num_attention_heads=4, num_key_value_heads=2, vocab_size=8000
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def _logits(loss: str, **values: Any) -> tuple[str, float]:
    """The phase of the peak and its bytes per token and word there, where the vocabulary is nearly everything."""
    setup = {"model": "smollm2-135m", "precision": "bf16", "checkpointing": "full", "seq": 1024, "batch": 8}
    found = dry_run(Setup(**(setup | {"loss": loss, "accelerator": "H100-SXM-80GB"} | values)))  # type: ignore[arg-type]
    return found.peak_phase, dict(found.categories_bytes).get("logits", 0) / (8 * 1024 * 49152)


@pytest.mark.parametrize(
    ("loss", "values", "phase", "bytes_each"),
    [
        # torchtune: the half logits of all chunks, their log-softmaxes and one chunk's upcast.
        ("chunked", {}, "forward", 2 + 4 + 4 / 8),
        # Liger's kernel works in place on transformers' fp32 copy; Trainer has dropped the logits, the plain loop has not.
        ("fused-kernel", {}, "forward", 2 + 4),
        ("fused-kernel", {"framework": "torch-loop"}, "backward", 2 + 4 + 2),
        # accelerate makes an fp32 copy of the outputs beside them.
        ("fused-kernel", {"precision": "bf16-mixed"}, "forward", 2 + 4 + 4),
        ("compiled", {}, "backward", 2 + 2),
    ],
)
def test_bytes_per_logit_are_what_the_packages_code_keeps(
    loss: str, values: dict[str, Any], phase: str, bytes_each: float
) -> None:
    assert _logits(loss, **values) == (phase, pytest.approx(bytes_each, rel=0.02))


def test_the_fused_linear_loss_makes_as_many_logits_at_once_as_ligers_comment_says() -> None:
    # liger_kernel/ops/fused_linear_cross_entropy.py: "BT = 4096*4, V = 32000, H = 4096 ==> inc_factor = 8, chunk_size = 2048".
    from estimator.memory.losses import rows_at_once

    assert rows_at_once(4096 * 4, 32000, 4096) == 2048
    assert rows_at_once(7, 100, 100) == 7  # never more than there are


def test_a_cut_cross_entropy_has_no_logits_and_the_fused_linear_loss_a_share() -> None:
    assert _logits("cut-cross-entropy")[1] == 0
    assert 0 <= _logits("fused-linear")[1] < 2 / 8


def _peak(found: DryRun) -> int:
    return found.peak_allocated_bytes


def _phase(found: DryRun, name: str) -> int:
    return next(phase.peak_allocated_bytes for phase in found.phases if phase.phase == name)


def test_flex_attention_keeps_what_flash_keeps_and_its_block_tables() -> None:
    # Eight query heads are a power of two, for others transformers repeats keys and values.
    setup = {"model": "micro-llama", "precision": "bf16", "seq": 512, "batch": 8, "accelerator": "H100-SXM-80GB", "loss": "fused-linear"}  # fmt: skip
    flash = dry_run(Setup(**setup, attention="flash"))  # type: ignore[arg-type]
    assert _peak(dry_run(Setup(**setup, attention="flex"))) == pytest.approx(_peak(flash), rel=0.005)  # type: ignore[arg-type]


def test_the_math_kernel_holds_scores_and_the_others_do_not() -> None:
    setup = {"model": "micro-llama", "precision": "bf16", "seq": 2048, "accelerator": "H100-SXM-80GB", "loss": "fused-linear"}  # fmt: skip
    peaks = {kernel: _peak(dry_run(Setup(**setup, attention_kernel=kernel))) for kernel in ("flash", "cudnn", "efficient", "math")}  # type: ignore[arg-type]  # fmt: skip
    shape = resolve_model("micro-llama")
    assert peaks["flash"] == pytest.approx(peaks["cudnn"], rel=0.05)
    assert peaks["flash"] < peaks["efficient"]  # whose keys and values are repeated for every query head
    assert peaks["math"] - peaks["flash"] > 4 * shape.layers * shape.heads * 2048**2  # each layer's softmax, in fp32


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_offloaded_activations_leave_the_device_as_numpy_copies_leave_torchs_memory(checkpointing: str) -> None:
    setup = _setup(checkpointing=checkpointing, loss="fused-linear", batch=8, framework="torch-loop", optimizer="adamw")
    measured = {p.phase: p.allocated_bytes for p in _offloaded(setup).phases}
    found, kept = _recorded(setup, offload=True), _recorded(setup, offload=False)
    assert _peak(found) == pytest.approx(max(measured.values()), rel=0.003)
    assert _phase(found, "forward") == pytest.approx(measured["forward"], rel=0.003)
    assert _phase(found, "forward") < _phase(kept, "forward")


def _recorded(setup: Setup, *, offload: bool) -> DryRun:
    """A dry run of the CPU, which refuses to offload to itself."""
    import dataclasses

    from estimator.dryrun.replay import replay
    from estimator.dryrun.steps import record

    setup = dataclasses.replace(setup, offload="activations" if offload else None)
    return replay(
        record(setup, steps=2, layers=None), cuda=False, capacity_bytes=None, expandable_segments=False, empties_cache=True, layers_run=0
    )  # fmt: skip


def _offloaded(setup: Setup) -> Any:
    """Real steps whose layers' activations are numpy's between the passes."""
    import numpy as np
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    from estimator.building.model import decoder_layers
    from harness.token_dataset import TokenDataset
    from harness.torch_loop import TorchLoop
    from profiler.cpu_memory import CpuMemoryMeter

    def pack(tensor: torch.Tensor) -> Any:
        if isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
            return tensor
        order = sorted(range(tensor.dim()), key=lambda place: -tensor.stride(place))
        return order, tensor.detach().permute(order).numpy().copy()

    def unpack(packed: Any) -> Any:
        if isinstance(packed, torch.Tensor):
            return packed
        order, kept = packed
        return torch.from_numpy(kept).clone().permute([order.index(place) for place in range(len(order))])

    def within(function: Any) -> Any:
        def offloading(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(pack, unpack):
                return function(*args, **kwargs)

        return offloading

    torch.manual_seed(0)
    model = build_model(setup)
    name = "forward" if setup.checkpointing == "none" else "_gradient_checkpointing_func"
    for layer in decoder_layers(model):
        setattr(layer, name, within(getattr(layer, name)))
    ids = np.random.default_rng(0).integers(0, 100, (2 * setup.batch, setup.seq))
    meter = CpuMemoryMeter()
    loop = TorchLoop(setup, model, TokenDataset(ids, None, length=len(ids), seed=0), on_phase=meter.enter)
    meter.start(model)
    loop.train(2)
    return meter.stop()


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer_in_backward": True, "accumulation": 2},
        {"checkpointing": "selective", "checkpoint_reentrant": True},
        {"attention": "flex", "accelerator": "cpu"},
        {"offload": "activations", "accelerator": "cpu"},
        {"loss": "cut-cross-entropy", "precision": "fp32"},
        {"loss": "fused-linear", "model": "phi-2"},
        {"compile": True, "loss": "chunked"},
        {"compile": True, "model": "mixtral-8x7b"},
        {"compile": True, "model": "nano-llama", "precision": "fp32"},  # grouped queries
    ],
    ids=str,
)
def test_what_excludes_itself_is_one_line(values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        dry_run(Setup(**({"model": "nano", "accelerator": "RTX-3090"} | values)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [{"optimizer_in_backward": True, "accumulation": 2}, {"loss": "cut-cross-entropy"}, {"offload": "activations"}],
    ids=str,
)
def test_what_only_an_estimate_knows_is_not_trained(values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        build_model(_setup(**values))
    assert "\n" not in str(caught.value)


# torch.compile of the plain loop's model, two or three steps on a CPU with torch 2.13, as torch.profiler saw them
# (nano-llama, 16 sequences of 128): minutes each, and so measured once. What is left is inductor's order of kernels.
@pytest.mark.parametrize(
    ("values", "forward_bytes", "peak_bytes"),
    [
        ({}, 130_271_792, 264_497_708),
        ({"precision": "bf16"}, 65_395_800, 132_371_948),
        ({"checkpointing": "full"}, 86_350_128, 220_576_044),
    ],
    ids=str,
)
def test_a_compiled_step_peaks_where_inductors_own_did(
    values: dict[str, Any], forward_bytes: int, peak_bytes: int
) -> None:
    found = dry_run(_setup(framework="torch-loop", seq=128, batch=16, compile=True, **values))
    assert _peak(found) == pytest.approx(peak_bytes, rel=0.003)
    assert _phase(found, "forward") == pytest.approx(forward_bytes, rel=0.007)


@pytest.mark.parametrize(
    ("kind", "peak_bytes", "error"),
    [("gpt2", 227_289_228, 0.02), ("gpt_neox", 314_877_068, 0.004)],
)
def test_compiled_layer_norms_peak_where_inductors_own_did(
    kind: str, peak_bytes: int, error: float, tmp_path: Path
) -> None:
    # As above, of 4 layers of 128 in fp32; transformers knows no loss of GPT2LMHeadModel's name, which splits the graph.
    from transformers import GPT2Config, GPTNeoXConfig

    config = GPT2Config(n_embd=128, n_layer=4, n_head=4, vocab_size=8192, n_positions=256, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0) if kind == "gpt2" else GPTNeoXConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, vocab_size=8192, max_position_embeddings=256)  # fmt: skip
    config.save_pretrained(tmp_path)
    found = dry_run(
        _setup(model=str(tmp_path / "config.json"), framework="torch-loop", seq=128, batch=16, compile=True)
    )
    assert _peak(found) == pytest.approx(peak_bytes, rel=error)
