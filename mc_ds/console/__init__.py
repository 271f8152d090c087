"""How programs begin and end: output on any terminal, interruption, signals that ask to stop."""

from mc_ds.console.program import INTERRUPTED, run_program

__all__ = ["INTERRUPTED", "run_program"]
