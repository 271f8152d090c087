"""Ablations: a grid of short trainings and evaluations, run side by side, and the tables that
they make.

Data flows `plan` (what is asked: a YAML file) -> `trials` (which trainings and evaluations
answer it, each once) -> `runner` (runs them, with `commands` for single processes, and keeps
what they give in files) -> `tables` (made from those files).
"""
