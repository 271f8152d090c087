"""Types that settings share: paths, and sizes that decide what is built.

The bounds of sizes lie far above every model that there is: a config that comes from elsewhere must
not ask for more than a machine could ever make.
"""

import os
from typing import Annotated

from pydantic import AfterValidator, Field

UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path that may begin with `~`, which is expanded when the setting is validated."""
Width = Annotated[int, Field(gt=0, le=1 << 20)]
"""Channels, heads, or entries of a layer."""
Depth = Annotated[int, Field(gt=0, le=1 << 10)]
"""Layers, or rounds of something that layers do."""
Tokens = Annotated[int, Field(gt=0, le=1 << 40)]
"""Tokens or entries of a history: positions are exact up to here."""


def absolute(path: str | None) -> str | None:
    """Return the absolute path; None for None."""
    return None if path is None else os.path.abspath(path)
