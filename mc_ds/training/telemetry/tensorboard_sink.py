"""TensorBoard as a mirror of `metrics.jsonl`: event files in `tensorboard/` of the run's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from mc_ds.config.recipe import to_yaml
from mc_ds.config.run import RunConfig

FOLDER = "tensorboard"


class TensorBoard:
    """Scalars by step, the config as text, pictures; needs the extra `tensorboard`.

    A run that goes on after `start_step` replaces what is recorded beyond it.
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
        """Take the numbers and texts of one step."""
        self._step = step
        for key, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(key, _as_code(value), step)
            else:
                self._writer.add_scalar(key, float(value), step)

    def attach(self, file: Path) -> None:
        """Take a picture; pages have no place there."""
        if file.suffix == ".png":
            from matplotlib.image import imread

            self._writer.add_image(file.stem, imread(file), self._step, dataformats="HWC")

    def finish(self, exit_code: int) -> None:
        """Write what is left."""
        self._writer.close()


def _as_code(text: str) -> str:
    """Return it as Markdown that shows every character as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
