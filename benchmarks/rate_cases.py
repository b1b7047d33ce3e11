"""The kernels of a training step whose rates are measured, by shape and precision, in the order of their value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

Tensor = torch.Tensor
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel at one shape. What is not counted is 0."""

    kernel: str
    shape: str
    dtype: str
    make: Callable[[], Callable[[], object]]
    """Allocates what the kernel reads, and returns the call that is timed."""
    flops: float = 0.0
    bytes: float = 0.0
    """The least that must move: each input read once, each output written once."""
    calls: int = 1
    """Kernels in one call, where a single launch is what is measured."""
    needs_gpu: bool = False


def rate_cases(*, tiny: bool) -> Iterator[Case]:
    """All of them; ``tiny`` in shapes that a CPU runs in milliseconds."""
    yield from _launches()
    yield from _square_products(tiny)
    yield from _layer_products(tiny)
    yield from _attention(tiny)
    yield from _memory_bound(tiny)
    yield from _optimizers(tiny)
    yield from _copies(tiny)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _random(*shape: int, dtype: str = "fp32", grad: bool = False) -> Tensor:
    """Random numbers: products of zeros run faster than real ones."""
    return torch.randn(*shape, device=_device(), dtype=DTYPES[dtype]).requires_grad_(grad)


def _launches() -> Iterator[Case]:
    count = 200

    def make() -> Callable[[], object]:
        one = _random(1)

        def call() -> None:
            for _ in range(count):
                one.add_(1.0)

        return call

    yield Case(kernel="launch", shape="1", dtype="fp32", make=make, calls=count)


# --- Matrix products -------------------------------------------------------------------------------------------------


def _square_products(tiny: bool) -> Iterator[Case]:
    sizes = (64, 128) if tiny else (8192, 4096, 2048, 1024, 16384, 512)
    for dtype in ("fp32", "bf16") if tiny else ("bf16", "fp32", "tf32", "fp16"):
        for size in sizes:
            if dtype in ("fp32", "tf32") and size > 8192:
                continue
            yield _product("nt", size, size, size, dtype)


def _layer_products(tiny: bool) -> Iterator[Case]:
    """Those of layers of 0.5B to 8B: forward (x W^T), the inputs' gradient (g W), the weights' gradient (g^T x)."""
    tokens = (32, 64) if tiny else (4096, 1024, 16384, 512)
    # (inputs, outputs): q and o, k and v, up, down, head; adapters of rank 16.
    layers = (
        ((96, 96), (96, 256))
        if tiny
        else (
            (4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024), (2048, 2048), (2048, 8192), (8192, 2048), (2048, 512),
            (896, 896), (896, 4864), (4864, 896), (2048, 128256), (4096, 128256), (4096, 16), (16, 4096),
        )
    )  # fmt: skip
    for count in tokens:
        for inputs, outputs in layers:
            if count == inputs == outputs:
                continue  # among the square ones
            for kind in ("nt", "nn", "tn"):
                yield _product(kind, count, outputs, inputs, "fp32" if tiny else "bf16")


def _product(kind: str, m: int, n: int, k: int, dtype: str) -> Case:
    """``m`` tokens, ``n`` outputs, ``k`` inputs. The dimensions in ``shape`` are tokens x outputs x inputs for every kind."""

    def make() -> Callable[[], object]:
        x, w, g = _random(m, k, dtype=dtype), _random(n, k, dtype=dtype), _random(m, n, dtype=dtype)
        calls: dict[str, Callable[[], Tensor]] = {"nt": lambda: x @ w.T, "nn": lambda: g @ w, "tn": lambda: g.T @ x}
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        return calls[kind]

    moved = (m * k + n * k + m * n) * DTYPES[dtype].itemsize
    return Case(
        kernel=f"matmul-{kind}", shape=f"{m}x{n}x{k}", dtype=dtype, make=make, flops=2.0 * m * n * k, bytes=float(moved)
    )


# --- Attention -------------------------------------------------------------------------------------------------------


