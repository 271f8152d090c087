"""Mutations of folders that come from elsewhere. Each takes a random generator and a folder, or a
file, and harms it; whoever harms a file can also write a manifest that fits."""

import hashlib
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEEP = "MARK-OF-A-DEEP-LIST"
"""Becomes a list in 100,000 others."""
STRANGE: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        3,
        7,
        61,
        2**31,
        2**63,
        10**18,
        10**400,
        0.5,
        -0.0,
        1e-320,
        1e308,
    ),
    *(float("inf"), float("nan"), "", "\0", "\ud800", "a\nb", "\x1b[31m", "1", "x" * 70_000),
    *("../../secret", "/dev/zero", "/", "~", "/proc/self/mem", "fp32", "lens"),
    *(
        [],
        {},
        [[]],
        [None],
        [0],
        [-1, 2],
        [10**18, 10**18],
        [1] * 5_000,
        {"": {}},
        {"\0": "\ud800"},
    ),
    DEEP,
]

Harm = Callable[[random.Random, Path], None]


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in a JSON value, with each of its keys."""
    for key, value in list(
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    ):
        yield content, key
        yield from places(value)


def harm_json(rng: random.Random, content: Any) -> None:
    """Change one to three places of a JSON value."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = list(places(content))
        if not found:
            return
        container, key = rng.choice(found)
        value = container[key]
        match rng.randrange(6):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[rng.choice(["more", "\ud800", f"{key}s", "x" * 5_000])] = value
            case 2 if type(value) in (int, float):
                container[key] = value * rng.choice([-1, 2, 10, 10**6, 10**15, 0.5, 1.5])
            case 3:
                other, place = rng.choice(found)
                container[key] = json.loads(json.dumps(other[place]))
            case _:
                container[key] = rng.choice(STRANGE)


def dumps(content: Any) -> bytes:
    """JSON, with its deep lists."""
    text = json.dumps(content)
    return text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).encode()


def harm_bytes(rng: random.Random, content: bytes, first: int | None = None) -> bytes:
    """Flip, cut, lengthen or replace; among the `first` bytes where that is given."""
    data, end = bytearray(content), min(len(content), first or len(content))
    match rng.randrange(6):
        case 0:
            return bytes(data[: rng.randrange(end + 1)])
        case 1:
            return bytes(data) + rng.randbytes(rng.choice([1, 8, 5_000]))
        case 2:
            return rng.choice([b"", b"\0" * 100, b"null", b"[" * 100_000, b"\xff\xfe", b"{}"])
        case 3 if end > 8:
            at = rng.randrange(end - 8)
            number = rng.choice([0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
            data[at : at + 8] = struct.pack("<Q", number)
            return bytes(data)
    for _ in range(rng.choice([1, 1, 4, 64])):
        if end:
            data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(data)


def harm_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Change the header as JSON, its length, or values of tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    match rng.randrange(4):
        case 0:
            claimed = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
            return struct.pack("<Q", claimed) + content[8:]
        case 1:
            values = rng.choice([b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f"]) * 4
            at = rng.randrange(max(1, len(data) - 16)) // 4 * 4
            return content[: 8 + length + at] + values + content[8 + length + at + 16 :]
    harm_json(rng, header)
    text = dumps(header)
    return struct.pack("<Q", len(text)) + text + data


def harm_entry(rng: random.Random, path: Path) -> None:
    """Put something that is no regular file, or nothing, in the place of a file."""
    content = path.read_bytes()
    path.unlink()
    match rng.randrange(6):
        case 0:
            path.symlink_to("/dev/zero")
        case 1:
            os.mkfifo(path)
        case 2:
            path.mkdir()
        case 3:
            path.symlink_to(path.name)
        case 4:
            other = path.with_name(f"{path.name}.other")
            other.write_bytes(content)
            path.symlink_to(other.name)


def harm_file(rng: random.Random, path: Path) -> None:
    """Harm a file in the manner of its kind."""
    content = path.read_bytes()
    if rng.random() < 0.1:
        harm_entry(rng, path)
    elif rng.random() < 0.2:
        path.write_bytes(harm_bytes(rng, content))
    elif path.suffix == ".json":
        parsed = json.loads(content)
        harm_json(rng, parsed)
        path.write_bytes(dumps(parsed))
    elif path.suffix == ".safetensors":
        path.write_bytes(harm_safetensors(rng, content))
    else:
        path.write_bytes(harm_bytes(rng, content))


def reseal(folder: Path, tokenizer: str) -> None:
    """Make the manifest of a bundle fit its files again."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, facts in manifest["files"].items():
        if (folder / name).is_file() and not (folder / name).is_symlink():
            data = (folder / name).read_bytes()
            facts.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest["tokenizer"]["sha256"] = manifest["files"][tokenizer]["sha256"]
    path.write_text(json.dumps(manifest))


def harm_bundle(rng: random.Random, folder: Path) -> str:
    """Harm a bundle; return what was harmed."""
    names = sorted(path.name for path in folder.iterdir())
    name = rng.choice([*names, "config.json", "config.json", "manifest.json", "manifest.json"])
    harm_file(rng, folder / name)
    if name != "manifest.json" and rng.random() < 0.85:
        reseal(folder, "tokenizer.json")
    return name


def harm_folder(rng: random.Random, folder: Path) -> str:
    """Harm a Hugging Face folder; return what was harmed."""
    names = sorted(path.name for path in folder.iterdir())
    name = rng.choice([*names, "config.json"])
    harm_file(rng, folder / name)
    return name
