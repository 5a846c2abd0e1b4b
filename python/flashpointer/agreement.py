"""Does an op agree with its formula? One measure, for the self-check, the tests and the benchmarks.

The oracle is the eager formula (``reference``) in float64, on the same inputs. An op may be off by at most twice what
the eager formula in the op's own dtype is off, plus an epsilon: 1e-6 for what is computed in float32 and 1e-13 in
float64, and for gradients in float16 and bfloat16 the spacing of these types. ``pointer_loss`` of such inputs is
allowed an eighth of it: its kernels round the turned q and k, and the operands of their matrix products, once more.
A loss is allowed what the oracle itself may be off, which matters to float64 alone; scores that are less than the
terms they sum, the rounding of these.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from . import reference


class Agreement(NamedTuple):
    """Relative errors, norm of the difference over norm of the oracle, of a loss or of one gradient."""

    what: str
    error: float
    eager_error: float
    epsilon: float

    @property
    def allowed(self) -> float:
        return 2 * self.eager_error + self.epsilon

    @property
    def ok(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.what}: off by {self.error:.2e}, eager by {self.eager_error:.2e}, allowed {self.allowed:.2e}"


def compare(
    op: str,
    inputs: dict[str, Any],
    *,
    differentiate: tuple[str, ...] = ("scores",),
    upstream: torch.Tensor | None = None,
) -> list[Agreement]:
    """The agreement of ``flashpointer.<op>`` with ``reference.<op>`` on ``inputs``: of its loss, then of each gradient.

    Args:
        op: the name of the op.
        inputs: its arguments by name.
        differentiate: the arguments whose gradients are compared.
        upstream: the gradient of the loss, of the loss's shape; None stands for ones.
    """
    import flashpointer

    ours = run(getattr(flashpointer, op), inputs, differentiate, upstream)
    return judge(op, inputs, ours, differentiate=differentiate, upstream=upstream)


def judge(
    op: str,
    inputs: dict[str, Any],
    ours: list[torch.Tensor],
    *,
    differentiate: tuple[str, ...] = ("scores",),
    upstream: torch.Tensor | None = None,
) -> list[Agreement]:
    """As ``compare``, of a loss and gradients that are there already."""
    oracle = run(getattr(reference, op), _cast(inputs, torch.float64), differentiate, upstream)
    eager = run(getattr(reference, op), inputs, differentiate, upstream)
    least = torch.finfo(inputs["q"].dtype).eps / 8 if op == "pointer_loss" else 0.0
    epsilons = [max(_epsilon(x.dtype), least) for x in ours]
    if op == "pointer_scores":
        epsilons[0] *= cancellation(oracle[0], score_terms(inputs))
    else:
        epsilons[0] = max(epsilons[0], _oracle_error(oracle[0]))
    return [
        Agreement(what, relative_error(x, truth), relative_error(baseline, truth), epsilon)
        for what, x, baseline, truth, epsilon in zip(
            ("loss", *differentiate), ours, eager, oracle, epsilons, strict=True
        )
    ]


def run(
    function: Any, inputs: dict[str, Any], differentiate: tuple[str, ...], upstream: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The value of ``function(**inputs)``, then its gradients by the arguments to ``differentiate``."""
    inputs = {k: v.detach().requires_grad_() if k in differentiate else v for k, v in inputs.items()}
    value = function(**inputs)
    weight = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    grads = torch.autograd.grad(value, [inputs[k] for k in differentiate], weight) if differentiate else ()
    return [value.detach(), *grads]


# Below it float32, whose exponents end, loses digits one by one: what is smaller is compared as if it were this.
_LEAST_EXACT = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over norm of the truth; inf unless infinities and NaNs stand in the same places."""
    x, truth = x.double(), truth.double()
    finite = truth.isfinite()
    if x.shape != truth.shape or not torch.equal(x.isfinite(), finite):
        return float("inf")
    if not torch.equal(x[~finite].nan_to_num(7.0), truth[~finite].nan_to_num(7.0)):
        return float("inf")
    difference, size = (x - truth)[finite].norm().item(), truth[finite].norm().item()
    return float(difference / max(size, _LEAST_EXACT) if size > 0 else difference)


def score_terms(inputs: dict[str, Any]) -> torch.Tensor:
    """Of each of the ``pointer_scores`` the norm of the terms it sums, in float64. Terms of independent signs sum to
    about as much; a score may by chance be far less, but is rounded as they are."""
    squares = {
        name: x.square() if name in ("q", "k", "start", "end") and x is not None else x
        for name, x in _cast(inputs, torch.float64).items()
    }
    scale = inputs["q"].shape[-1] ** -0.5 if inputs.get("scale") is None else inputs["scale"]
    return reference.pointer_scores(**{**squares, "rope": False, "scale": scale**2}).clamp(min=0).sqrt()


def cancellation(scores: torch.Tensor, terms: torch.Tensor) -> float:
    """How many times as large as the scores their terms are, in norm, both where the scores are finite; at least 1."""
    finite = scores.isfinite()
    size = scores[finite].norm().item()
    return max(1.0, terms[finite].norm().item() / size) if size > 0 else 1.0


def _oracle_error(loss: torch.Tensor) -> float:
    """The oracle's own: its logarithms of 1 + a sum are exact to the spacing of float64 at 1, however small."""
    size = loss[loss.isfinite()].norm().item()
    return 4 * torch.finfo(torch.float64).eps * loss.numel() ** 0.5 / size if size > 0 else 0.0


def _cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    floating = {k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return {k: v.to(dtype) if k in floating else v for k, v in inputs.items()}


def _epsilon(dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 1e-13
    return max(1e-6, torch.finfo(dtype).eps)
