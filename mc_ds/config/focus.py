"""`FocusConfig`: how the focus allocator turns LensNet's scores into edits of a working context.
Inference only.
"""

from pydantic import Field, NonNegativeInt, PositiveInt

from mc_ds.config.errors import Settings
from mc_ds.config.sizes import Depth


class FocusConfig(Settings):
    """Knobs of one refocus."""

    iterations: Depth = 4
    """Rounds of scoring and editing."""
    max_replacements: PositiveInt = 256
    """Trades (one expansion against one collapse) per row and round at most."""
    threshold: float = Field(default=0.02, ge=0)
    """What an expansion's score must exceed a collapse's by: hysteresis against edits that
    hardly matter.
    """
    cooldown: NonNegativeInt = 1
    """Rounds for which an edited block is not edited back."""
    memory: bool = True
    """Within one refocus a block once read at full detail keeps the score it got there after it
    is folded.
    """
