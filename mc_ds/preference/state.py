"""Running second moment of the gains, which normalises the size of a gain.

Source: docs/lensnet-pairwise-training.md, "Preference learning", one ratio across ranks and
micro-steps.
"""

import torch
from torch import Tensor


def gain_std(sum_sq: Tensor, count: Tensor) -> Tensor:
    """Return the standard deviation of gains, sqrt(sum g^2 / n), 0-d; 0 without gains. Their mean
    is zero, since each pair counts in both directions.
    """
    return torch.where(count > 0, sum_sq / torch.where(count > 0, count, 1.0), 0.0).sqrt()


class GainMoments:
    """Sum of squared gains and their number, float64, decayed by `beta` at each optimizer step.

    A step reads the moments of the steps before it; after it, call `update` with the sums of all
    its micro-steps and ranks. Call `reset` whenever W changes, since gains of different lengths are
    not comparable. Never synchronises with the host.
    """

    def __init__(self, beta: float, device: torch.device | str = "cpu") -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta = {beta} must lie in [0, 1)")
        self.beta = beta
        self.moments = torch.zeros(2, dtype=torch.float64, device=device)
        """Sum of squares and number of gains, [2]."""
        self.sum_sq, self.count = self.moments.unbind()

    def std(self) -> Tensor:
        """Return the running standard deviation of the gains, float64 0-d; 0 while there are
        none.
        """
        return gain_std(self.sum_sq, self.count)

    def update(self, sum_sq: Tensor, count: Tensor) -> None:
        """Decay the moments and add those of the step that ended: `sum_sq` is the sum of g^2 over
        its gains, `count` their number.
        """
        self.sum_sq.mul_(self.beta).add_(sum_sq.detach())
        self.count.mul_(self.beta).add_(count.detach())

    def reset(self) -> None:
        """Set the moments to zero."""
        self.sum_sq.zero_()
        self.count.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moments, for a checkpoint."""
        return {"sum_sq": self.sum_sq.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        self.sum_sq.copy_(state["sum_sq"])
        self.count.copy_(state["count"])
