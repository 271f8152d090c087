"""Weights & Biases as a mirror of `metrics.jsonl`: it may be missing, offline or broken, and the
run goes on.
"""

import netrc
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, SupportsFloat
from urllib.parse import urlsplit
from uuid import uuid4

from mc_ds.config.run import RunConfig

Mode = Literal["online", "offline", "disabled"]

ID_FILE = "wandb_run_id.txt"
"""In the run folder: the id under which a resumed run continues its curve."""


class WandbMirror:
    """Mirrors metrics to Weights & Biases from rank 0.

    WANDB_MODE is honoured; where it would need a key and there is none, the run is kept offline
    in the run folder, so that nothing ever asks for input. Any failure ends the mirror with one
    warning. The step is logged as a metric of its own (the x axis), so that a run resumed from
    an older checkpoint is accepted.
    """

    def __init__(
        self, config: RunConfig, run_dir: str | Path, *, start_step: int = 0, enabled: bool = True
    ) -> None:
        self._run: Any = None
        if not enabled or not config.telemetry.wandb:
            return
        try:
            mode = wandb_mode(os.environ)
            if mode != "disabled":
                self._run = _start(config, Path(run_dir), mode, resumed=start_step > 0)
        except Exception as error:
            self._give_up(error)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat | str | None]) -> None:
        """Mirrors the record of one step."""
        if self._run is None:
            return
        try:
            self._run.log(
                {
                    "step": step,
                    **{key: value for key, value in metrics.items() if value is not None},
                }
            )
        except Exception as error:
            self._give_up(error)

    def close(self, *, exit_code: int = 0) -> None:
        """Ends the mirrored run; a non-zero `exit_code` marks it as failed."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up(error)
        self._run = None

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(
            f"Weights & Biases mirror is off from here ({reason}); metrics.jsonl is complete",
            stacklevel=3,
        )


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


def _start(config: RunConfig, run_dir: Path, mode: Mode, *, resumed: bool) -> Any:
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
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
