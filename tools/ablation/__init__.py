"""Ablations: a grid of short trainings and evaluations, run in parallel, and the tables of their
results.

Data flows `plan` (the questions, in a YAML file) -> `trials` (the trainings and evaluations that
answer them, each once) -> `runner` (runs them, with `commands` for single processes, and keeps
results in files) -> `tables` (made from these files).
"""
