"""Trains a MegaContext model: `deepspeed launch/train.py --config launch/recipes/demo/demo.yaml
--deepspeed_config ds_configs/zero3.json`.

Also runs with `torchrun`, `srun` (launch/slurm) and plain `python`. `--help` shows the most
important settings, `--help-all` all settings and the exit codes; `--dry_run` starts nothing.
"""

import os
import sys

from mc_ds.config import ConfigError
from mc_ds.config.cli import help_text, load_config
from mc_ds.console import run_program
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped, exit_code_lines
from mc_ds.training.guards.launcher_guard import launcher_processes


def main(argv: list[str]) -> int:
    """Run the command line and return its exit code (mc_ds/training/guards/exit_codes.py)."""
    # Find launchers before torch is imported, which takes seconds in which one may die.
    launchers = launcher_processes()
    try:
        if (text := help_text(argv)) is not None:
            print(text)
            if "--help-all" in argv:
                print(f"\nexit codes:\n{exit_code_lines()}")
            return ExitCode.DONE
        config = load_config(argv)
        if config.dry_run:
            from mc_ds.training.planning.dry_run import dry_run

            print(dry_run(config))
            return ExitCode.DONE
        from mc_ds.training.loop import train

        train(config, launchers)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.CONFIG
    except RunStopped as stopped:
        if not stopped.on_all_ranks or os.environ.get("RANK", "0") == "0":
            print(
                f"{'' if stopped.code is ExitCode.REQUEUE else 'error: '}{stopped}", file=sys.stderr
            )
        return stopped.code
    return ExitCode.DONE


if __name__ == "__main__":
    run_program(main)
