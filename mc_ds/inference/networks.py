"""`Networks`: the networks of one model that a session needs."""

from dataclasses import dataclass

import torch

from mc_ds.config import MCConfig
from mc_ds.focus.controller import MCController
from mc_ds.inference.tree.nets import TreeNets
from mc_ds.model.backbone import Backbone
from mc_ds.model.lensnet import LensNet


@dataclass(frozen=True, eq=False)
class Networks:
    """The networks of a model, all on one device and in evaluation mode."""

    mc: MCConfig
    backbone: Backbone
    nets: TreeNets
    """The networks that compute a tree's gists and index vectors."""
    lensnet: LensNet | None
    controller: MCController
    """Runs LensNet through `LensInput`."""

    @property
    def device(self) -> torch.device:
        """Device of all networks."""
        return self.nets.device
