"""Weights & Biases as a mirror of `metrics.jsonl`: it may be missing, offline or broken, and the
run goes on.
"""

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
"""In the run folder: the id under which a resumed run continues its curve."""


class WeightsAndBiases:
    """A run of Weights & Biases, from rank 0.

    WANDB_MODE is honoured; where it would need a key and there is none, the run is kept offline
    in the run folder, so that nothing ever asks for input. A resumed run goes on in the same run.
    The step is logged as a metric of its own (the x axis), so that a run resumed from an older
    checkpoint is accepted.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def start(
        cls, config: RunConfig, run_dir: Path, facts: Mapping[str, Any], *, start_step: int
    ) -> Self | None:
        """Open the run; `facts` stand beside its config. None where WANDB_MODE switches it off.

        Raises ValueError for a WANDB_MODE that does not exist, and what the library raises.
        """
        mode = wandb_mode(os.environ)
        if mode == "disabled":
            return None
        return cls(_start(config, run_dir, mode, facts, resumed=start_step > 0))

    def log(self, step: int, values: Mapping[str, SupportsFloat | str]) -> None:
        """Take the record of one step."""
        self._run.log({"step": step, **values})

    def attach(self, file: Path) -> None:
        """Take a page or a picture, as media of the run."""
        import wandb

        if file.suffix == ".html":
            self._run.log({f"media/{file.stem}": wandb.Html(str(file))})
        else:
            self._run.log({f"media/{file.stem}": wandb.Image(str(file))})

    def finish(self, exit_code: int) -> None:
        """End the run; a non-zero `exit_code` marks it as failed."""
        self._run.finish(exit_code=exit_code)


def wandb_mode(environ: Mapping[str, str]) -> Mode:
    """The mode to start in: WANDB_MODE (online by default), but offline where going online would
    ask for a key.

    Raises ValueError for a WANDB_MODE that does not exist.
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
    import wandb  # a second to import, and optional: only where a run is really mirrored

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
