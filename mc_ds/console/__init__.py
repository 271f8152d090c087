"""What programs share: output that no terminal's encoding breaks, `--help`, Ctrl-C and signals."""

from mc_ds.console.help import HelpFormatter
from mc_ds.console.program import INTERRUPTED, has_native_threads, run_program

__all__ = ["INTERRUPTED", "HelpFormatter", "has_native_threads", "run_program"]
