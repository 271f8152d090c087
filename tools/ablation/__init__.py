"""Ablations: a grid of short trainings and evaluations, run in parallel, with tables of results.

`plan` reads the questions from a YAML file. `trials` lists the trainings and evaluations that they
need, each once. `runner` runs these and stores results in files, using `commands` for single
processes. `tables` makes the tables from these files.
"""
