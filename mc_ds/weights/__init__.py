"""Where weights live: checkpoints of runs, bundles, Hugging Face folders and GGUF files."""
