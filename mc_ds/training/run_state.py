"""The state of a run outside its processes: folder, config and checkpoints, opened by all ranks
together or by none.

Whatever cannot work ends here, in one line on all ranks, before anything in the run's folder has
changed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch

import mc_ds
from mc_ds.config import ConfigError, DataConfig, RunConfig
from mc_ds.config.compare import flatten
from mc_ds.config.recipe import to_yaml
from mc_ds.data import PreparedCorpus, prepare_corpus
from mc_ds.storage import replace_text
from mc_ds.training.checkpoint import ResumePlan, find_checkpoint, plan_resume
from mc_ds.training.engine.initial import InitialWeights, open_initial
from mc_ds.training.ranks.agreement import agreed, on_main, rank_and_world, require_equal
from mc_ds.weights.checkpoint.folder import set_aside
from mc_ds.weights.compatibility import requirements


class RunState:
    """Folder and checkpoints of one run, and the facts that ranks, and checkpoints, must agree on."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        ds_config: Mapping[str, Any],
        corpus: PreparedCorpus,
        device_type: str,
    ) -> None:
        self.folder, self.config, self.ds_config = folder, config, ds_config
        self.checkpoints = folder / "checkpoints"
        self.data, self.tokenizer = corpus.folder.name, corpus.tokenizer
        self.started_from: dict[str, Any] | None = None
        """What the run's first weights were, for its checkpoints; None: fresh ones."""
        self.zero_stage = int(ds_config["zero_optimization"]["stage"])
        self.requirements = requirements(
            config, device_type=device_type, tokenizer=corpus.tokenizer.sha256, data=self.data
        )

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says about the run that wrote it."""
        return {
            "world_size": rank_and_world()[1],
            "zero_stage": self.zero_stage,
            "requirements": self.requirements,
            "init_from": self.started_from,
            "versions": versions(),
        }

    def open(self) -> tuple[ResumePlan | None, InitialWeights | None]:
        """Compares the ranks' configs, makes the folder and says where the run continues; without a
        plan at its beginning, with the weights to start from where the config names any.

        Raises RunStopped on all ranks for ranks that differ, a folder that cannot be written, and
        weights that cannot be used.
        """
        settings = {"deepspeed": dict(self.ds_config), "data": self.data, "versions": versions()}
        require_equal({**flatten(self.config.model_dump(mode="json")), **flatten(settings)})
        on_main(self._make_folder, doing="the run folder")
        plan = agreed(self._plan)
        initial = (
            agreed(self._initial)
            if plan is None and self.config.train.init_from is not None
            else None
        )
        if plan is not None:
            self.started_from = plan.trainer["init_from"]
        elif initial is not None:
            self.started_from = initial.facts()
        on_main(self._claim_folder, doing="the run folder")
        return plan, initial

    def _make_folder(self) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    def _plan(self) -> ResumePlan | None:
        checkpoint = find_checkpoint(self.config.resume, self.checkpoints)
        if checkpoint is None:
            return None
        return plan_resume(
            checkpoint, self.requirements, zero_stage=self.zero_stage, cache=self.checkpoints
        )

    def _initial(self) -> InitialWeights:
        return open_initial(self.config, tokenizer=self.tokenizer.sha256)

    def _claim_folder(self) -> None:
        """From here on the folder is this run's."""
        if self.config.resume == "never" and (earlier := set_aside(self.checkpoints)) is not None:
            print(f"starting over: earlier checkpoints are in {earlier}", flush=True)
        replace_text(self.folder / "config.yaml", to_yaml(self.config))
        file = self.folder / self.tokenizer.file_name
        if not file.exists() or file.read_bytes() != self.tokenizer.content():
            self.tokenizer.save(self.folder)  # with it the folder serves as a data.tokenizer


def open_corpus(config: DataConfig) -> PreparedCorpus:
    """The prepared corpus. Raises ConfigError, in one line, for data that cannot be read, too."""
    try:
        return prepare_corpus(config)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"the data cannot be used: {error}") from error


def versions() -> dict[str, str]:
    """Of the software that decides what a run computes."""
    return {
        "mc_ds": mc_ds.__version__,
        "torch": str(torch.__version__),
        "deepspeed": str(deepspeed.__version__),
    }
