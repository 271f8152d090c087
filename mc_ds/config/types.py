"""Types that settings share: paths, bounded sizes, and shares.

The bounds are far above any real model. They keep a config from elsewhere from allocating without
limit.
"""

import os
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path that may begin with `~`, which is expanded when the setting is validated."""
Width = Annotated[int, Field(gt=0, le=1 << 20)]
"""Channels, heads, or entries of a layer."""
Depth = Annotated[int, Field(gt=0, le=1 << 10)]
"""Layers or rounds."""
Tokens = Annotated[int, Field(gt=0, le=1 << 40)]
"""Tokens or entries. Positions are exact up to the bound."""
WAS_SWITCH = BeforeValidator(
    lambda value: {"false": 0.0, "true": 1.0}.get(str(value).lower(), value)
)
"""Marks a share that older configs have as a switch: false is 0, true is 1."""
SwitchedShare = Annotated[float, WAS_SWITCH, Field(ge=0, le=1)]
"""A share in [0, 1] that also accepts true and false."""


def absolute(path: str | None) -> str | None:
    """Return the absolute path; None for None."""
    return None if path is None else os.path.abspath(path)
