"""Read the weights in a checkpoint of any ZeRO stage (1 to 3), precision and number of ranks: each
parameter is assembled from its ranks' parts, one at a time.

The weights are the optimizer's float32 master weights. Frozen parameters have none: they are taken
from the model states, in the precision in which they ran.

| stage | weights are in | as | |---|---|---| | 1, 2 | optimizer states of every rank | a flat
vector per group, cut into one part per rank | | 3 | optimizer states of every rank | every
parameter cut into one equal part per rank |

The bf16 optimizer of stage 1 with float32 accumulation writes stage 1's vectors including their
padding. Observed with DeepSpeed 0.19.8.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.weights.checkpoint.lazy import Piece, StoredTensor, load_lazy, piece_of, stored_in

LENS = "lens.pt"
"""File with LensNet, its optimizer and its statistics."""
WHOLE = "mp_rank_00_model_states.pt"
"""File with the model states of stages 1 and 2."""
OPTIMIZER, MODEL = (
    "zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
    "zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
)
"""Files of optimizer states (prefixed by `bf16_` in bf16), and of model states of stage 3."""
FLAT = "single_partition_of_fp32_groups"
"""Key in the optimizer files of stages 1 and 2 of a rank's flat partitions of master weights, one
per group.
"""


@dataclass(frozen=True)
class EngineWeights:
    """Backbone and GistNet as stored in a checkpoint, read on demand."""

    checkpoint: Path
    tensors: dict[str, StoredTensor]
    """Every parameter by name, except tied ones."""
    tied: dict[str, str]
    """Maps the names of tied parameters to the names whose weights they share."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and values of every parameter, each as a new tensor, so that a caller that
        keeps one at a time needs only the memory of the largest.
        """
        return ((name, tensor.read()) for name, tensor in self.tensors.items())

    def state_dict(self) -> dict[str, Tensor]:
        """Return all weights at once, including tied names, for `load_state_dict`."""
        weights = dict(self)
        return weights | {name: weights[target] for name, target in self.tied.items()}


def engine_weights(checkpoint: Path) -> EngineWeights:
    """Locate every parameter of backbone and GistNet in a checkpoint.

    Raises ConfigError, in one line, for missing, damaged or unknown files, and for parameters that
    are missing, incomplete or unknown.
    """
    if foreign := sorted(
        path.name for path in checkpoint.glob("*_states.pt") if "mp_rank_00" not in path.name
    ):
        raise ConfigError(
            f"{checkpoint} was written with model parallelism ({foreign[0]}), which is not"
            " supported: use a checkpoint of this trainer"
        )
    optimizer_files = _rank_files(checkpoint, OPTIMIZER)
    if not optimizer_files:
        raise ConfigError(
            f"{checkpoint} lacks {OPTIMIZER.format(rank=0)}: it is not a checkpoint, or files"
            " were lost"
        )
    if (checkpoint / WHOLE).exists():
        path, states = checkpoint / WHOLE, _model_states(checkpoint / WHOLE)
        tensors, tied = _flat(optimizer_files, states), _tied(states)
        untrained = [name for name in states["module"] if name not in tensors | tied]
        tensors |= stored_in(path, untrained, states["module"])
    else:
        paths = [checkpoint / MODEL.format(rank=rank) for rank in range(len(optimizer_files))]
        all_states = [_model_states(path) for path in paths]
        states, tied = all_states[0], _tied(all_states[0])
        tensors = _partitioned(optimizer_files, states) | _frozen_partitions(paths, all_states)
    _check_names(checkpoint, states, tensors, tied)
    return EngineWeights(checkpoint, tensors, tied)


def lens_weights(checkpoint: Path) -> dict[str, StoredTensor]:
    """Return LensNet's weights in a checkpoint, by name. Raises ConfigError if the file is missing
    or damaged.
    """
    path = checkpoint / LENS
    state = load_lazy(path)
    if not isinstance(state, Mapping) or not isinstance(state.get("lensnet"), Mapping):
        raise ConfigError(f"{path} holds no LensNet: restore it, or use another checkpoint")
    return stored_in(path, list(state["lensnet"]), state["lensnet"])


def _rank_files(checkpoint: Path, pattern: str) -> list[Path]:
    """Return the optimizer files of all ranks in rank order. `_optimizer_states` verifies that none
    is missing.
    """
    for prefix in ("bf16_", ""):
        names = f"{prefix}{pattern}"
        count = len(list(checkpoint.glob(names.format(rank="*"))))
        if count:
            return [checkpoint / names.format(rank=rank) for rank in range(count)]
    return []


def _model_states(path: Path) -> Mapping[str, Any]:
    states = load_lazy(path)
    if not isinstance(states, Mapping) or not isinstance(states.get("module"), Mapping):
        raise ConfigError(f"{path} holds no model states: restore it, or use another checkpoint")
    return states


def _optimizer_states(paths: list[Path]) -> list[Mapping[str, Any]]:
    """Return the saved optimizer of every rank. Raises ConfigError if ranks are missing or files
    are from runs with different numbers of ranks.
    """
    found = []
    for rank, path in enumerate(paths):
        states = load_lazy(path)
        if not isinstance(states, Mapping) or not isinstance(
            states.get("optimizer_state_dict"), Mapping
        ):
            raise ConfigError(
                f"{path} holds no optimizer states: restore it, or use another checkpoint"
            )
        found.append(states["optimizer_state_dict"])
        counts = found[-1].get("partition_count")
        world = max(counts) if isinstance(counts, list) else counts
        if world != len(paths):
            others = (
                path.with_name(path.name.replace(f"pp_rank_{rank}_", f"pp_rank_{other}_"))
                for other in range(world or 0)
            )
            lost = next(
                (f"{other.name} is missing" for other in others if not other.exists()),
                f"there are files of {len(paths)} ranks",
            )
            raise ConfigError(
                f"{path} was written by {world} ranks, and {lost}: restore it, or use another"
                " checkpoint"
            )
    return found


def _flat(paths: list[Path], states: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Locate the tensors of stages 1 and 2 and of the bf16 optimizer: each group is one flat
    vector, cut into consecutive partitions, one per rank.

    The files also record which slice of which parameter is where, but wrongly under
    `round_robin_gradients`, so the order of the shapes is used instead.
    """
    optimizers = _optimizer_states(paths)
    partitions = [_list(path, states, FLAT) for path, states in zip(paths, optimizers, strict=True)]
    paddings = [
        _list(path, states, "group_paddings")
        for path, states in zip(paths, optimizers, strict=True)
    ]
    groups = _shape_groups(states)
    if any(len(per_rank) != len(groups) for per_rank in (*partitions, *paddings)):
        raise ConfigError(
            f"{paths[0].parent}: some rank does not have {len(groups)} groups of weights: use"
            " another checkpoint"
        )
    between = optimizers[0].get("param_alignment_paddings") or [
        [0] * len(shapes) for shapes in groups
    ]
    tensors: dict[str, StoredTensor] = {}
    for number, shapes in enumerate(groups):
        pieces = [
            piece_of(path, per_rank[number])
            for path, per_rank in zip(paths, partitions, strict=True)
        ]
        wanted = sum(map(prod, shapes.values())) + sum(between[number])
        beyond = sum(piece.count for piece in pieces) - wanted
        # Stages 1 and 2 save their partitions without padding.
        if beyond not in (0, sum(per_rank[number] for per_rank in paddings)):
            raise ConfigError(
                f"{paths[0].parent}: group {number} has {wanted + beyond} weights in the files of"
                f" all ranks, not {wanted}: use another checkpoint"
            )
        take = _taker(pieces)
        for (name, shape), padding in zip(shapes.items(), between[number], strict=True):
            tensors[name] = StoredTensor(shape, tuple(take(prod(shape))))
            take(padding)
    return tensors


