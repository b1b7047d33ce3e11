"""Quantized bases and bitsandbytes' optimizers in the dry run: what their layers hold, keep and take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from estimator.building.model import build_empty_model
from estimator.dryrun.optimizers import BitsAndBytesAdamW
from estimator.dryrun.quantized import GptqLinear, Int8Linear, Nf4Linear
from estimator.dryrun.result import DryRun
from estimator.dryrun.run import dry_run
from estimator.errors import InputError
from estimator.measured import from_row
from estimator.setup import Setup

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
ROWS, COLUMNS = 704, 256
GIB = 2**30


def _setup(**values: Any) -> Setup:
    return Setup(**({"model": "small-llama", "precision": "bf16", "seq": 128, "accelerator": "RTX-3090"} | values))


def _phase(found: DryRun, name: str) -> int:
    return next(phase.peak_allocated_bytes for phase in found.phases if phase.phase == name)


def _layer(kind: str, *, biased: bool = False) -> Any:
    if kind == "int8":
        return Int8Linear(COLUMNS, ROWS, biased, half=torch.bfloat16)
    if kind.startswith("gptq"):
        return GptqLinear(COLUMNS, ROWS, biased, bits=int(kind[-1]))
    table = torch.empty(256) if kind == "nf4-dq" else None
    return Nf4Linear(COLUMNS, ROWS, biased, half=torch.bfloat16, table=table)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Codes, an absmax a block of 64, the 16 values of the code.
        ("nf4", {"weight": ROWS * COLUMNS // 2, "absmax": 4 * ROWS * COLUMNS // 64, "code": 64}),
        # The absmax in 8 bits, one fp32 of those a block of 256, their mean, and the table that all layers share.
        (
            "nf4-dq",
            {
                "weight": ROWS * COLUMNS // 2, "absmax": ROWS * COLUMNS // 64, "code": 64,
                "nested_absmax": 4 * ROWS * COLUMNS // 64 // 256, "offset": 4, "nested_code": 1024,
            },
        ),
        ("int8", {"weight": ROWS * COLUMNS, "row_absmax": 4 * ROWS}),
        # Packed codes, packed zeros and fp16 scales of groups of 128, an index of the group for each column.
        ("gptq-int4", {"qweight": ROWS * COLUMNS // 2, "qzeros": 2 * ROWS // 2, "scales": 2 * 2 * ROWS, "g_idx": 4 * COLUMNS}),
        ("gptq-int8", {"qweight": ROWS * COLUMNS, "qzeros": 2 * ROWS, "scales": 2 * 2 * ROWS, "g_idx": 4 * COLUMNS}),
    ],
)  # fmt: skip
def test_a_quantized_layer_holds_what_its_library_stores(kind: str, expected: dict[str, int]) -> None:
    assert {name: tensor.nbytes for name, tensor in _layer(kind).state_dict().items()} == expected


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("kind", "given", "returned"),
    [
        ("nf4", torch.float32, torch.float32),  # computes in bf16, answers in the type that it was asked in
        ("nf4-dq", torch.bfloat16, torch.bfloat16),
        ("int8", torch.float32, torch.float32),
        ("int8", torch.bfloat16, torch.bfloat16),
        ("gptq-int4", torch.float16, torch.float16),
    ],
)
def test_a_quantized_layer_multiplies_forward_and_backward(
    kind: str, given: torch.dtype, returned: torch.dtype, biased: bool
) -> None:
    x = torch.zeros(2, 3, COLUMNS, dtype=given, requires_grad=True)
    found = _layer(kind, biased=biased)(x)
    assert (found.shape, found.dtype) == ((2, 3, ROWS), returned)
    found.sum().backward()
    assert x.grad is not None
    assert (x.grad.shape, x.grad.dtype) == (x.shape, given)


def test_int8_keeps_its_input_as_long_as_the_graph_lives() -> None:
    # bitsandbytes holds it on the context rather than among the saved tensors: backward does not free it.
    x = torch.zeros(4, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
    for kind, uses in (("nf4", 0), ("int8", 1)):
        entering = x * 1
        before = torch._C._storage_Use_Count(entering.untyped_storage()._cdata)
        loss = _layer(kind)(entering).sum()
        loss.backward()
        assert torch._C._storage_Use_Count(entering.untyped_storage()._cdata) - before == uses


def test_transformers_rule_leaves_embeddings_head_and_norms_as_they_are() -> None:
    model = build_empty_model(_setup(method="qlora", base_quantization="nf4-dq"), layers=range(2))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Nf4Linear)}
    assert {name.removesuffix(".base_layer").rsplit(".", 1)[-1] for name in layers} == {
        "q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert len({id(layer.nested_code) for layer in layers.values()}) == 1
    half = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert any("embed_tokens" in name for name in half)
    assert all("norm" in name or "embed_tokens" in name or "lm_head" in name for name in half)


@pytest.mark.parametrize("kind", ["nf4", "int8", "gptq-int4"])
@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_widen_their_input_where_peft_does(kind: str, autocast: bool) -> None:
    half = torch.float16 if kind.startswith("gptq") else torch.bfloat16
    model: Any = build_empty_model(_setup(method="qlora", base_quantization=kind, precision="fp16" if half is torch.float16 else "bf16"), layers=range(1))  # fmt: skip
    adapted = next(m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")).to_empty(device="cpu")  # fmt: skip
    seen: list[torch.dtype] = []
    adapted.lora_A["default"].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    x = torch.zeros(1, 2, adapted.base_layer.in_features, dtype=half)
    with torch.autocast("cpu", dtype=half, enabled=autocast):
        assert adapted(x).dtype == half
    # bitsandbytes' adapters leave it to autocast, which narrows it again; GPTQ's does not look.
    assert seen == [half if autocast and not kind.startswith("gptq") else torch.float32]


@pytest.mark.parametrize(
    "values",
    [
        {"method": "qlora", "base_quantization": "nf4-dq", "checkpointing": "full", "autocast": "bf16"},
        {"method": "qlora", "base_quantization": "int8", "checkpointing": "full", "precision": "bf16-mixed"},
        {"method": "qlora", "base_quantization": "gptq-int4", "autocast": "bf16", "lora_targets": "all-linear"},
        {"method": "qlora", "base_quantization": "gptq-int8", "optimizer": "adamw-8bit-paged"},
        {"optimizer": "adamw-8bit"},
        {"optimizer": "adamw-paged", "precision": "bf16-mixed", "model": "base"},
    ],
    ids=str,
)
def test_a_few_quantized_layers_written_out_are_the_full_model_to_the_byte(values: dict[str, Any]) -> None:
    few, all_layers = dry_run(_setup(**values)), dry_run(_setup(**values), every_layer=True)
    assert few.layers_run < all_layers.layers_run
    assert few.phases == all_layers.phases
    assert few.categories_bytes == all_layers.categories_bytes
    assert few.peak_reserved_bytes == all_layers.peak_reserved_bytes


@pytest.mark.parametrize(("model", "steady"), [("mistral-7b", 4.011), ("powerlm-3b", 1.997)])
def test_what_is_left_between_the_steps_is_what_was_published(model: str, steady: float) -> None:
    # foundation-model-stack/fms-acceleration, scripts/benchmarks/refs: "steady alloc after train" of its 4-bit runs.
    found = dry_run(
        _setup(
            model=model, method="qlora", base_quantization="nf4-dq", autocast="bf16", lora_rank=16, optimizer="adamw",
            lora_targets="q_proj k_proj v_proj o_proj c_attn", checkpointing="full", accelerator="A100-SXM-80GB",
        )
    )  # fmt: skip
    assert _phase(found, "between") / GIB == pytest.approx(steady, rel=0.003)


def test_bitsandbytes_states_by_size_and_kind() -> None:
    def state_bytes(count: int, **kinds: Any) -> int:
        parameter = torch.nn.Parameter(torch.zeros(count, dtype=torch.bfloat16))
        parameter.grad = torch.zeros_like(parameter)
        wide = [parameter] if kinds.pop("wide", False) else []
        optimizer = BitsAndBytesAdamW([parameter], **({"eight_bit": False, "paged": False} | kinds), wide=wide)
        optimizer.step()
        return sum(v.nbytes for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor))

    tables = 2 * 1024
    assert state_bytes(4096, eight_bit=True) == 2 * 4096 + 2 * 4 * 16 + tables
    assert state_bytes(4095, eight_bit=True) == 8 * 4095  # too small for 8 bits
    assert state_bytes(8192, eight_bit=True, wide=True) == 8 * 8192  # an embedding
    assert state_bytes(99_999, paged=True) == 8 * 99_999  # fp32, though the parameter is half
    assert state_bytes(100_000, paged=True) == 0  # unified memory
    assert state_bytes(102_400, eight_bit=True, paged=True) == 2 * 4 * 400 + tables


def test_trainer_keeps_wide_states_for_embeddings_and_a_plain_loop_does_not() -> None:
    trainer, loop = (
        dict(dry_run(_setup(optimizer="adamw-8bit", framework=name)).categories_bytes)["optimizer"]
        for name in ("hf-trainer", "torch-loop")
    )
    model = build_empty_model(_setup())
    table = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding)).weight.numel()
    assert trainer - loop == pytest.approx(table * (8 - 2 * (1 + 4 / 256)), rel=0.01)


@pytest.mark.parametrize(
    "values",
    [
        {"base_quantization": "nf4", "method": "dora"},
        {"base_quantization": "gptq-int4", "method": "qlora", "precision": "fp32"},
        {"base_quantization": "gptq-int4", "method": "qlora", "model": "mixtral-8x7b"},
        {"base_quantization": "nf4", "method": "qlora", "accelerators": 2, "sharding": "zero2"},
        {"base_quantization": "int8", "method": "qlora", "accelerator": "cpu"},
        {"optimizer": "adamw-paged", "accelerator": "cpu"},
        {"method": "lora", "lora_targets": "q_proj v_porj"},
    ],
    ids=str,
)
def test_what_no_library_executes_is_one_line(values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        dry_run(_setup(**values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "accelerators", "expected"),
    [
        ("accelerated-peft-bnb-foak", 1, ("nf4-dq", "bf16")),
        ("baseline-peft-bnb", 1, ("nf4-dq", "bf16-mixed")),
        ("baseline-peft-bnb", 2, ("nf4-dq", "bf16")),
        ("accelerated-peft-autogptq", 1, ("nf4", "bf16")),
    ],
)
def test_a_published_row_is_read_as_its_framework_loads_the_base(
    config: str, accelerators: int, expected: tuple[str, str]
) -> None:
    row = {
        "run": "r", "model": "mistral-7b", "method": "qlora", "base_quantization": "nf4", "precision": "bf16",
        "accelerators": float(accelerators), "notes": f"unit=GiB; framework_config={config}; bf16 AMP flag",
    }  # fmt: skip
    setup = from_row(row).setup
    assert (setup.base_quantization, setup.precision) == expected
