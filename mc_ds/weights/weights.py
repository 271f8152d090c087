"""`Weights`: an opened model of any format: its config, its origin, and its parameters one at a
time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mc_ds.config import ConfigError, DataConfig, RunConfig
from mc_ds.config.history import with_history
from mc_ds.data import RunData, Tokenizer, open_data
from mc_ds.model.build import build_networks
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.weights.claims import check_claims, require_finite
from mc_ds.weights.layout import (
    EMBEDDING,
    LENSNET,
    TREE_MAKERS,
    layout_of_modules,
    tensor_digest,
    tree_hashes,
)
from mc_ds.weights.report import warn


class Weights(ABC):
    """Opened weights. Parameters are named as in a bundle, those of LensNet with the prefix
    `lensnet.`.
    """

    def __init__(
        self,
        path: Path,
        config: RunConfig,
        *,
        title: str,
        step: int,
        parameters: Mapping[str, tuple[int, ...]],
        tied: Mapping[str, str],
        corpus_fingerprint: str | None = None,
    ) -> None:
        check_claims(path, config, parameters)
        self.path, self.config = path, config
        self.title = title
        """Where the weights come from, in words."""
        self.step = step
        """Optimizer steps taken."""
        self.parameters = dict(parameters)
        """Shape of every parameter that has weights of its own, by name."""
        self.tied = dict(tied)
        """Tied parameters: a name, and the name whose weights it shares."""
        self.corpus_fingerprint = corpus_fingerprint
        """Digest of the text that they were trained on; None where it is not known."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.parameters[EMBEDDING][0]

    @property
    def tokenizer_folder(self) -> Path | None:
        """The value of `data.tokenizer` that gives the same tokenizer; None where no folder has
        it.
        """
        return self.path

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer. Raises ConfigError where it is missing or damaged."""

    @abstractmethod
    def weight(self, name: str) -> Tensor:
        """Read one parameter in its stored dtype. Raises KeyError for a name that is not in
        `parameters`.

        The tensor may be memory-mapped: it must not be written to.
        """

    def weights(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Read the parameters whose name begins with `prefix`, one at a time; tied names are left
        out."""
        return ((name, self.weight(name)) for name in self.parameters if name.startswith(prefix))

    def corpus(self, report: Callable[[str], None] = warn, *, root: str | None = None) -> RunData:
        """Prepare the corpus that the config names, or the text files below `root`, encoded with
        the weights' own tokenizer.

        `report` gets one line where its text is not what the weights were trained on.
        """
        data = here(self.config.data)
        if root is not None:
            data = data.model_copy(
                update={"source": "files", "root": root, "datasets": [], "validation": []}
            )
        elif data.source == "files" and data.root is None and not data.datasets:
            raise ConfigError(
                f"{self.path} was trained on files, and a bundle does not say where they are: give"
                " --data_root, a folder of text"
            )
        corpus = open_data(data, tokenizer=self.tokenizer())
        if self.corpus_fingerprint not in (None, corpus.fingerprint):
            if data.datasets:
                where = f"{', '.join(dataset.path for dataset in data.datasets)} have other text"
            elif data.source == "files":
                where = f"{data.root} has other text"
            else:
                where = "Python's library has other text"
            report(
                f"{self.path}: {where} than the weights were trained on: what is measured on it may"
                " hold parts of their training text"
            )
        return corpus

    def tree_hashes(self) -> tuple[str, str]:
        """Return the hashes of what decides a tree's gists, and its index vectors. Reads those
        weights."""
        made = {
            name: tensor_digest(self.weight(name).cpu().contiguous())
            for name in self.parameters
            if name.startswith(TREE_MAKERS)
        }
        hashes = tree_hashes(self.config, made)
        return hashes["gistnet"], hashes["lensnet"]

    def validation(self) -> dict[str, float]:
        """Return figures of the last validation of these weights, by name; empty where none are
        known.
        """
        return {}

    def sha256(self) -> str | None:
        """Return the hash of the manifest, which names the hash of every file; None where there is
        no manifest."""
        return None

    def versions(self) -> dict[str, str] | None:
        """Return the versions of the software that made the weights; None where they are not
        known.
        """
        return None

    def load(
        self,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        seq_len: int | None = None,
    ) -> tuple[MegaContextModel, LensNet | None]:
        """Make model and LensNet on `device`, in evaluation mode; peak memory is the model and one
        tensor.

        `dtype` is the model's (None: as stored, or float32 where stored dtypes are mixed, as in a
        run whose backbone was frozen in bf16); LensNet's is float32. A plain language model has
        neither GistNet nor LensNet. `seq_len` is the length T of the histories that the model's own
        forward reads. Raises ConfigError where the weights do not fit the config.
        """
        config = self.config if seq_len is None else with_history(self.config, seq_len)
        model, lensnet = build_networks(config, vocab_size=self.vocab_size, device="meta")
        layout = layout_of_modules(model, lensnet)
        theirs, ours = self.parameters | self.tied, layout.shapes | layout.tied
        if differing := [name for name in theirs | ours if theirs.get(name) != ours.get(name)]:
            raise ConfigError(f"{self.path}: {differing[0]} does not fit its config: make it again")
        placed: dict[str, nn.Parameter] = {}
        for name, tensor in self.weights():
            require_finite(self.path, name, tensor)
            wanted = torch.float32 if name.startswith(LENSNET) else dtype
            placed[name] = nn.Parameter(tensor.to(device, wanted, copy=True), requires_grad=False)
            _place(model, lensnet, name, placed[name])
        for name, target in self.tied.items():
            _place(model, lensnet, name, placed[target])
        if len({parameter.dtype for parameter in model.parameters()}) > 1:
            model.float()  # layers of two dtypes do not fit each other
        return model.eval(), lensnet.eval() if lensnet is not None else None


def here(data: DataConfig) -> DataConfig:
    """Return the settings with this machine's default cache in place of the run's."""
    cache_dir = DataConfig.model_fields["cache_dir"].default
    return data.model_copy(update={"cache_dir": cache_dir})


def _place(model: nn.Module, lensnet: nn.Module | None, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter into the module that its full name belongs to."""
    root: nn.Module | None = model
    if name.startswith(LENSNET):
        root, name = lensnet, name.removeprefix(LENSNET)
    assert root is not None
    path, _, leaf = name.rpartition(".")
    root.get_submodule(path).register_parameter(leaf, parameter)
