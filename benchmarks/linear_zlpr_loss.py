"""``linear_zlpr_loss``: sizes are rows x size of the hidden states x classes, with lists of 1 to 16 positives.

``python -m benchmarks.linear_zlpr_loss`` times, in turns, what the sweep has no place for: the three bare products that
no implementation can do without, and the scores in chunks with checkpointing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import flashpointer
from flashpointer.agreement import Agreement, compare

from .measure import Failure, Run, interleave, peak_memory, run_of
from .suite import Contender, Inputs, Op, Shape

LAYER = ("hidden", "weight", "bias")
MOST = 16  # positives of a row
CHUNK = 8192
# Of as many the whole is checked: more do not fit into memory in float64.
CHECKED = 100_000
SHAPES = (
    Shape((32, 384, 31_000), "a batch and the labels of EUR-Lex or Wiki10, a small encoder"),
    Shape((64, 128, 100_000), "codes of diagnoses: so few numbers a class that the exponentials count"),
    Shape((256, 256, 100_000), "a large batch: as many rows as numbers a class, all of which are kept"),
    Shape((64, 768, 670_000), "the products of Amazon-670K: the gradient of weight is 2 GB"),
    Shape((4096, 768, 500_000), "a large batch: more rows than numbers a class", devices=("cuda",)),
)


def make_inputs(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    rows, width, classes = size
    layer = {"hidden": torch.randn(rows, width, device=device), "bias": torch.randn(classes, device=device)}
    layer["weight"] = torch.randn(classes, width, device=device) * width**-0.5
    positives = torch.randint(classes, (rows, MOST), device=device)
    positives[torch.arange(MOST, device=device) >= torch.randint(1, MOST + 1, (rows, 1), device=device)] = -1
    return {**{name: layer[name].to(dtype) for name in LAYER}, "positives": positives}


def agreement(inputs: Inputs) -> list[Agreement]:
    part = {name: x.detach()[:CHECKED] if name in ("weight", "bias") else x.detach() for name, x in inputs.items()}
    part["positives"] = inputs["positives"] % len(part["weight"])  # also of padding: as many more
    return compare("linear_zlpr_loss", part, differentiate=LAYER)


def rival(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """all scores, without dense labels: the positives are read, then set to -inf"""
    scores, padding = linear(hidden, weight, bias).float(), positives < 0
    listed = scores.gather(1, positives.clamp(min=0)).masked_fill(padding, torch.inf)
    # The 1 of the sum, and a column for the padding.
    more = scores.new_tensor([0.0, -torch.inf]).expand(len(scores), 2)
    at = torch.where(padding, scores.shape[1] + 1, positives)
    negatives = torch.cat([scores, more], dim=1).scatter(1, at, -torch.inf)
    return (torch.logsumexp(negatives, 1) + torch.logsumexp(torch.cat([-listed, more[:, :1]], dim=1), 1)).mean()


def chunks(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """the scores of 8,192 classes at a time, computed again in backward: checkpointing, as it is usually done"""

    def log_sum(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        scores = linear(hidden, weight, bias).float()
        scores = torch.cat([scores, scores.new_full((len(scores), 1), -torch.inf)], dim=1)
        return torch.logsumexp(scores.scatter(1, at, -torch.inf), 1)

    padding = positives < 0
    known = positives.clamp(min=0)
    listed = (hidden.unsqueeze(1) * weight[known]).sum(-1).float() + bias[known]
    sums, first = [], 0
    for w, b in zip(weight.split(CHUNK), bias.split(CHUNK), strict=True):
        here = (positives >= first) & (positives < first + len(w))
        at = torch.where(here, positives - first, len(w))
        sums.append(checkpoint(log_sum, hidden, w, b, at, use_reentrant=False))
        first += len(w)
    zero = torch.zeros_like(sums[0]).unsqueeze(1)
    of_positives = torch.cat([(-listed).masked_fill(padding, -torch.inf), zero], dim=1)
    loss = torch.logsumexp(torch.cat([torch.stack(sums, 1), zero], dim=1), 1) + torch.logsumexp(of_positives, 1)
    return loss.mean()


OP = Op(
    name="linear_zlpr_loss",
    shapes=SHAPES,
    quick=((32, 384, 31_000),),
    make_inputs=make_inputs,
    differentiate=LAYER,
    rival=rival,
    matrix_flops=lambda inputs, backward: (6.0 if backward else 2.0) * inputs["hidden"].numel() * len(inputs["weight"]),
    agreement=agreement,
)


def bare_products(inputs: Inputs) -> Run:
    """The three of forward and backward, each as a whole, into memory that is there."""
    hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()
    scores = hidden @ weight.T
    results = torch.empty_like(scores), torch.empty_like(hidden), torch.empty_like(weight)

    def run(_: int) -> None:
        torch.mm(hidden, weight.T, out=results[0])
        torch.mm(scores, weight, out=results[1])
        torch.mm(scores.T, hidden, out=results[2])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_zlpr_loss", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="their numbers, from 0")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each contender; default: 3")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "ours": flashpointer.linear_zlpr_loss,
        "eager": flashpointer.reference.linear_zlpr_loss,
        "sparse": rival,
        "chunks": chunks,
    }
    for number in arguments.shapes:
        shape = SHAPES[number]
        if device.type not in shape.devices:
            continue
        torch.manual_seed(0)
        inputs = make_inputs(shape.size, dtype, device)
        inputs = {name: x.requires_grad_() if name in LAYER else x for name, x in inputs.items()}
        torch._dynamo.reset()
        compiled = torch.compile(functions["eager"], fullgraph=True, dynamic=False)
        runs = {name: run_of(Contender(f), [inputs], LAYER) for name, f in {**functions, "compile": compiled}.items()}
        times = interleave({"products": bare_products(inputs), **runs}, device, arguments.seconds)
        grads = sum(inputs[name].nbytes for name in LAYER)
        print(f"{shape}, {len(inputs['positives'][0])} listed, {str(dtype).removeprefix('torch.')}")
        for name, time in times.items():
            if isinstance(time, Failure):
                print(f"  {name:9} {time}")
                continue
            line = f"  {name:9} {time.median * 1e3:9.2f} ms ({time.low * 1e3:.2f} to {time.high * 1e3:.2f})"
            if name != "products":
                line += f"  {(peak_memory(runs[name], device) - grads) / 1e6:8.2f} MB beside the gradients"
                products, ours = times["products"], times["ours"]
                if not isinstance(products, Failure):
                    line += f"  {products.median / time.median:6.1%} of the products"
                if not isinstance(ours, Failure):
                    line += f"  {time.median / ours.median:5.2f} of ours"
            print(line, flush=True)


if __name__ == "__main__":
    main()
