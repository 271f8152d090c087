"""Pretrained models of the Llama family: imports Hugging Face folders and GGUF files, and exports
bundles to Hugging Face folders.

`llama` defines which configs are supported and how parameters are named; `hf_folder` and
`gguf_file` read the two formats as a `LlamaSource`; `read` renames its parameters to ours;
`exporting` writes a folder, one parameter at a time.
"""

from mc_ds.weights.pretrained.exporting import export_hf
from mc_ds.weights.pretrained.gguf_file import GGUFFile
from mc_ds.weights.pretrained.hf_folder import HFFolder
from mc_ds.weights.pretrained.read import LlamaSource, Pretrained

__all__ = ["GGUFFile", "HFFolder", "LlamaSource", "Pretrained", "export_hf"]