def _partitioned(paths: list[Path], states: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Locate the tensors of stage 3: every rank holds ceil(n / ranks) elements of each parameter of
    n elements, one parameter after the other across its flat groups.
    """
    shapes, world = (
        {name: shape for group in _shape_groups(states) for name, shape in group.items()},
        len(paths),
    )
    parts = {name: -(-prod(shape) // world) for name, shape in shapes.items()}
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for path, optimizer in zip(paths, _optimizer_states(paths), strict=True):
        groups = [piece_of(path, flat) for flat in _list(path, optimizer, "fp32_flat_groups")]
        available = sum(group.count for group in groups)
        if available != sum(parts.values()):
            raise ConfigError(
                f"{path} holds {available} weights, but the share of one rank is"
                f" {sum(parts.values())}: use another checkpoint"
            )
        take = _taker(groups)
        for name, count in parts.items():
            pieces[name] += take(count)
    return {name: StoredTensor(shapes[name], tuple(found)) for name, found in pieces.items()}


def _taker(pieces: list[Piece]) -> Callable[[int], list[Piece]]:
    """Return a function that removes and returns the next `count` elements of consecutive
    pieces.
    """
    rest = deque(pieces)

    def take(count: int) -> list[Piece]:
        taken: list[Piece] = []
        while count:
            head = rest.popleft()
            size = min(count, head.count)
            if size:
                taken.append(head.part(0, size))
            if size < head.count:
                rest.appendleft(head.part(size, head.count - size))
            count -= size
        return taken

    return take


def _frozen_partitions(
    paths: list[Path], all_states: list[Mapping[str, Any]]
) -> dict[str, StoredTensor]:
    """Locate the frozen parameters of stage 3, which the optimizer does not hold: equal parts in
    the model states of every rank.
    """
    shapes = {
        name: tuple(shape)
        for name, shape in (all_states[0].get("frozen_param_shapes") or {}).items()
    }
    tensors = {}
    for name, shape in shapes.items():
        pieces = []
        for path, states in zip(paths, all_states, strict=True):
            fragments = states.get("frozen_param_fragments") or {}
            if name not in fragments:
                raise ConfigError(f"{path} lacks its part of {name}: use another checkpoint")
            pieces.append(piece_of(path, fragments[name]))
        if any(piece.count != -(-prod(shape) // len(paths)) for piece in pieces):
            raise ConfigError(
                f"{paths[0].parent}: the ranks' parts of {name} are not equal parts of"
                f" {prod(shape)} elements: use another checkpoint"
            )
        tensors[name] = StoredTensor(shape, tuple(pieces))
    return tensors


def _tied(states: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): str(owner) for name, owner in (states.get("shared_params") or {}).items()}


def _shape_groups(states: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of the trained parameters by name, in the optimizer's groups and order."""
    return [
        {str(name): tuple(shape) for name, shape in group.items()}
        for group in states.get("param_shapes") or []
    ]


def _list(path: Path, optimizer: Mapping[str, Any], key: str) -> list[Any]:
    """Return the list under `key` of a saved optimizer. Raises ConfigError if there is none."""
    found = optimizer.get(key)
    if not isinstance(found, list):
        raise ConfigError(
            f"{path} has no {key}: it was not written by DeepSpeed 0.19, or the file belongs to"
            " another stage"
        )
    return found


def _check_names(
    checkpoint: Path,
    states: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    tied: Mapping[str, str],
) -> None:
    """Raise ConfigError unless the tensors and tied names are exactly those of the module's
    state.
    """
    wanted = set(states["module"]) - set(states.get("buffer_names") or [])
    found = tensors.keys() | tied.keys()
    if missing := sorted(wanted - found) + sorted(set(tied.values()) - tensors.keys()):
        raise ConfigError(
            f"{checkpoint}: {len(missing)} of {len(wanted)} parameters have no weights"
            f" ({', '.join(missing[:3])}): use another checkpoint"
        )
    if unknown := sorted(found - wanted):
        raise ConfigError(
            f"{checkpoint}: it has weights of {len(unknown)} parameters that the model lacks"
            f" ({', '.join(unknown[:3])}): use another checkpoint"
        )
