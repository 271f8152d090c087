"""Write a safetensors file tensor by tensor. Space for the header is reserved first and filled in
last, so a shard is never held in memory.

Format: 8 bytes with the length of the header, the header (JSON, padded with spaces), then the
tensors without gaps. Source: the specification at https://github.com/huggingface/safetensors.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.weights.layout import tensor_bytes

DATA_START = 1 << 15
"""Offset of the first tensor. Leaves room for a header of a few hundred tensors, and is
page-aligned for memory-mapping.
"""
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class ShardFile:
    """A new file of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.data_bytes = 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_length = len(self._encoded())
        self._file = path.open("wb")
        self._file.seek(DATA_START)

    def add(self, name: str, tensor: Tensor) -> bool:
        """Append a contiguous CPU tensor and return True. If the header has no room left, write
        nothing and return False.

        Raises ConfigError for a name that is too long even for an empty header.
        """
        end = self.data_bytes + tensor.nbytes
        entry = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.data_bytes, end],
        }
        needed = len(json.dumps({name: entry}))
        if self._header_length + needed > DATA_START - 8:
            if not self.names:
                raise ConfigError(
                    f"a parameter name of {len(name)} characters does not fit in a header of"
                    f" {DATA_START} bytes: {name[:80]}...: use shorter names"
                )
            return False
        self._file.write(tensor_bytes(tensor))
        self._header[name] = entry
        self._header_length += needed
        self.names.append(name)
        self.data_bytes = end
        return True

    def finish(self) -> None:
        """Write the header and flush the file to disk."""
        room = DATA_START - 8
        self._file.seek(0)
        self._file.write(struct.pack("<Q", room) + self._encoded().ljust(room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Close the file. Can be called repeatedly."""
        self._file.close()

    def _encoded(self) -> bytes:
        return json.dumps(self._header).encode()
