"""Matrix products by oneDNN, on processors where those of MKL are slower.

torch multiplies matrices of 32-bit floats by MKL, which keeps to vectors of 256 bits where the
processor is not Intel's. oneDNN, which torch convolves with, uses all 512 bits of an AMD
processor that has AVX-512: on a Zen 5 large products take about half of the time.
"""

from __future__ import annotations

__all__ = ["fast_products"]

import contextlib
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
# Multiplications, and rows and columns, from which oneDNN is ahead of MKL however they lie.
_LARGE, _WIDE = 2_000_000, 32


# An operation of its own, since inductor copies second factors of oneDNN's that lie by columns.
# Inductor's cache of compiled graphs goes by the name: another lowering needs another name.
@torch.library.custom_op(
    "pyro_vae::onednn_product",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor? bias) -> Tensor",
)
def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        bias = bias.contiguous()  # the operation reads it so, however it lies
    return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "none", [], "")


@_product.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


_OPERATION = torch.ops.pyro_vae.onednn_product.default


def fast_products() -> dict[Any, Callable[..., Any]]:
    """Return what stands for torch's matrix products in a graph: nothing where MKL is as fast."""
    if not (torch.backends.mkldnn.enabled and _pays()):
        return {}
    _lower()
    return {_aten.mm.default: _mm, _aten.addmm.default: _addmm}


@cache
def _lower() -> None:
    """Let compiled graphs call oneDNN from C++.

    A call by way of Python takes as long as the smallest of these products: where a version of
    inductor is made otherwise, torch's own are called.
    """
    from torch._inductor import lowering

    @lowering.register_lowering(_OPERATION, type_promotion_kind=None)
    def lowered(a: Any, b: Any, bias: Any) -> Any:
        with contextlib.suppress(Exception):
            return _by_onednn(a, b, bias)
        by_torch = lowering.lowerings
        if bias is None:
            return by_torch[_aten.mm.default](a, b)
        return by_torch[_aten.addmm.default](bias, a, b)


def _by_onednn(a: Any, b: Any, bias: Any) -> Any:
    """Inductor's node of a call of oneDNN, which it makes itself where weights are constant."""
    from torch._inductor.ir import ExternKernel, FixedLayout, TensorBox
    from torch._inductor.lowering import permute
    from torch._inductor.mkldnn_ir import LinearUnary

    layout = FixedLayout(a.get_device(), a.get_dtype(), [a.get_size()[0], b.get_size()[1]])
    inputs = [
        ExternKernel.require_contiguous(ExternKernel.realize_input(a)),
        ExternKernel.realize_input(permute(b, [1, 0])),
    ]
    constants: list[Any] = ["none", [-1], ""]  # no activation
    if bias is None:
        constants.insert(0, None)
    else:
        inputs.append(ExternKernel.require_contiguous(ExternKernel.realize_input(bias)))
    return TensorBox.create(LinearUnary(layout, inputs, constants))


@cache
def _pays() -> bool:
    """Whether the processor is AMD's and has vectors of 512 bits, and torch has both libraries."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of later versions
    wide = "AMD" in str(known.get("cpu_name")) and known.get("avx512_f", False)
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return bool(wide) and both


def _large(a: Tensor, b: Tensor) -> bool:
    """Whether a product is of 32-bit matrices in the processor's memory, and large."""
    fits = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    dense = a.layout == b.layout == torch.strided
    sizes = *a.shape, b.shape[1]
    return fits and dense and min(sizes) >= _WIDE and math.prod(sizes) >= _LARGE


def _mm(a: Tensor, b: Tensor) -> Any:
    return _OPERATION(a, b, None) if _large(a, b) else NotImplemented


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    row = bias.shape == b.shape[1:] and bias.dtype == a.dtype and beta == alpha == 1
    return _OPERATION(a, b, bias) if row and _large(a, b) else NotImplemented
