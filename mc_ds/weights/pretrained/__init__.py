"""Pretrained models of the Llama family, in and out: Hugging Face folders and GGUF files to bundles, bundles to Hugging Face folders.

`llama` says what of the architecture is modelled and how its parameters are named; `hf_folder` and `gguf_file` read the two formats as
one `LlamaSource`; `importing` and `exporting` convert, one parameter at a time.
"""

from mc_ds.weights.pretrained.exporting import export_hf
from mc_ds.weights.pretrained.gguf_file import GGUFFile
from mc_ds.weights.pretrained.hf_folder import HFFolder
from mc_ds.weights.pretrained.importing import LlamaSource, import_gguf, import_hf, import_source

__all__ = [
    "GGUFFile",
    "HFFolder",
    "LlamaSource",
    "export_hf",
    "import_gguf",
    "import_hf",
    "import_source",
]
