"""Warns about data that a run reads too often."""

from collections.abc import Mapping

MAX_EPOCHS = 4
"""Epochs up to which repeated text is about as useful as new text (Muennighoff et al., "Scaling
Data-Constrained Language Models", 2023).
"""


def repetition(epochs: Mapping[str, float], *, steps: int) -> str | None:
    """Return a warning that names the data which `steps` steps read more than MAX_EPOCHS times;
    None if there is none.
    """
    often = [f"{name} {count:,.0f} times" for name, count in epochs.items() if count > MAX_EPOCHS]
    if not often:
        return None
    return (
        f"data: {steps:,} steps read {', '.join(often)}; after about {MAX_EPOCHS} times, repeated"
        " text is less useful than new text: use more text or fewer steps"
    )
