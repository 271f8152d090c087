"""Start and end of programs: output to any terminal, interruption, and signals that ask to stop."""

from mc_ds.console.program import INTERRUPTED, run_program

__all__ = ["INTERRUPTED", "run_program"]
