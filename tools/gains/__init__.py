"""Gains of single blocks: how much of the gain from distant blocks can a ranker predict?

Data flows `windows` (documents to token windows) -> `record` (gains, states and attention, on a
GPU) and `lexical` (word matches) -> `rankers` (small networks, trained on a CPU) -> `choices`
(losses of the chosen blocks, measured on a GPU) -> `tables`.
"""