def _attention(tiny: bool) -> Iterator[Case]:
    # (batch, heads, key-value heads, tokens, width)
    shapes = (
        ((1, 4, 2, 64, 16),)
        if tiny
        else ((2, 32, 8, 2048, 64), (2, 32, 8, 2048, 128), (1, 32, 8, 8192, 128), (8, 32, 8, 512, 128), (1, 32, 8, 16384, 128), (4, 14, 2, 1024, 64))
    )  # fmt: skip
    for shape in shapes:
        for kernel in ("flash", "eager", "cudnn", "efficient", "math"):
            large = shape[3] > 4096
            if (tiny and kernel in ("cudnn", "efficient")) or (large and kernel in ("eager", "math")):
                continue
            for passes in ("forward", "backward"):
                yield _attention_case(kernel, passes, shape, "fp32" if tiny else "bf16")


def _attention_case(kernel: str, passes: str, shape: tuple[int, int, int, int, int], dtype: str) -> Case:
    batch, heads, kv_heads, seq, width = shape
    grouped = kernel in ("flash", "cudnn", "math")  # the others are given keys and values for every head

    def make() -> Callable[[], object]:
        from harness.cuda_process import attention_held_to

        grad = passes == "backward"
        q = _random(batch, heads, seq, width, dtype=dtype, grad=grad)
        k, v = (_random(batch, kv_heads if grouped else heads, seq, width, dtype=dtype, grad=grad) for _ in range(2))

        def forward() -> Tensor:
            if kernel == "eager":
                return _eager(q, k, v)
            with attention_held_to(kernel):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        if not grad:
            return forward
        out = forward()
        upstream = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)

    # Causal attention counted in full; backward computes five products where forward computes two.
    flops = (4.0 if passes == "forward" else 10.0) * batch * heads * seq * seq * width
    name = f"{batch}x{heads}({kv_heads})x{seq}x{width}"
    return Case(kernel=f"attention-{kernel}-{passes}", shape=name, dtype=dtype, make=make, flops=flops)


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seq = q.shape[2]
    mask = torch.full((seq, seq), torch.finfo(q.dtype).min, device=q.device, dtype=q.dtype).triu(1)
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


# --- Bound by memory -------------------------------------------------------------------------------------------------


def _memory_bound(tiny: bool) -> Iterator[Case]:
    rows = (16,) if tiny else (4096, 16384, 1024)
    columns = 64 if tiny else 4096
    for dtype in ("fp32",) if tiny else ("bf16", "fp32"):
        for row in rows:
            for kernel, (passes, build) in _KERNELS.items():
                moved = float(passes * row * columns * DTYPES[dtype].itemsize)
                make = functools.partial(_made, build, row, columns, dtype)
                yield Case(kernel=kernel, shape=f"{row}x{columns}", dtype=dtype, make=make, bytes=moved)
    vocabulary = 512 if tiny else 128256
    for tokens in (16,) if tiny else (1024, 4096):
        for direction in ("forward", "backward"):
            make = functools.partial(_cross_entropy, tokens, vocabulary, direction)
            moved = 4.0 * tokens * vocabulary * (1 if direction == "forward" else 2)
            yield Case(
                kernel=f"cross-entropy-{direction}",
                shape=f"{tokens}x{vocabulary}",
                dtype="fp32",
                make=make,
                bytes=moved,
            )


def _made(build: Callable[[Tensor, Tensor], Callable[[], object]], rows: int, columns: int, dtype: str) -> Any:
    return build(_random(rows, columns, dtype=dtype), _random(rows, columns, dtype=dtype))


def _norm(x: Tensor, y: Tensor) -> Callable[[], object]:
    """As transformers' Llama does it: fp32 inside, eager."""
    weight = torch.ones(x.shape[1], device=x.device, dtype=x.dtype)

    def call() -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    return call


def _layer_norm(x: Tensor, y: Tensor) -> Callable[[], object]:
    weight = torch.ones(x.shape[1], device=x.device, dtype=x.dtype)
    return lambda: F.layer_norm(x, (x.shape[1],), weight, weight)


