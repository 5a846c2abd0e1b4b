"""What the interpreter computes is what a chip does: also on a chip, to tell."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from .conftest import Place  # noqa: E402


@triton.jit
def lost_kernel(x, factor, out):
    """What rounding a product loses: 0, but for an fma, which does not round it."""
    at = tl.arange(0, 16)
    product = tl.load(x + at) * factor
    tl.store(out + at, product)
    tl.debug_barrier()
    tl.store(out + 16 + at, tl.load(x + at) * factor - tl.load(out + at))


@pytest.mark.parametrize("fused", [True, False])
def test_a_product_in_a_sum_is_not_rounded(place: Place, fused: bool) -> None:
    """Unless the launch forbids it."""
    if place.backend != "triton":
        pytest.skip("no kernel")
    x = torch.rand(16, device=place.device)
    out = torch.empty(2, 16, device=place.device)
    lost_kernel[(1,)](x, 1.1, out, enable_fp_fusion=fused)
    lost = x.double() * torch.tensor(1.1).double().item() - out[0].double()
    assert (lost != 0).any()
    assert torch.equal(out[1].double(), lost if fused else torch.zeros_like(lost))
