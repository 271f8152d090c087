"""Trains a MegaContext model: `deepspeed launch/train.py --config launch/recipes/demo.yaml --deepspeed_config ds_configs/zero3.json`.

Also runs under `torchrun`, `srun` (launch/slurm) and plain `python`. `--help` lists every setting; `--dry_run` starts nothing.
"""

import sys

from mc_ds.config import ConfigError
from mc_ds.config.cli import load_config


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 bad configuration."""
    try:
        config = load_config(argv)
        if config.dry_run:
            from mc_ds.training.dry_run import dry_run

            print(dry_run(config))
            return 0
        from mc_ds.training.loop import train

        train(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