# Of each: passes over one tensor of that shape (inputs read and outputs written), and what makes it.
_KERNELS: dict[str, tuple[int, Callable[[Tensor, Tensor], Callable[[], object]]]] = {
    "copy": (2, lambda x, y: lambda: y.copy_(x)),
    "add": (3, lambda x, y: lambda: x + y),
    "multiply-in-place": (2, lambda x, y: lambda: x.mul_(1.0)),
    "silu-times": (3, lambda x, y: lambda: F.silu(x) * y),
    "gelu": (2, lambda x, y: lambda: F.gelu(x)),
    "softmax": (2, lambda x, y: lambda: torch.softmax(x, -1)),
    "rms-norm-eager": (2, _norm),
    "layer-norm": (2, _layer_norm),
    "transpose-copy": (2, lambda x, y: lambda: x.T.contiguous()),
}


def _cross_entropy(tokens: int, vocabulary: int, passes: str) -> Callable[[], object]:
    logits = _random(tokens, vocabulary, grad=True)
    labels = torch.randint(vocabulary, (tokens,), device=_device())
    if passes == "forward":
        return lambda: F.cross_entropy(logits, labels)
    loss = F.cross_entropy(logits, labels)
    return lambda: torch.autograd.grad(loss, logits, retain_graph=True)


# --- The optimizer's step, copies ------------------------------------------------------------------------------------


def _optimizers(tiny: bool) -> Iterator[Case]:
    builders: dict[str, tuple[int, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
        # AdamW reads weight, gradient and two moments, and writes all but the gradient; SGD reads two and writes one.
        "adamw-fused": (7, lambda p: torch.optim.AdamW(p, fused=True)),
        "adamw-foreach": (7, lambda p: torch.optim.AdamW(p, foreach=True)),
        "sgd-foreach": (3, lambda p: torch.optim.SGD(p, lr=1e-5, foreach=True)),
    }
    matrices, rows, columns = (4, 64, 64) if tiny else (64, 4096, 2048)  # 0.5B
    for dtype in ("fp32",) if tiny else ("bf16", "fp32"):
        for name, (passes, build) in builders.items():
            moved = float(passes * matrices * rows * columns * DTYPES[dtype].itemsize)
            make = functools.partial(_optimizer_step, build, matrices, rows, columns, dtype)
            yield Case(kernel=f"step-{name}", shape=f"{matrices}x{rows}x{columns}", dtype=dtype, make=make, bytes=moved)
            if name == "adamw-foreach":
                make = functools.partial(_clipping, matrices, rows, columns, dtype)
                yield Case(
                    kernel="clip-norm",
                    shape=f"{matrices}x{rows}x{columns}",
                    dtype=dtype,
                    make=make,
                    bytes=moved / 7 * 3,
                )


def _parameters(matrices: int, rows: int, columns: int, dtype: str) -> list[Tensor]:
    parameters = [_random(rows, columns, dtype=dtype, grad=True) for _ in range(matrices)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def _optimizer_step(
    build: Callable[[list[Tensor]], torch.optim.Optimizer], matrices: int, rows: int, columns: int, dtype: str
) -> Callable[[], object]:
    return build(_parameters(matrices, rows, columns, dtype)).step


def _clipping(matrices: int, rows: int, columns: int, dtype: str) -> Callable[[], object]:
    parameters = _parameters(matrices, rows, columns, dtype)
    return lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0)


def _copies(tiny: bool) -> Iterator[Case]:
    """Between host and device, one way each."""
    for mebibytes in (1,) if tiny else (256, 16, 1):
        for pinned in (True, False):
            for direction in ("to-device", "to-host"):
                kind = "pinned" if pinned else "pageable"
                make = functools.partial(_host_copy, mebibytes * 2**20, pinned, direction)
                yield Case(
                    kernel=f"{direction}-{kind}", shape=f"{mebibytes}MiB", dtype="bytes", make=make,
                    bytes=float(mebibytes * 2**20), needs_gpu=True,
                )  # fmt: skip


def _host_copy(count: int, pinned: bool, direction: str) -> Callable[[], object]:
    host = torch.ones(count, dtype=torch.uint8, pin_memory=pinned)
    device = torch.ones(count, dtype=torch.uint8, device=_device())
    source, target = (host, device) if direction == "to-device" else (device, host)
    return lambda: target.copy_(source, non_blocking=pinned)
