"""Checks of versions, compilers and libraries.

torch and DeepSpeed are imported only inside the checks, so that a broken one becomes a finding.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from packaging.requirements import Requirement

from machine.findings import Finding, Status

REPORTED = ("torch", "deepspeed")
"""Distributions whose version is always shown."""
OFFLOAD_OPS = ("CPUAdamBuilder", "FusedAdamBuilder", "AsyncIOBuilder")
"""Operators that DeepSpeed would compile at first use. The shipped configs do not need them."""
ROUND_TRIP = "def f(x):\n\treturn  x + 1  # \u00e9\n"
PIECES = 288
"""Vocabulary of a model trained on ROUND_TRIP alone. Characters and bytes need 276 pieces; the
versions of sentencepiece allow at most 298 or 301.
"""


def check_python() -> Iterator[Finding]:
    """Report the interpreter. (One that is too old cannot import mc_ds.)"""
    yield Finding(Status.OK, "python", f"{platform.python_version()} ({sys.executable})")


def check_bytecode() -> Iterator[Finding]:
    """Check that Python keeps the bytecode of large packages, which takes ten seconds to compile.
    A package that is missing or has no sources is not reported here.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return
    compiled = Path(cache_from_source(spec.origin))
    folder = next(above for above in compiled.parents if above.exists())
    if compiled.is_file() or not (sys.dont_write_bytecode or not os.access(folder, os.W_OK)):
        return
    yield Finding(
        Status.WARN,
        "bytecode",
        f"{compiled} is missing and will not be written: each start compiles torch's sources again",
        "unset PYTHONDONTWRITEBYTECODE, and set PYTHONPYCACHEPREFIX to a folder that can be written"
        " to",
    )


def check_packages() -> Iterator[Finding]:
    """Check the versions of installed packages against mc_ds's requirements."""
    try:
        requirements = [Requirement(text) for text in metadata.requires("mc_ds") or []]
    except metadata.PackageNotFoundError:
        yield Finding(
            Status.WARN,
            "packages",
            "mc_ds is not installed, so its requirements are unknown",
            "pip install -e . in the clone",
        )
        requirements = []
    wrong = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(
                f"{requirement.name} {version or 'missing'} (needs {requirement.specifier})"
            )
    shown = ", ".join(f"{name} {_version(name) or 'missing'}" for name in REPORTED)
    if wrong:
        yield Finding(
            Status.FAIL,
            "packages",
            "; ".join(wrong),
            "make venv, or pip install -c constraints.txt -e .",
        )
    else:
        yield Finding(Status.OK, "packages", shown)


def check_deepspeed() -> Iterator[Finding]:
    """Check that DeepSpeed can be imported, and report which operators it could compile."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    possible = []
    for name in OFFLOAD_OPS:
        builder = accelerator.create_op_builder(name)
        if builder is not None and builder.is_compatible(verbose=False):
            possible.append(name.removesuffix("Builder"))
    ops = f"could compile {', '.join(possible)}" if possible else "cannot compile its operators"
    yield Finding(
        Status.OK,
        "deepspeed",
        f"{deepspeed.__version__} on {accelerator.device_name()}; {ops} (the shipped configs need"
        " none)",
    )


def check_compiler() -> Iterator[Finding]:
    """Check the compilers needed by torch.compile (`train.compile`, on by default on GPUs) and by
    DeepSpeed's operators.
    """
    import torch

    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    triton = _version("triton")
    missing = [
        name
        for name, found in (
            ("a C++ compiler", compiler),
            ("triton", triton or not torch.cuda.is_available()),
        )
        if not found
    ]
    if missing:
        fix = "apt-get install g++ (pip install triton), or train with --train.compile=off"
        yield Finding(
            Status.WARN,
            "compiler",
            f"{' and '.join(missing)} missing: torch.compile will fail",
            fix,
        )
    else:
        parts = [
            str(compiler),
            *([f"triton {triton}"] if triton else []),
            *(["ninja"] if shutil.which("ninja") else []),
        ]
        yield Finding(Status.OK, "compiler", ", ".join(parts))


def check_tokenizer() -> Iterator[Finding]:
    """Check that sentencepiece can train a model, and that it decodes exactly what it encoded."""
    from mc_ds.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([ROUND_TRIP], PIECES)
    back = tokenizer.decode(tokenizer.encode(ROUND_TRIP))
    version = _version("sentencepiece")
    if back == ROUND_TRIP:
        yield Finding(Status.OK, "sentencepiece", f"{version}, decodes text exactly")
    else:
        yield Finding(
            Status.FAIL,
            "sentencepiece",
            f"{version} encodes {ROUND_TRIP!r} but decodes {back!r}",
            "pip install -c constraints.txt sentencepiece",
        )


def _version(name: str) -> str | None:
    """Return a package's version without its build label; None if it is not installed."""
    try:
        return re.sub(r"\+.*", "", metadata.version(name))
    except metadata.PackageNotFoundError:
        return None
