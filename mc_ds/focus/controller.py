"""`MCController`: the only access to LensNet; enforces the training invariant.

In training LensNet runs exactly once per micro-step, for the preference loss. Code that builds a
working context cannot call it, and the focus allocator refuses to run. In inference (validation,
evaluation, serving), inside `with controller.inference():`, the number of calls is unlimited.
Source: docs/lensnet-pairwise-training.md, "The training invariant".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from torch import Tensor, nn


class Phase(Enum):
    """Whether the process trains or infers."""

    TRAINING = "training"
    INFERENCE = "inference"


class InvariantError(RuntimeError):
    """Raised before the training invariant would be broken."""


class MCController:
    """Holds the phase, counts LensNet's calls and rejects calls that the phase does not allow."""

    def __init__(self, lensnet: nn.Module | None) -> None:
        self._lensnet = lensnet
        self._phase = Phase.TRAINING
        self._calls_left: int | None = None
        self.training_calls = 0
        self.inference_calls = 0

    @property
    def phase(self) -> Phase:
        """The current phase; initially TRAINING."""
        return self._phase

    @contextmanager
    def micro_step(self, *, lens_active: bool) -> Iterator[None]:
        """Enclose a training micro-step, which must call LensNet exactly once if `lens_active`,
        else never.

        Raises InvariantError for nested micro-steps, inside `inference()`, and at the end if the
        call is missing.
        """
        if self._phase is not Phase.TRAINING:
            raise InvariantError("a training micro-step cannot run inside controller.inference()")
        if self._calls_left is not None:
            raise InvariantError("micro-steps cannot be nested: end the running one first")
        self._calls_left = int(lens_active)
        try:
            yield
            if self._calls_left:
                raise InvariantError("this micro-step did not call LensNet: it must, exactly once")
        finally:
            self._calls_left = None

    def score(self, *args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        """Run LensNet's forward and count the call. Raises InvariantError without a LensNet, and in
        training for any call other than the one of a micro-step.
        """
        if self._lensnet is None:
            raise InvariantError("this run has no LensNet (num_random_variants = 0)")
        if self._phase is Phase.TRAINING:
            if self._calls_left is None:
                raise InvariantError(
                    "LensNet was called in training outside a micro-step: training contexts "
                    "must not depend on LensNet"
                )
            if self._calls_left == 0:
                raise InvariantError(
                    "LensNet was called twice in this micro-step, or before lens_start_step: one "
                    "call is allowed, from that step on"
                )
            self._calls_left -= 1
            self.training_calls += 1
        else:
            self.inference_calls += 1
        scores: Tensor = self._lensnet(*args, **kwargs)
        return scores

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Enclose inference: puts LensNet in evaluation mode and allows any number of calls. Raises
        InvariantError inside a training micro-step.
        """
        if self._calls_left is not None:
            raise InvariantError("controller.inference() cannot start inside a training micro-step")
        before, self._phase = self._phase, Phase.INFERENCE
        # Modes are set in every sub-module, which takes longer than a small refocus on the host.
        training = self._lensnet if self._lensnet is not None and self._lensnet.training else None
        if training is not None:
            training.eval()
        try:
            yield
        finally:
            self._phase = before
            if training is not None:
                training.train()
