"""Decoding: the decoder with its cache, sampling, and text streaming."""
