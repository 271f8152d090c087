"""Weights & Biases as a mirror."""

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, SupportsFloat
from urllib.parse import urlsplit
from uuid import uuid4

from mc_ds.config.run import RunConfig

Mode = Literal["online", "offline", "disabled"]

ID_FILE = "wandb_run_id.txt"
"""File in the run folder with the Weights & Biases id, under which a resumed run continues."""


class WeightsAndBiases:
    """Logs to a Weights & Biases run, in which a resumed run continues.

    Follows WANDB_MODE, but without an API key the run stays offline, in the run folder, and never
    prompts. The x axis is the metric `step`, not W&B's own counter, which rejects the repeated
    steps of a run that resumes from an older checkpoint.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def start(
        cls, config: RunConfig, run_dir: Path, facts: Mapping[str, Any], *, start_step: int
    ) -> Self | None:
        """Start the run, with `facts` added to its config; return None if WANDB_MODE is "disabled".

        Raises ValueError for an unknown WANDB_MODE, and any exception of the library.
        """
        mode = wandb_mode(os.environ)
        if mode == "disabled":
            return None
        return cls(_start(config, run_dir, mode, facts, resumed=start_step > 0))

    def log(self, step: int, values: Mapping[str, SupportsFloat | str]) -> None:
        """Log the metrics of one step."""
        self._run.log({"step": step, **values})

    def attach(self, file: Path) -> None:
        """Log a page or a picture as media of the run."""
        import wandb

        if file.suffix == ".html":
            self._run.log({f"media/{file.stem}": wandb.Html(str(file))})
        else:
            self._run.log({f"media/{file.stem}": wandb.Image(str(file))})

    def finish(self, exit_code: int) -> None:
        """End the run; a non-zero `exit_code` marks it as failed."""
        self._run.finish(exit_code=exit_code)


def wandb_mode(environ: Mapping[str, str]) -> Mode:
    """Return the mode by WANDB_MODE (default online), but offline instead of online without an API
    key.

    Raises ValueError for an unknown WANDB_MODE.
    """
    match environ.get("WANDB_MODE", "").strip().lower():
        case "" | "online" | "run":
            return "online" if _has_key(environ) else "offline"
        case "offline" | "dryrun":
            return "offline"
        case "disabled":
            return "disabled"
        case other:
            raise ValueError(f"WANDB_MODE = {other!r}: should be online, offline or disabled")


def _has_key(environ: Mapping[str, str]) -> bool:
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start(
    config: RunConfig, run_dir: Path, mode: Mode, facts: Mapping[str, Any], *, resumed: bool
) -> Any:
    import wandb  # optional, and takes a second to import

    run_dir.mkdir(parents=True, exist_ok=True)
    id_file = run_dir / ID_FILE
    if not (resumed and id_file.exists()):
        id_file.write_text(uuid4().hex[:12])
    run = wandb.init(
        project=config.telemetry.wandb_project,
        name=config.name,
        id=id_file.read_text().strip(),
        resume="allow",
        dir=str(run_dir),
        mode=mode,
        group=config.telemetry.wandb_group,
        config={**config.model_dump(mode="json"), **facts},
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
