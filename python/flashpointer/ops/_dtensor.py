"""DTensors as arguments: each rank computes on its local tensors, and what it returns is wrapped.

An op says by a decorator what the dimensions of its tensors are. On each dimension of their mesh at most one of these
may be sharded: one of the batch; or the classes, of an op that takes a group. Then it must be sharded in every tensor
that has it, and the other tensors are replicated. Nothing is redistributed here, for that is to communicate, which is
the caller's to decide.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from . import _checks, _shards
from ._register import PLAIN

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

P = ParamSpec("P")
R = TypeVar("R")

# The name of a dimension: its index among those of the batch, as in the first tensor and in what an op returns; or
# CLASSES; or None for one that must be whole.
Dim = int | str | None
CLASSES = "classes"


class Kind(NamedTuple):
    """Of an op."""

    tensors: tuple[str, ...]  # its tensors, by name; the first is required
    dims: Callable[[str, torch.Tensor, torch.Tensor], list[Dim]]  # of one: its name, it, and the first tensor
    takes: str  # how they may be sharded, for an error
    ragged: bool = False  # whether dimension 1 of what is returned is as long as a rank's longest


# --- the kinds of ops ------------------------------------------------------------------------------------------------


def of_rows(*tensors: str, by_class: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For an op on rows of cells: tensors that broadcast to the first one, [..., C], and lists [..., P]."""

    def dims(name: str, x: torch.Tensor, first: torch.Tensor) -> list[Dim]:
        names: list[Dim] = [*range(first.dim() - 1), CLASSES if by_class and name != "positives" else None]
        missing = first.dim() - x.dim()
        broadcast = name == "mask"
        return [
            None if at < 0 or (broadcast and size == 1 != first.shape[at]) else names[at]
            for at, size in enumerate(x.shape, start=missing)
        ]

    return _takes(Kind(tensors, dims, "sharded by rows or by classes" if by_class else "sharded by rows"))


