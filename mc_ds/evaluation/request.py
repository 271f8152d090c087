"""The validated options of an evaluation.

Most mistakes are found before anything is loaded; lengths and policies that the model does not
support, before anything is measured.
"""

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mc_ds.config import ConfigError, FocusConfig, MCConfig, RetrievalConfig, RunConfig
from mc_ds.config.trained import with_history
from mc_ds.data import OtherText
from mc_ds.evaluation.answers.answering import ANSWERING_POLICIES
from mc_ds.evaluation.sessions import EVALUATED_POLICIES
from mc_ds.evaluation.streaming.streaming import STREAMED_POLICIES, check_fits
from mc_ds.focus.policies import POLICIES, Needs
from mc_ds.model.device import device_of
from mc_ds.tasks import TASK_NAMES
from mc_ds.tasks.prompts import PROMPT_GROUPS, PROMPTS

DEFAULT_POLICIES = ("recency", "random", "uniform", "lens", "full")
WITHOUT_LENSNET = tuple(name for name, spec in POLICIES.items() if spec.needs is Needs.NOTHING)
"""Policies that a plain language model supports, which has neither gists nor LensNet."""


@dataclass(frozen=True)
class Request:
    """Tasks, policies and lengths, without repetitions, and how they are measured."""

    tasks: Sequence[str]
    policies: Sequence[str] | None
    """None: those of DEFAULT_POLICIES that the model supports."""
    budgets: Sequence[float]
    """Shares of the history, above 0 and at most 1; empty: the share that the model was trained at.
    """
    seq_lens: Sequence[int | None]
    """History lengths in tokens; None: the length that the model was trained at."""
    samples: int
    seed: int
    questions: int | None
    wordnet: str | None
    """Folder of WordNet's database files; None: the run's."""
    iterations: int | None
    memory: bool | None
    lens_blocks: int | None
    """Number of blocks that LensNet chooses in contexts of tokens alone; None: the run's."""
    neighbours: float | None
    """Share of the neighbours' scores that counts for a block; None: the run's."""
    earlier_tokens: int | None
    """Tokens before the end at which LensNet also scores blocks; None: the run's."""
    query_tokens: Sequence[int]
    """Query lengths in tokens; every retrieval policy is measured with each. Empty: the run's."""
    share: float | None
    """Fraction of the open blocks that is chosen by retrieval; None: the run's."""
    shape: str | None
    refocus: Sequence[int | None]
    """Numbers of tokens after which a context is chosen anew while reading documents; None stands
    for as many as a context has room for. Empty: measure tasks, not documents.
    """
    text: OtherText | None
    """The text to evaluate on; None: what the config names."""
    predict: int
    """Number of tokens of a document that are predicted."""
    show_focus: int
    out: Path

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Request":
        """Return the request for the options of launch/evaluate.py. Raises ConfigError naming the
        option for a bad value.
        """
        for option, least in {
            "samples": 1,
            "batch_size": 1,
            "questions": 1,
            "iterations": 1,
            "predict": 1,
            "show_focus": 0,
            "search": 0,
            "lens_blocks": 1,
            "earlier_tokens": 0,
        }.items():
            value = getattr(args, option)
            if value is not None and value < least:
                raise ConfigError(f"--{option} {value}: use at least {least}")
        if args.search is not None and not args.bundle:
            raise ConfigError(
                f"--search {args.search}: only inference sessions search: give --bundle, or leave"
                " --search out"
            )
        if args.seed < 0:
            raise ConfigError(f"--seed {args.seed}: use 0 or more")
        device_of(args.device)
        check_writable(args.out)
        share = args.retrieval_share
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"--retrieval_share {share:g}: use more than 0 and at most 1")
        neighbours = args.neighbours
        if neighbours is not None and not 0 <= neighbours <= 1:
            raise ConfigError(f"--neighbours {neighbours:g}: use 0 to 1")
        refocus = _refocus_intervals(args.refocus)
        text = None
        if args.data_root is not None or args.dataset:
            text = OtherText(args.data_root, args.dataset, whole=args.whole)
        if args.whole and not (text and refocus):
            raise ConfigError(
                "--whole reads documents of another text: give --refocus, and --dataset or"
                " --data_root"
            )
        tasks = _tasks(args.tasks)
        prompts = tasks[0] in PROMPTS
        if prompts and (refocus or not args.bundle):
            raise ConfigError(
                f"--tasks {tasks[0]}: answers to prompts are written by inference sessions: give"
                " --bundle, without --refocus"
            )
        known = EVALUATED_POLICIES if args.bundle else tuple(POLICIES)
        known = ANSWERING_POLICIES if prompts else STREAMED_POLICIES if refocus else known
        return cls(
            tasks=tasks,
            policies=None if args.policies is None else _names("policies", args.policies, known),
            budgets=_budgets(args.budgets),
            seq_lens=_whole("seq_lens", args.seq_lens, "a history length") or [None],
            samples=args.samples,
            seed=args.seed,
            questions=args.questions,
            wordnet=args.wordnet,
            iterations=args.iterations,
            query_tokens=_whole("query_tokens", args.query_tokens, "a query length"),
            share=share,
            shape=args.retrieval_shape,
            refocus=refocus,
            text=text,
            predict=args.predict,
            memory=None if args.memory is None else args.memory == "on",
            lens_blocks=args.lens_blocks,
            neighbours=neighbours,
            earlier_tokens=args.earlier_tokens,
            show_focus=args.show_focus,
            out=args.out,
        )

    @property
    def prompts(self) -> bool:
        """True if the tasks are prompts, to which the model writes answers."""
        return self.tasks[0] in PROMPTS

    def policies_for(self, config: RunConfig, *, has_lensnet: bool) -> list[str]:
        """Return the policies to compare. By default `uniform`, a cover with gists, is left out if
        the model was trained on contexts without gists (`random_blocks`).

        Raises ConfigError for one that needs gists or a LensNet if the model has none, or a package
        that is not installed.
        """
        settings = self.retrieval(config)[0]
        self._check_block_scores(config)
        if self.policies is None:
            left_out = {"uniform"} if config.mc.random_blocks else set()
            return [
                name
                for name in DEFAULT_POLICIES
                if name not in left_out and (has_lensnet or name in WITHOUT_LENSNET)
            ]
        for name in self.policies:
            POLICIES[name].require()
            if has_lensnet or POLICIES[name].using(settings).needs is Needs.NOTHING:
                continue
            if name in WITHOUT_LENSNET:
                raise ConfigError(
                    f"--policies {name}: retrieval in the shape of a cover needs gists, which this "
                    "model lacks (it was trained without variants): use --retrieval_shape blocks"
                )
            raise ConfigError(
                f"--policies {name} needs gists, which this model lacks (it was trained "
                f"without variants): use {', '.join(WITHOUT_LENSNET)}"
            )
        return list(self.policies)

    def _check_block_scores(self, config: RunConfig) -> None:
        """Raise ConfigError if no policy would read `--neighbours` or `--earlier_tokens`."""
        names = self.policies or DEFAULT_POLICIES
        alone = config.mc.random_blocks > 0
        lens = any(alone and POLICIES[name].needs is Needs.LENSNET for name in names)
        read = {
            "neighbours": lens or any(POLICIES[name].retrieval is not None for name in names),
            "earlier_tokens": lens or not alone,  # refused with the other settings of focus
        }
        for option, is_read in read.items():
            if (value := getattr(self, option)) is not None and not is_read:
                raise ConfigError(
                    f"--{option} {value:g}: none of the policies {', '.join(names)} scores blocks"
                    " of tokens alone: leave it out"
                )

    def shares(self, mc: MCConfig) -> list[float]:
        """Return the budgets; by default the share that the model was trained at."""
        return list(self.budgets) or [mc.train_wc_length / mc.seq_len]

    def check_lengths(self, config: RunConfig) -> None:
        """Raise ValueError for a history length or budget that the geometry of `config` does not
        allow, and for intervals or numbers of predicted tokens that do not fit a length.
        """
        for seq_len in self.seq_lens:
            mc = config.mc if seq_len is None else with_history(config, seq_len).mc
            if self.refocus:
                check_fits(mc, self.predict, self.refocus)
            for share in self.shares(mc):
                mc.geometry.reachable_at_most(share * mc.seq_len)

    def focus(self, config: RunConfig) -> FocusConfig:
        """Return the run's settings of focus with the requested changes. Raises ConfigError for
        `--lens_blocks` and `--earlier_tokens` if the model reads covers.
        """
        for option in ("lens_blocks", "earlier_tokens"):
            value = getattr(self, option)
            if value and not config.mc.random_blocks:
                raise ConfigError(
                    f"--{option} {value}: this model reads covers, not tokens alone"
                    " (mc.random_blocks): leave it out"
                )
        changes = {
            "iterations": self.iterations,
            "memory": self.memory,
            "lens_blocks": self.lens_blocks,
            "neighbours": self.neighbours if config.mc.random_blocks else None,
            "earlier_tokens": self.earlier_tokens,
        }
        return FocusConfig.model_validate(
            config.focus.model_dump()
            | {name: value for name, value in changes.items() if value is not None}
        )

    def retrieval(self, config: RunConfig) -> list[RetrievalConfig]:
        """Return the run's retrieval settings with the requested changes, one per query length."""
        changes = {"share": self.share, "shape": self.shape, "neighbours": self.neighbours}
        changed = config.retrieval.model_dump() | {
            name: value for name, value in changes.items() if value is not None
        }
        queries = self.query_tokens or [config.retrieval.query_tokens]
        return [
            RetrievalConfig.model_validate(changed | {"query_tokens": query}) for query in queries
        ]

    def asking(self, config: RunConfig) -> RunConfig:
        """Return the run's config with the requested number of questions in recall tasks, and with
        the requested folder of WordNet.
        """
        data = config.data
        if self.questions is not None:
            changes = {"questions": self.questions, "min_questions": None}
            data = data.model_copy(update={"recall": data.recall.model_copy(update=changes)})
        if self.wordnet is not None:
            data = data.model_copy(update={"wordnet": os.path.expanduser(self.wordnet)})
        return config.model_copy(update={"data": data})


