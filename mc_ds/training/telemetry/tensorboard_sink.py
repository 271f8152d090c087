"""TensorBoard as a mirror: writes event files to `tensorboard/` in the run's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from mc_ds.config.recipe import to_yaml
from mc_ds.config.run import RunConfig

FOLDER = "tensorboard"


class TensorBoard:
    """Logs scalars by step, the config as text, and pictures. Needs the extra `tensorboard`.

    A run that resumes at `start_step` replaces what was logged for later steps.
    """

    def __init__(self, config: RunConfig, run_dir: Path, *, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"{error}: pip install 'mc_ds[tensorboard]'") from None

        self._writer: Any = SummaryWriter(
            str(run_dir / FOLDER), purge_step=start_step + 1 if start_step else None
        )
        self._step = start_step
        self._writer.add_text("config", _as_code(to_yaml(config)), start_step)

    def log(self, step: int, values: Mapping[str, SupportsFloat | str]) -> None:
        """Log the numbers and texts of one step."""
        self._step = step
        for key, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(key, _as_code(value), step)
            else:
                self._writer.add_scalar(key, float(value), step)

    def attach(self, file: Path) -> None:
        """Add a picture. Pages are ignored, because TensorBoard cannot show them."""
        if file.suffix == ".png":
            from matplotlib.image import imread

            self._writer.add_image(file.stem, imread(file), self._step, dataformats="HWC")

    def finish(self, exit_code: int) -> None:
        """Flush and close the event file."""
        self._writer.close()


def _as_code(text: str) -> str:
    """Return `text` as a Markdown code block, which shows every character unchanged."""
    return "\n".join(f"    {line}" for line in text.splitlines())
