"""Path settings: `~` is expanded when they are validated, and a run stores absolute paths."""

import os
from typing import Annotated

from pydantic import AfterValidator

UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path that may begin with `~`."""


def absolute(path: str | None) -> str | None:
    """Return the absolute path; None for None."""
    return None if path is None else os.path.abspath(path)