def check_writable(path: Path) -> None:
    """Create the folder of `path`. Raises ConfigError if a file cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out {path}: its folder cannot be created ({error.strerror}): use another path"
        ) from error
    if path.is_dir():
        raise ConfigError(
            f"--out {path} is a folder: name a file in it, such as {path / 'eval.json'}"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--out {path} cannot be written: use another path")


def _parts(text: str) -> list[str]:
    """Split `text` at commas; drop empty parts and repetitions."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _names(option: str, text: str, known: Sequence[str]) -> list[str]:
    names = _parts(text)
    for name in names:
        if name not in known:
            raise ConfigError(f"--{option} {name}: unknown: use {', '.join(known)}")
    if not names:
        raise ConfigError(f"--{option} is empty: use some of {', '.join(known)}")
    return names


def _tasks(text: str) -> list[str]:
    """Return the task names, with names of groups replaced by their members. Raises ConfigError for
    prompts beside other tasks.
    """
    given = _names("tasks", text, (*TASK_NAMES, *PROMPT_GROUPS, *PROMPTS))
    names = list(dict.fromkeys(name for part in given for name in PROMPT_GROUPS.get(part, (part,))))
    if len({name in PROMPTS for name in names}) > 1:
        raise ConfigError(
            f"--tasks {text}: the answers to prompts ({', '.join(PROMPT_GROUPS)}) and the losses of"
            " other tasks are different figures: evaluate them one after the other"
        )
    return names


def _budgets(text: str) -> list[float]:
    budgets = []
    for part in _parts(text):
        try:
            budget = float(part)
        except ValueError:
            budget = math.nan
        if not 0 < budget <= 1:
            raise ConfigError(
                f"--budgets {part}: a share of the history is a number above 0 and at most 1, such "
                f"as 0.25"
            )
        budgets.append(budget)
    return list(dict.fromkeys(budgets))


def _refocus_intervals(text: str) -> list[int | None]:
    """Parse distinct refocus intervals in tokens, separated by commas; `never` becomes None."""
    numbers = _whole("refocus", text.replace("never", ""), "a refocus interval")
    return [*numbers, *([None] if "never" in _parts(text) else [])]


def _whole(option: str, text: str, what: str) -> list[int]:
    """Parse distinct whole numbers separated by commas. Raises ConfigError for one below 1; `what`
    names such a number.
    """
    numbers = []
    for part in _parts(text):
        if not part.isdecimal() or int(part) < 1:
            raise ConfigError(
                f"--{option} {part}: {what} must be a whole number of tokens, at least 1"
            )
        numbers.append(int(part))
    return list(dict.fromkeys(numbers))
