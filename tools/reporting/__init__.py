"""The parts of report.py and summarize_run.py.

`runs`, `evaluations` and `glossary` read a run's files. `statistics`, `verdict`,
`comparison` and `charts` analyse them. `figures`, `pictures`, `sections`, `markup` and `document`
make the output.
"""
