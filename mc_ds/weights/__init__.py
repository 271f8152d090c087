"""Reading and writing weights: checkpoints of runs, bundles, Hugging Face folders and GGUF
files.
"""