def of_layer(*tensors: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For an op on a linear layer: its input, hidden [..., D], weight [C, D], bias [C] and lists [..., P]."""

    def dims(name: str, x: torch.Tensor, first: torch.Tensor) -> list[Dim]:
        names: list[Dim] = [CLASSES, None] if name in ("weight", "bias") else [*range(first.dim() - 1), None]
        return [*names, *[None] * x.dim()][: x.dim()]

    return _takes(Kind(tensors, dims, "sharded by rows, or a weight by classes, Shard(0)"))


def of_sentences(*tensors: str, ragged: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For an op on sentences: tensors [B, ...], but for positions [N] and flat spans [S, 4]."""

    def dims(name: str, x: torch.Tensor, first: torch.Tensor) -> list[Dim]:
        names: list[Dim] = [0, *[None] * x.dim()]
        batch = not (name == "positions" and x.dim() == 1) and not _is_flat(name, x)
        return names[: x.dim()] if batch else names[1:]

    return _takes(Kind(tensors, dims, "sharded by sentences, Shard(0)", ragged))


def _is_flat(name: str, x: torch.Tensor) -> bool:
    return name == "spans" and x.dim() == 2


# --- calls -----------------------------------------------------------------------------------------------------------


def _takes(kind: Kind) -> Callable[[Callable[P, R]], Callable[P, R]]:
    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if _any_dtensor(args) or _any_dtensor(kwargs.values()):
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                return _on_locals(function, kind, bound.arguments)  # type: ignore[no-any-return]
            return function(*args, **kwargs)

        return call

    return decorate


def _any_dtensor(arguments: Iterable[object]) -> bool:
    for x in arguments:  # noqa: SIM110 (a loop, and no generator: this runs before every call)
        if type(x) not in PLAIN and isinstance(x, torch.Tensor) and _is_dtensor(x):
            return True
    return False


def _is_dtensor(x: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # until it is imported there is none
    return module is not None and isinstance(x, module.DTensor)


def _on_locals(function: Callable[..., Any], kind: Kind, arguments: dict[str, Any]) -> Any:
    from torch.distributed.tensor import Partial

    op, leader = function.__name__, kind.tensors[0]
    given = {name: arguments[name] for name in kind.tensors if isinstance(arguments[name], torch.Tensor)}
    if leader not in given:  # which is an error of another kind
        return function(**arguments)
    _check_meshes(op, given)
    first, mesh = given[leader], given[leader].device_mesh
    dims = {name: kind.dims(name, x, first) for name, x in given.items()}
    sharded = [_sharded_dim(op, kind, given, dims, i) for i in range(mesh.ndim)]
    if kind.ragged and 0 in sharded and arguments["padded"] is False:
        raise ValueError(f"{op}: padded takes True where {leader} is sharded by sentences, which flat spans count")
    if arguments.get("weight_grad") is not None and any(isinstance(d, int) for d in sharded):
        takes = f"None where {leader} is sharded by rows, of whose gradient each rank has a part"
        raise ValueError(f"{op}: weight_grad takes {takes}; got {_checks.describe(arguments['weight_grad'])}")
    local = {}
    for name, x in given.items():
        # Of the gradient of what all have, each rank has the part that is of its rows or classes.
        placed = zip(sharded, x.placements, strict=True)
        grads = [Partial() if d is not None and p.is_replicate() else p for d, p in placed]
        local[name] = x.to_local(grad_placements=grads)
    options = _group_of(op, mesh, sharded, dims, given, arguments) if "group" in arguments else {}
    result = function(**{**arguments, **local, **options})
    sizes = {d: (local[leader].shape[d], first.shape[d]) for d in sharded if isinstance(d, int)}
    if arguments.get("reduction") == "mean":  # of all rows, of which this rank has so many
        for here, everywhere in sizes.values():
            result = result * (here / max(1, everywhere))
    if arguments.get("reduction", "none") != "none":
        return _wrapped(result, mesh, [Partial() if isinstance(d, int) else None for d in sharded], {})
    if not isinstance(result, tuple):
        return _wrapped(result, mesh, sharded, sizes)
    of_result = type(result)
    if kind.ragged and sizes:
        result = [_padded(x, mesh, sharded) for x in result]
    wrapped = [_wrapped(x, mesh, sharded, sizes) for x in result]
    return of_result(*wrapped) if hasattr(of_result, "_fields") else tuple(wrapped)


def _wrapped(x: torch.Tensor, mesh: DeviceMesh, placed: list[Any], sizes: dict[int, tuple[int, int]]) -> torch.Tensor:
    """A local tensor as a DTensor: sharded by the dimensions of the batch, whose sizes are given, or partial."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(d) if isinstance(d, int) else Replicate() if d in (None, CLASSES) else d for d in placed]
    if not sizes:
        return DTensor.from_local(x, mesh, placements, run_check=False)
    shape = torch.Size([sizes[d][1] if d in sizes else size for d, size in enumerate(x.shape)])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)


def _padded(x: torch.Tensor, mesh: DeviceMesh, sharded: list[Dim]) -> torch.Tensor:
    """Spans [B, P, 3], or their scores [B, P], as long as those of the rank that has the longest."""
    longest = torch.tensor(x.shape[1], device=x.device)
    for i, d in enumerate(sharded):
        if d is not None:
            dist.all_reduce(longest, dist.ReduceOp.MAX, group=mesh.get_group(i))
    return torch.nn.functional.pad(x, [0] * 2 * (x.dim() - 2) + [0, int(longest) - x.shape[1]], value=-100)


def _group_of(
    op: str,
    mesh: DeviceMesh,
    sharded: list[Dim],
    dims: dict[str, list[Dim]],
    given: dict[str, Any],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """The options group and first_class of an op that has them."""
    options = [name for name in ("group", "first_class") if name in arguments]
    for name in options:
        if arguments[name] is not None:
            got = _checks.describe(arguments[name])
            raise ValueError(f"{op}: {name} takes None beside DTensors, whose mesh knows it; got {got}")
    if CLASSES not in sharded:
        return {}
    i, having = sharded.index(CLASSES), next(name for name in given if CLASSES in dims[name])
    classes = given[having].shape[dims[having].index(CLASSES)]
    if sharded.count(CLASSES) > 1:
        takes, got = "a DTensor whose classes are sharded on one dimension of the mesh", given[having].placements
        raise ValueError(f"{op}: {having} takes {takes}; got {got}: redistribute() makes one")
    # As DTensor cuts them: into shards of one size, and what is left for the last ones.
    first_class = min(mesh.get_local_rank(i) * -(-classes // mesh.size(i)), classes)
    group = mesh.get_group(i)
    if "weight_grad" in arguments:  # whose op would sum the gradient of hidden
        return {"group": _shards.Apart(group), "first_class": first_class}
    return {"group": group} | ({"first_class": first_class} if "first_class" in arguments else {})


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_meshes(op: str, given: dict[str, Any]) -> None:
    """Raises unless all are DTensors on one mesh, and no flat spans beside sharded sentences."""
    like, one = next((name, x) for name, x in given.items() if _is_dtensor(x))
    for name, x in given.items():
        if _is_flat(name, x) and any(p.is_shard() for p in one.placements):
            takes = "batch-first [B, P, 3] where sentences are sharded, which flat spans [S, 4] count"
            raise ValueError(f"{op}: {name} takes {takes}; got {_checks.describe(x)}: spans.pad() makes them so")
        if not _is_dtensor(x):
            takes = f"a DTensor, as {like} is one"
            raise TypeError(f"{op}: {name} takes {takes}; got {_checks.describe(x)}: distribute_tensor() makes one")
        if x.device_mesh != one.device_mesh:
            raise ValueError(f"{op}: {name} takes a DTensor on the mesh of {like}; got one on {x.device_mesh}")


def _sharded_dim(op: str, kind: Kind, given: dict[str, Any], dims: dict[str, list[Dim]], i: int) -> Dim:
    """What is sharded on dimension i of the mesh."""
    from torch.distributed.tensor import Replicate, Shard

    sharded, like = None, ""
    for name, x in given.items():
        placement = x.placements[i]
        dim = dims[name][placement.dim] if type(placement) is Shard else None
        if dim is None and not placement.is_replicate():
            takes = f"a DTensor that is replicated or {kind.takes}"
            raise ValueError(f"{op}: {name} takes {takes}; got {x.placements}: redistribute() makes one")
        if sharded is None:
            sharded, like = dim, name
    for name, x in given.items():
        has = sharded is not None and sharded in dims[name]
        fitting = Shard(dims[name].index(sharded)) if has else Replicate()
        if x.placements[i] != fitting:
            takes = f"{(*x.placements[:i], fitting, *x.placements[i + 1 :])} beside {like} of {given[like].placements}"
            raise ValueError(f"{op}: {name} takes {takes}; got {x.placements}: redistribute() makes it so")
    return sharded
