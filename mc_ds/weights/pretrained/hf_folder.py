"""`HFFolder`: a model in the Hugging Face layout: `config.json`, one or several safetensors files
(with an index), and `tokenizer.json`. Files may be links, as in the cache of the hub.
"""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.data.tokenizer import HFTokenizer
from mc_ds.storage import read_json
from mc_ds.weights.pretrained.llama import LlamaConfig, parse_config
from mc_ds.weights.safetensors_file import open_tensors, shape_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
REMEDY = "copy it again"


class Stored(NamedTuple):
    """The file of a parameter, and its shape in that file's header."""

    file: str
    shape: tuple[int, ...]


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
        source = path / "config.json"
        self.config: LlamaConfig = parse_config(
            read_json(source, remedy=REMEDY, follow=True), source
        )
        self._stored = self._read_headers()

    def names(self) -> frozenset[str]:
        """Return the names of all parameters."""
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one parameter, from its file's header."""
        return self._stored[name].shape

    def tensor(self, name: str) -> Tensor:
        """Read one parameter. Its file is mapped anew each time, so that pages already read do not
        accumulate in resident memory.
        """
        path = self.path / self._stored[name].file
        with open_tensors(path, remedy=REMEDY, follow=True) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def tokenizer(self) -> HFTokenizer:
        """Return the tokenizer of `tokenizer.json`."""
        return HFTokenizer.load(self.path / HFTokenizer.file_name)

    def _read_headers(self) -> dict[str, Stored]:
        """Return file and shape of each parameter, from the single file or from all files of the
        index.
        """
        if not (self.path / INDEX).exists():
            if not (self.path / WEIGHTS).exists():
                raise ConfigError(f"{self.path} has no {WEIGHTS}: {self._advice()}")
            return self._header(WEIGHTS)
        file_of = read_json(self.path / INDEX, remedy=REMEDY, follow=True).get("weight_map")
        if not isinstance(file_of, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in file_of.values()
        ):
            raise ConfigError(
                f"{self.path / INDEX} has no weight_map of files in this folder: copy it again"
            )
        headers = {file: self._header(file) for file in sorted(set(file_of.values()))}
        if lost := [name for name, file in file_of.items() if name not in headers[file]]:
            raise ConfigError(f"{self.path / file_of[lost[0]]} does not hold {lost[0]}: {REMEDY}")
        return {name: headers[file][name] for name, file in file_of.items()}

    def _header(self, file: str) -> dict[str, Stored]:
        with open_tensors(self.path / file, remedy=REMEDY, follow=True) as opened:
            names = opened.keys()  # a safetensors file is no mapping
            return {name: Stored(file, shape_of(opened, name)) for name in names}

    def _advice(self) -> str:
        """Return what the folder holds instead of the weights, and what to do."""
        if (self.path / "adapter_config.json").exists():
            return "it is an adapter: merge it into its model first"
        if any(self.path.glob("*-of-*.safetensors")):
            return f"its weights are in several files, and {INDEX} is missing: copy that too"
        if found := sorted(path.name for path in self.path.glob("*.bin")):
            return (
                f"{found[0]} is a pickle, which can run code and is not read: save the model as"
                " safetensors"
            )
        return "give a complete folder"
