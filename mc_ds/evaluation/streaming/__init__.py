"""Evaluate policies on long documents: losses of the tokens that follow, with a context that is
chosen anew every r tokens.

`streaming` says what is measured; sessions (`sessions`) or the root module in batches (`batches`)
read the documents; `stream` reads those of a corpus.
"""
