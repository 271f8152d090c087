"""Ablations: a grid of short trainings and evaluations, run side by side, and the table that they make.

Data flows `plan` (what is asked: a YAML file) -> `trials` (which trainings and evaluations answer it, each once) -> `grid` (runs them, with
`jobs` for single commands) -> `results` (what is known, one file, merged into one beside the page) -> `page` (its tables, between markers).
"""
