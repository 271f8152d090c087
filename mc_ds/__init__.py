"""MegaContext training at DeepSpeed scale.

The package reads in the order in which data flows: `config`, `geometry`, `variants`, `data`,
`positions`, `backbone`, `gistnet`, `lensnet`, `model`, `preference`, `controller`, `training`.
README has the annotated tree.
"""

__version__ = "0.1.0"
