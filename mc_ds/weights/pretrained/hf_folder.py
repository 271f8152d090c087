"""`HFFolder`: a model in the Hugging Face layout: `config.json`, one safetensors file or several
with an index, and `tokenizer.json`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.data.tokenizer import HFTokenizer
from mc_ds.storage import read_json, reason
from mc_ds.weights.pretrained.llama import LlamaConfig, parse_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class HFFolder:
    """A folder with a model of the Llama family; weights are memory-mapped. Raises ConfigError, in
    one line, for any other folder.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ConfigError(
                f"{path} is not a folder: give one with config.json, model.safetensors and"
                " tokenizer.json"
            )
        self.path = path
        self.config: LlamaConfig = parse_config(
            read_json(path / "config.json", remedy="copy it again"), path / "config.json"
        )
        self._file_of = self._index()

    def names(self) -> frozenset[str]:
        """Return the names of all parameters."""
        return frozenset(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """Read one parameter. Its file is mapped again each time, so that pages already read do not
        accumulate in resident memory.
        """
        with self._open(self._file_of[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def tokenizer(self) -> HFTokenizer:
        """Return the tokenizer of `tokenizer.json`."""
        return HFTokenizer.load(self.path / HFTokenizer.file_name)

    def _index(self) -> dict[str, str]:
        """Return the file of each parameter."""
        if not (self.path / INDEX).exists():
            with self._open(WEIGHTS) as file:
                return dict.fromkeys(file.keys(), WEIGHTS)
        file_of = read_json(self.path / INDEX, remedy="copy it again").get("weight_map")
        if not isinstance(file_of, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in file_of.values()
        ):
            raise ConfigError(
                f"{self.path / INDEX} has no weight_map of files in this folder: copy it again"
            )
        return file_of

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        """Open a safetensors file. Raises ConfigError, in one line, where it cannot be read."""
        try:
            with safe_open(self.path / file, framework="pt") as opened:
                yield opened
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{self.path / file} is not a readable safetensors file ({reason(error)}): copy it"
                " again"
            ) from None
