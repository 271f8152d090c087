"""The focus allocator: LensNet's scores steer a working context within an exact budget. Inference only.

Each round scores the present context once, trades the best expansions against the cheapest collapses, and goes on until the rounds are
spent. Memory and cool-down live within one refocus, for a fixed tail: new tokens start a new one. Source: docs/design.md, "Focus".

The work of a round grows with the number of head blocks (a few cheap operations on T/K numbers) and with W, not with T.

Legend: R rows, W entries, T tokens, K block size, n_1 head blocks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mc_ds.config.focus import FocusConfig
from mc_ds.controller import InvariantError, MCController, Phase
from mc_ds.focus.cover import block_lods, block_scores, plan_of_blocks, units_used
from mc_ds.focus.trades import trade
from mc_ds.geometry import Geometry

Scorer = Callable[[Tensor, Tensor], Tensor]
"""Maps a plan (`lods`, `starts` [R, W]) to LensNet's scores [R, W]."""


class FocusAllocator:
    """Refocuses working contexts, all rows at once. Construct it through `MCController.focus_allocator`.

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
        reluctance: Tensor | None = None,
        heard: Tensor | None = None,
        expand_up_to: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A plan of exactly `wc_length` entries (by default as many as the given one), focused from the full-coverage plan [R, W].

        `iterations` replaces the configured number of rounds. `reluctance` [R, n_1] >= 0 is what editing each head block must gain beyond
        the threshold. `heard` [R, n_1] are scores that hold for the whole refocus, NaN for blocks that have none. `expand_up_to` leaves
        nodes above this level as coarse as they are, unless a plan of another length cannot be brought to it otherwise.
        Raises ValueError for a length that cannot be reached.
        """
        self._check_phase()
        geometry, config = self.geometry, self.config
        length = wc_length or lods.size(1)
        geometry.check_wc_length(length, name="wc_length")
        in_budget = lods.size(1) == length
        blocks = block_lods(lods, starts, geometry)
        remembered = torch.full(blocks.shape, torch.nan, device=blocks.device)
        last_edit = torch.full_like(blocks, -1 - config.cooldown)
        for iteration in range(iterations or config.iterations):
            values = block_scores(score(lods, starts).float(), lods, starts, geometry)
            if config.memory:
                remembered = torch.where(blocks == 0, values, remembered)
                values = torch.where(remembered.isnan(), values, remembered)
            if heard is not None:
                values = torch.where(heard.isnan(), values, heard)
            frozen = iteration - last_edit <= config.cooldown
            edited = self._rounds(blocks, values, frozen, length, 1 if in_budget else 1 + geometry.max_lod, reluctance, expand_up_to)
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
        reluctance: Tensor | None,
        expand_up_to: int | None,
    ) -> Tensor:
        """Edits after one scoring. A context of another length first comes to the budget: each pass reaches one level further."""
        geometry, config = self.geometry, self.config
        for attempt in range(passes):
            spare = units_used(blocks, geometry) - geometry.units(length)
            blocks = trade(
                blocks,
                values,
                frozen & (spare == 0)[:, None],
                geometry,
                spare_units_R=spare,
                threshold=config.threshold,
                max_replacements=config.max_replacements if attempt == 0 else 0,
                reluctance_Rn=reluctance,
                expand_up_to=expand_up_to if attempt == 0 else None,
            )
        return blocks

    def _check_phase(self) -> None:
        if self.controller.phase is not Phase.INFERENCE:
            raise InvariantError("the focus allocator is inference-only: use it inside controller.inference()")
