"""Encodes blocks in worker processes, with few blocks in memory at a time."""

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from mc_ds.data.preparation.encode import encode_block, start_worker
from mc_ds.data.preparation.parts import block_name
from mc_ds.data.text.readers import Segment
from mc_ds.data.tokenizer import Tokenizer

AHEAD = 2
"""Blocks queued beyond one per worker."""


def encoded(
    blocks: Iterable[list[Segment]],
    folder: Path,
    tokenizer: Tokenizer,
    text_field: str,
    workers: int,
) -> Generator[tuple[Path, Segment], None, None]:
    """Write each block's part file to `folder`, unless it exists; yield, in the order of blocks,
    the part's path and the block's last segment.

    Raises OSError if a part cannot be written or a worker is killed.
    """
    context = multiprocessing.get_context("forkserver")  # forking this process is unsafe: threads
    context.set_forkserver_preload(["mc_ds.data.preparation.encode"])
    settings = f"{tokenizer.sha256} {text_field}"
    waiting: deque[tuple[Path, Segment, Future[None] | None]] = deque()
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=start_worker, initargs=(tokenizer, text_field)
    )
    try:
        for block in blocks:
            path = folder / block_name(block, settings)
            made = None if path.exists() else pool.submit(encode_block, block, path)
            waiting.append((path, block[-1], made))
            if len(waiting) >= workers + AHEAD:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    except BrokenProcessPool:
        raise OSError(
            "a worker process was killed, perhaps for lack of memory: use fewer --workers; the same"
            " command resumes from what is already encoded"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(path: Path, last: Segment, made: Future[None] | None) -> tuple[Path, Segment]:
    if made is not None:
        made.result()
    return path, last
