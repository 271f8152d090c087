"""What programs share: output that no terminal's encoding breaks, Ctrl-C, and stop signals."""

from mc_ds.console.program import INTERRUPTED, has_native_threads, run_program

__all__ = ["INTERRUPTED", "has_native_threads", "run_program"]
