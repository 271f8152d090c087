"""`DomainsTask`: one task over the texts of several domains, in fixed shares."""

from collections.abc import Sequence

from mc_ds.data.sampling.interleave import Interleave
from mc_ds.data.sampling.windows import derive_key
from mc_ds.tasks.base import FINAL_STAGE, Task, TaskSample


class DomainsTask:
    """The same task over several texts, each of which yields its own sequences in order.

    `parts` are (weight, domain, task). Raises ConfigError unless all weights are positive numbers.
    """

    def __init__(self, parts: Sequence[tuple[float, str, Task]], *, seed: int) -> None:
        self.name = parts[0][2].name
        self.domains = [domain for _, domain, _ in parts]
        self.tasks = [task for _, _, task in parts]
        key = derive_key(
            seed, *self.name.encode()
        )  # an order of its own, not that of the run's tasks
        self._interleave = Interleave([weight for weight, _, _ in parts], seed=key)

    def sample(self, index: int, stage: int = FINAL_STAGE) -> TaskSample:
        """Return sequence `index` of `stage`; its domain is the same in every stage."""
        part, within = self._interleave.place(index)
        return self.tasks[part].sample(within, stage)

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how many passes over each text the first `samples` sequences make, keyed by
        `{domain}` for plain text, else by `{task}/{domain}`.
        """
        counts = self._interleave.counts(samples)
        prefix = "" if self.name == "corpus" else f"{self.name}/"
        return {
            f"{prefix}{domain}": sum(task.epochs(count).values())
            for domain, task, count in zip(self.domains, self.tasks, counts, strict=True)
        }
