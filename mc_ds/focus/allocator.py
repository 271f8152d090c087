"""The focus allocator: LensNet's scores steer a working context within an exact budget. Inference
only.

Each round scores the present context once, trades the best expansions against the cheapest
collapses, and goes on until the rounds are spent. Memory and cool-down live within one refocus, for
a fixed tail: new tokens start a new one. Source: docs/inference.md, "Focus".

The work of a round grows with the number of head blocks (a few cheap operations on T/K numbers) and
with W, not with T.

Legend: R rows, W entries, T tokens, K block size, n_1 head blocks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mc_ds.config.focus import FocusConfig
from mc_ds.focus.controller import InvariantError, MCController, Phase
from mc_ds.focus.cover import block_lods, block_scores, plan_of_blocks, units_used
from mc_ds.focus.trades import trade
from mc_ds.geometry import Geometry

Scorer = Callable[[Tensor, Tensor], Tensor]
"""Maps a plan (`lods`, `starts` [R, W]) to LensNet's scores [R, W]."""
LARGEST = 1e30
"""Scores are held between this and its negative, so that sums and differences of them stay finite;
NaN counts as the negative.
"""


class FocusAllocator:
    """Refocuses working contexts, all rows at once.

    Raises InvariantError when constructed or called in the training phase.
    """

    def __init__(self, controller: MCController, geometry: Geometry, config: FocusConfig) -> None:
        self.controller, self.geometry, self.config = controller, geometry, config
        self._check_phase()

    @torch.no_grad()
    def focus(
        self,
        lods: Tensor,
        starts: Tensor,
        *,
        score: Scorer,
        wc_length: int | None = None,
        iterations: int | None = None,
        edit_penalty: Tensor | None = None,
        rescored: Tensor | None = None,
        expand_up_to: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return a plan of exactly `wc_length` entries (by default as many as the given one),
        focused from the full-coverage plan [R, W].

        `iterations` replaces the configured number of rounds. `edit_penalty` [R, n_1] >= 0 is what
        editing each head block must gain beyond the threshold. `rescored` [R, n_1] are scores that
        hold for the whole refocus, NaN for blocks that have none. `expand_up_to` leaves nodes above
        this level as coarse as they are, unless a plan of another length cannot be brought to it
        otherwise. Whatever the scores are, the plan has the length and covers the history: those
        that are not finite count as +-`LARGEST`. Raises ValueError for a length that cannot be
        reached, fewer rounds than one, or a plan that leaves out the beginning.
        """
        self._check_phase()
        geometry, config = self.geometry, self.config
        length = lods.size(1) if wc_length is None else wc_length
        rounds = config.iterations if iterations is None else iterations
        geometry.check_wc_length(length, name="wc_length")
        if rounds < 1:
            raise ValueError(f"iterations = {rounds} must be at least 1")
        if bool((starts[:, 0] != 0).any()):
            raise ValueError(
                f"focus needs plans that cover the history, but a row begins at token "
                f"{int(starts[:, 0].max())}, not 0"
            )
        edit_penalty = None if edit_penalty is None else _finite(edit_penalty).clamp_min(0)
        in_budget = lods.size(1) == length
        blocks = block_lods(lods, starts, geometry)
        remembered = torch.full(blocks.shape, torch.nan, device=blocks.device)
        last_edit = torch.full_like(blocks, -1 - config.cooldown)
        for iteration in range(rounds):
            values = block_scores(_finite(score(lods, starts).float()), lods, starts, geometry)
            if config.memory:
                remembered = torch.where(blocks == 0, values, remembered)
                values = torch.where(remembered.isnan(), values, remembered)
            if rescored is not None:
                values = torch.where(rescored.isnan(), values, _finite(rescored))
            frozen = iteration - last_edit <= config.cooldown
            edited = self._rounds(
                blocks,
                values,
                frozen,
                length,
                1 if in_budget else 1 + geometry.max_lod,
                edit_penalty,
                expand_up_to,
            )
            last_edit = torch.where(edited != blocks, iteration, last_edit)
            blocks, in_budget = edited, True
            lods, starts = plan_of_blocks(blocks, geometry, length)
        return lods, starts

    def _rounds(
        self,
        blocks: Tensor,
        values: Tensor,
        frozen: Tensor,
        length: int,
        passes: int,
        edit_penalty: Tensor | None,
        expand_up_to: int | None,
    ) -> Tensor:
        """Return edits after one scoring. A context of another length first comes to the budget:
        each pass reaches one level further.
        """
        geometry, config = self.geometry, self.config
        for attempt in range(passes):
            spare = units_used(blocks, geometry) - geometry.units(length)
            blocks = trade(
                blocks,
                values,
                frozen,
                geometry,
                spare_units_R=spare,
                threshold=config.threshold,
                max_replacements=config.max_replacements if attempt == 0 else 0,
                edit_penalty_Rn=edit_penalty,
                expand_up_to=expand_up_to if attempt == 0 else None,
            )
        return blocks

    def _check_phase(self) -> None:
        if self.controller.phase is not Phase.INFERENCE:
            raise InvariantError(
                "the focus allocator is inference-only: use it inside controller.inference()"
            )


def _finite(scores: Tensor) -> Tensor:
    """Return the scores between -LARGEST and LARGEST; NaN, which says nothing, becomes the
    lowest.
    """
    return scores.nan_to_num(nan=-LARGEST, posinf=LARGEST, neginf=-LARGEST).clamp(-LARGEST, LARGEST)
