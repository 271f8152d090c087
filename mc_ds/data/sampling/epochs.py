"""How often a run reads its data, in words."""

from collections.abc import Mapping

MAX_EPOCHS = 4
"""Readings up to which repeated text teaches about as much as new text (Muennighoff et al.,
"Scaling Data-Constrained Language Models", 2023)."""


def repetition(epochs: Mapping[str, float], *, steps: int) -> str | None:
    """Return a line that names the parts of the data which `steps` steps read more than
    MAX_EPOCHS times; None where there is none.
    """
    often = [f"{name} {count:,.0f} times" for name, count in epochs.items() if count > MAX_EPOCHS]
    if not often:
        return None
    return (
        f"data: {steps:,} steps read {', '.join(often)}; beyond about {MAX_EPOCHS} times repeated"
        " text teaches less than new text: use more text or fewer steps"
    )
