"""`Weights`: an opened model of any format, with its config, its origin, and its parameters one at
a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mc_ds.config import ConfigError, DataConfig, RunConfig
from mc_ds.config.trained import with_history
from mc_ds.data import OtherText, RunData, Tokenizer, open_data
from mc_ds.model.build import build_networks
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.weights.claims import check_claims, require_finite
from mc_ds.weights.layout import (
    EMBEDDING,
    LENSNET,
    TREE_PREFIXES,
    layout_of_modules,
    tensor_digest,
    tree_hashes,
)
from mc_ds.weights.report import warn


class Weights(ABC):
    """Opened weights. Parameters are named as in a bundle, with the prefix `lensnet.` for
    LensNet's.
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
        """Origin of the weights, for display."""
        self.step = step
        """Number of optimizer steps taken."""
        self.parameters = dict(parameters)
        """Shape of every stored parameter by name; without tied ones."""
        self.tied = dict(tied)
        """Tied parameters: maps a name to the name whose weights it shares."""
        self.corpus_fingerprint = corpus_fingerprint
        """Digest of the training text; None if unknown."""

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding."""
        return self.parameters[EMBEDDING][0]

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder that `data.tokenizer` must name to get the same tokenizer; None if there is
        none.
        """
        return self.path

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer. Raises ConfigError if it is missing or damaged."""

    @abstractmethod
    def weight(self, name: str) -> Tensor:
        """Read one parameter in its stored dtype. Raises KeyError for a name that is not in
        `parameters`.

        The tensor may be memory-mapped and must not be written to.
        """

    def weights(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Read the parameters whose names begin with `prefix`, one at a time, without tied
        names.
        """
        return ((name, self.weight(name)) for name in self.parameters if name.startswith(prefix))

    def corpus(
        self, report: Callable[[str], None] = warn, *, other: OtherText | None = None
    ) -> RunData:
        """Open the corpus of the config, or an `other` text, encoded with the weights' own
        tokenizer.

        `report` gets one line if the text differs from the training text. Raises ConfigError for
        text that cannot be read, datasets made with another tokenizer, and the training text if
        all of it is to be read.
        """
        data = with_default_cache(self.config.data)
        if other is not None:
            data = other.settings(data, tokenizer=self.tokenizer_folder)
        elif data.source == "files" and data.root is None and not data.datasets:
            raise ConfigError(
                f"{self.path} was trained on text files, and a bundle does not record their folder:"
                " give it by --data_root, or a dataset by --dataset"
            )
        corpus = open_data(data, tokenizer=self.tokenizer())
        whole = other is not None and other.whole
        if whole and self.corpus_fingerprint == corpus.fingerprint:
            raise ConfigError(
                f"{self.path} was trained on this text: evaluate only its held-out part (without"
                " --whole)"
            )
        if self.corpus_fingerprint not in (None, corpus.fingerprint):
            if data.datasets:
                where = ", ".join(dataset.path for dataset in data.datasets)
            elif data.source == "files":
                where = str(data.root)
            else:
                where = "Python's library"
            report(
                f"{self.path}: the text of {where} is not that of the training:"
                f" {'it' if whole else 'its held-out part'} may contain text that the weights were"
                " trained on"
            )
        return corpus

    def tree_hashes(self) -> tuple[str, str]:
        """Return two hashes: of everything that determines a tree's gists, and of everything that
        determines its index vectors. Reads the weights concerned.
        """
        digests = {
            name: tensor_digest(self.weight(name).cpu().contiguous())
            for name in self.parameters
            if name.startswith(TREE_PREFIXES)
        }
        hashes = tree_hashes(self.config, digests)
        return hashes["gistnet"], hashes["lensnet"]

    def validation(self) -> dict[str, float]:
        """Return the metrics of the last validation of these weights, by name; empty if unknown."""
        return {}

    def sha256(self) -> str | None:
        """Return the hash of the manifest, which contains the hash of every file; None without a
        manifest.
        """
        return None

    def versions(self) -> dict[str, str] | None:
        """Return the versions of the software that wrote the weights; None if unknown."""
        return None

    def load(
        self,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        seq_len: int | None = None,
    ) -> tuple[MegaContextModel, LensNet | None]:
        """Return model and LensNet on `device`, in evaluation mode. Peak memory is the model and
        one tensor.

        `dtype` is the model's; None keeps the stored one, or uses float32 if stored dtypes are
        mixed, as in a run whose backbone was frozen in bf16. LensNet is float32. A plain language
        model has neither GistNet nor LensNet. `seq_len` is the length T of the histories that the
        model's forward reads. Raises ConfigError if the weights do not match the config.
        """
        config = self.config if seq_len is None else with_history(self.config, seq_len)
        model, lensnet = build_networks(config, vocab_size=self.vocab_size, device="meta")
        layout = layout_of_modules(model, lensnet)
        theirs, ours = self.parameters | self.tied, layout.shapes | layout.tied
        if differing := [name for name in theirs | ours if theirs.get(name) != ours.get(name)]:
            raise ConfigError(
                f"{self.path}: {differing[0]} does not match its config: create it again"
            )
        placed: dict[str, nn.Parameter] = {}
        for name, tensor in self.weights():
            require_finite(self.path, name, tensor)
            wanted = torch.float32 if name.startswith(LENSNET) else dtype
            placed[name] = nn.Parameter(tensor.to(device, wanted, copy=True), requires_grad=False)
            _place(model, lensnet, name, placed[name])
        for name, target in self.tied.items():
            _place(model, lensnet, name, placed[target])
        if len({parameter.dtype for parameter in model.parameters()}) > 1:
            model.float()  # layers of different dtypes cannot be combined
        return model.eval(), lensnet.eval() if lensnet is not None else None


def with_default_cache(data: DataConfig) -> DataConfig:
    """Return the settings with this machine's default cache instead of the run's."""
    cache_dir = DataConfig.model_fields["cache_dir"].default
    return data.model_copy(update={"cache_dir": cache_dir})


def _place(model: nn.Module, lensnet: nn.Module | None, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter with the module that its full name belongs to."""
    root: nn.Module | None = model
    if name.startswith(LENSNET):
        root, name = lensnet, name.removeprefix(LENSNET)
    assert root is not None
    path, _, leaf = name.rpartition(".")
    root.get_submodule(path).register_parameter(leaf, parameter)
