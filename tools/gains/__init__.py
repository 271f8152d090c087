"""Gains of single blocks: how much of what distant blocks are worth can a ranker foresee?

Data flows `windows` (documents to token windows) -> `record` (gains, states, attention on a GPU)
and `lexical` (word matches) -> `rankers` (small networks trained on a CPU) -> `choices` (losses
of what was chosen, measured on a GPU) -> `tables`.
"""
