"""Decoding a working context to text: the decoder with its cache, sampling, streaming."""
