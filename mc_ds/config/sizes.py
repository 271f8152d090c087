"""Bounds of sizes that decide what is built. They lie far above every model that there is: a config
that comes from elsewhere must not ask for more than a machine could ever make.
"""

from typing import Annotated

from pydantic import Field

Width = Annotated[int, Field(gt=0, le=1 << 20)]
"""Channels, heads, or entries of a layer."""
Depth = Annotated[int, Field(gt=0, le=1 << 10)]
"""Layers, or rounds of something that layers do."""
Tokens = Annotated[int, Field(gt=0, le=1 << 40)]
"""Tokens or entries of a history: positions are exact up to here."""
