"""Read documents with the root module in batches, which is much faster on a GPU than sessions.

A document is read as windows of T + 1 tokens, each r tokens further than the one before. The last h
tokens of a window are its horizon, and the first r of these are predicted, in the context that the
policy chooses from the window's visible history (`evaluation.batches`). So N tokens take n = N / r
windows (rounded up), and a document has T + 1 + (n - 1) r tokens. Unlike a session's, the history
does not grow: it has the same length, and a context exactly W entries, at every choice.

`full` needs no pass per window: one pass over the last window, as tokens, gives the losses of all N
tokens. The history of a token is then shorter than in its own window, at its beginning, by the
distance of that window to the last one: by up to (n - 1) r tokens. With r = h it is exactly what
sessions read under `full` in a document that ends at the same token.

Legend: B documents, T tokens, N predicted tokens, r tokens between choices, h horizon, W entries,
n windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mc_ds.config import ConfigError, FocusConfig, MCConfig
from mc_ds.evaluation.batches import Batches, BatchReading
from mc_ds.evaluation.measure import Samples, sequence_before
from mc_ds.evaluation.streaming.streaming import Documents, Read, Setting, Streaming
from mc_ds.focus.policies import Access
from mc_ds.inference.phases import Phases
from mc_ds.tasks import TaskSample
from mc_ds.tasks.base import no_spans


@dataclass(frozen=True)
class DocumentBatches:
    """Reads documents with `batches`. Implements `DocumentReader`. Valid inside
    `controller.inference()`.
    """

    batches: Batches

    @property
    def mc(self) -> MCConfig:
        """Settings, with the number T of tokens that are read."""
        return self.batches.mc

    @property
    def batch_size(self) -> int:
        """Number B of documents that are read together."""
        return self.batches.batch_size

    @property
    def focus(self) -> FocusConfig:
        """Settings of focus."""
        return self.batches.focus

    def document_tokens(self, streaming: Streaming) -> int:
        """Return the number of tokens up to the end of the last window."""
        steps = {streaming.step(setting) for setting in streaming.settings}
        return self.mc.seq_len + 1 + max(range(0, streaming.predicted, step)[-1] for step in steps)

    @torch.no_grad()
    def read(
        self, streaming: Streaming, documents: Documents, numbers: Sequence[int]
    ) -> list[list[Read]]:
        """Read B documents together. Every window costs a node table (another one for `blind`,
        which reads the tail of the same window of the document before) and a pass per policy.

        The time spent on choosing contexts is divided equally among the documents; it does not
        include the node tables, which policies share. Raises ConfigError for `blind` if there is
        only one document.
        """
        cells = [_Cell(setting, Phases(self.batches.device)) for setting in streaming.settings]
        if len(documents) == 1 and any(cell.is_blind for cell in cells):
            raise ConfigError(
                "policy = 'blind' reads the tail of the document before, and there is only one"
                " document: read more (--samples), or leave it out"
            )
        for step in dict.fromkeys(streaming.step(cell.setting) for cell in cells):
            windows = range(0, streaming.predicted, step)
            for first in windows:
                present = [
                    cell
                    for cell in cells
                    if streaming.step(cell.setting) == step
                    and (first == windows[-1] or not cell.is_whole)
                ]
                if present:
                    samples = self._samples(documents, numbers, first, present)
                    reading = self.batches.read(samples, [cell.setting.spec for cell in present])
                    for cell in present:
                        cell.measure(reading, streaming, first)
        return [cell.reads() for cell in cells]

    def _samples(
        self,
        documents: Documents,
        numbers: Sequence[int],
        first: int,
        cells: Sequence["_Cell"],
    ) -> Samples:
        """Return the windows that begin at token `first`. Every window of a document has a number,
        and therefore a random seed, of its own.
        """
        blind = any(cell.is_blind for cell in cells)
        before = [sequence_before(number) for number in numbers] if blind else []
        return Samples(
            ids=[number * self.mc.seq_len + first for number in numbers],
            samples=[self._window(documents, number, first) for number in numbers],
            before=[self._window(documents, number, first) for number in before],
        )

    def _window(self, documents: Documents, number: int, first: int) -> TaskSample:
        return TaskSample(
            tokens=documents[number][first : first + self.mc.seq_len + 1],
            horizon_mask=np.ones(self.mc.horizon_tokens, dtype=np.float32),
            spans=no_spans(),
            distractors=no_spans(),
            other=None,
        )


@dataclass(frozen=True)
class _Cell:
    """Losses of B documents, read with one setting."""

    setting: Setting
    phases: Phases
    nll: list[Tensor] = field(default_factory=list)
    """Losses of the predicted tokens of each window in order, [B, r]; of `full`, [B, N] once."""

    @property
    def is_whole(self) -> bool:
        """Whether everything is read, by one pass for all predicted tokens."""
        return self.setting.spec.fixed_length is not None

    @property
    def is_blind(self) -> bool:
        """Whether the policy reads the tail of another document."""
        return self.setting.spec.access is Access.UNRELATED_TAIL

    def measure(self, reading: BatchReading, streaming: Streaming, first: int) -> None:
        """Add the losses in the window that begins at token `first`: of its first r horizon
        tokens, or of all predicted tokens.
        """
        mc, predicted = streaming.mc, streaming.predicted
        with self.phases("allocator"):
            entries = mc.seq_len if self.is_whole else streaming.budget
            plan = reading.plan(self.setting.spec, entries)
        nll_BW = reading.losses(plan)
        horizon = nll_BW.size(1) - mc.horizon_tokens  # the entry that predicts its first token
        if self.is_whole:
            found = nll_BW[:, horizon - first :][:, :predicted]
        else:
            step = min(streaming.step(self.setting), predicted - first)
            found = nll_BW[:, horizon : horizon + step]
        self.nll.append(found)

    def reads(self) -> list[Read]:
        """Return what was found in each of the documents."""
        nll_BN = torch.cat(self.nll, dim=1).double().cpu().numpy()
        focus_s = self.phases.focus_seconds() / len(nll_BN)
        return [Read(losses, focus_s) for losses in nll_BN]
