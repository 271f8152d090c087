"""Path settings: `~` is expanded where they are read, and a run stores them absolute."""

import os
from typing import Annotated

from pydantic import AfterValidator

UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path that may begin with `~`."""


def absolute(path: str | None) -> str | None:
    """Return the path from the root of the file system; None stays None."""
    return None if path is None else os.path.abspath(path)
