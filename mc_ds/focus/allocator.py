"""The focus allocator: edits a working context by LensNet's scores, at an exact length. Inference
only.

A refocus runs a number of rounds. Each round scores the current context once and trades the best
expansions for the cheapest collapses. Remembered scores and cool-downs last for one refocus only. A
round costs one call of LensNet on W entries and a few operations on T/K numbers.

Legend: R rows, W entries, T tokens, K block size, n (n_1) head blocks. Source: docs/inference.md,
"Focus".
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
"""Scores are clamped to +-LARGEST, so that their sums and differences stay finite. NaN becomes
-LARGEST.
"""


class FocusAllocator:
    """Refocuses the working contexts of all rows at once.

    Raises InvariantError if constructed or called outside `controller.inference()`.
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
        """Refocus the plan `lods`, `starts` [R, W], which must cover the history, and return a plan
        of exactly `wc_length` entries (default: W).

        * `score` returns LensNet's scores of a plan; it is called once per round.
        * `iterations` replaces the configured number of rounds.
        * `edit_penalty` [R, n_1] >= 0 is added to the threshold for edits of each head block.
        * `rescored` [R, n_1] holds scores that replace LensNet's in every round; NaN: LensNet's is
          used.
        * Nodes above level `expand_up_to` are not expanded, unless the length cannot be reached
          otherwise.

        The result has the exact length and covers the history for any scores; non-finite scores
        count as +-`LARGEST`. Raises ValueError for an unreachable length, fewer than one round, or
        a plan that does not begin at token 0.
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
        # Per block: its LOD, the score it had when last open, the round of its last edit.
        blocks_Rn = block_lods(lods, starts, geometry)
        remembered_Rn = torch.full(blocks_Rn.shape, torch.nan, device=blocks_Rn.device)
        last_edit_Rn = torch.full_like(blocks_Rn, -1 - config.cooldown)
        in_budget = lods.size(1) == length
        for iteration in range(rounds):
            # Score the context. A block's remembered or rescored value replaces its score.
            values_Rn = block_scores(_finite(score(lods, starts).float()), lods, starts, geometry)
            if config.memory:
                remembered_Rn = torch.where(blocks_Rn == 0, values_Rn, remembered_Rn)
                values_Rn = torch.where(remembered_Rn.isnan(), values_Rn, remembered_Rn)
            if rescored is not None:
                values_Rn = torch.where(rescored.isnan(), values_Rn, _finite(rescored))
            # Edit, except blocks whose last edit is within the cool-down.
            frozen_Rn = iteration - last_edit_Rn <= config.cooldown
            edited_Rn = self._edits(
                blocks_Rn,
                values_Rn,
                frozen_Rn,
                length,
                1 if in_budget else 1 + geometry.max_lod,
                edit_penalty,
                expand_up_to,
            )
            last_edit_Rn = torch.where(edited_Rn != blocks_Rn, iteration, last_edit_Rn)
            blocks_Rn, in_budget = edited_Rn, True
            lods, starts = plan_of_blocks(blocks_Rn, geometry, length)
        return lods, starts

    def _edits(
        self,
        blocks_Rn: Tensor,
        values_Rn: Tensor,
        frozen_Rn: Tensor,
        length: int,
        passes: int,
        edit_penalty: Tensor | None,
        expand_up_to: int | None,
    ) -> Tensor:
        """Return the block LODs [R, n_1] after one round of edits.

        A pass moves a node by one level only, so a context of another length takes several `passes`
        to reach `length`.
        """
        geometry, config = self.geometry, self.config
        for attempt in range(passes):
            spare = units_used(blocks_Rn, geometry) - geometry.units(length)
            blocks_Rn = trade(
                blocks_Rn,
                values_Rn,
                frozen_Rn,
                geometry,
                spare_units_R=spare,
                threshold=config.threshold,
                max_replacements=config.max_replacements if attempt == 0 else 0,
                edit_penalty_Rn=edit_penalty,
                expand_up_to=expand_up_to if attempt == 0 else None,
            )
        return blocks_Rn

    def _check_phase(self) -> None:
        if self.controller.phase is not Phase.INFERENCE:
            raise InvariantError(
                "the focus allocator is inference-only: call it inside controller.inference()"
            )


def _finite(scores: Tensor) -> Tensor:
    """Return scores clamped to +-LARGEST, with NaN as -LARGEST."""
    return scores.nan_to_num(nan=-LARGEST, posinf=LARGEST, neginf=-LARGEST).clamp(-LARGEST, LARGEST)
