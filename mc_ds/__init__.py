"""MegaContext training at DeepSpeed scale.

`docs/architecture.md` names what each subpackage does and which others it may import.
"""

__version__ = "0.1.0"
