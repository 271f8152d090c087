"""`MCConfig`: every MegaContext setting. Names follow docs/model.md; lengths are validated against
the LOD geometry.
"""

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mc_ds.config.errors import Settings
from mc_ds.config.types import Depth, Tokens, Width
from mc_ds.geometry import Geometry, distant_blocks

MATCHES_BEFORE = {"false": "none", "true": "words"}
"""Names of the values of `lens_matches` when it was a switch."""
WITHDRAWN = {"random_run": 1}
"""Settings that older configs may have, with the value that did nothing."""


class WCStage(Settings):
    """One stage of the working-context curriculum."""

    start_step: NonNegativeInt
    """First optimizer step of the stage."""
    train_wc_length: Tokens
    """Exact number of entries W of every training working context in the stage."""


class MCConfig(Settings):
    """All MegaContext settings. Lengths are in tokens or entries; weights and ratios have no
    unit.
    """

    # Geometry
    seq_len: Tokens = 4096
    """Input tokens T of a training sequence. Batches hold T + 1; the last one is only a label."""
    block_size: int = Field(default=32, ge=2, le=1 << 20)
    """Children per gist, K."""
    max_lod: int = Field(default=2, ge=1, le=3)
    """Coarsest level of detail; a node at level l covers K^l tokens."""
    train_wc_length: Tokens = 2112
    """Exact number of entries W of every training working context. Reachable lengths are
    T - c (K - 1), for c collapses.
    """
    wc_schedule: list[WCStage] = Field(default_factory=list)
    """Stages of W by global step, ending with `train_wc_length`; empty: `train_wc_length` at every
    step. In a stage with W = T each sequence is one uncompressed row.
    """
    wc_period: PositiveInt | None = None
    """Optimizer steps after which `wc_schedule` repeats; empty: its last stage continues."""
    recent_tokens: Tokens = 128
    """Protected tail: number of last tokens that are always LOD0 and never collapse."""
    horizon_tokens: Tokens = 64
    """Horizon h: number of last entries whose loss scores a row and which LensNet does not see.
    Below `recent_tokens`; the default is at most half of them.
    """

    # Training allocator
    num_random_variants: int = Field(default=4, ge=0, le=1 << 10)
    """Random variants N per sequence, beside the baseline: G = N + 1 rows. 0 trains a plain LOD0
    language model; 1 gives no pairs and is an error.
    """
    random_variant_iterations: Depth = 4
    """Maximum redraws to make the variants of a sequence distinct."""
    random_blocks: NonNegativeInt = 0
    """Above 0, variants omit what they do not open instead of summarising it: they consist of the
    tail, this many random blocks and the latest other tokens. LensNet then reads a gist of every
    block, whichever variant is measured.
    """
    training_lod2_probability: float = Field(default=0.1, ge=0, le=1)
    """Probability that a draw of the allocator collapses a whole LOD2 span (with `max_lod` 3 also a
    LOD3 span).
    """
    training_lod2_max_share: float = Field(default=0.5, ge=0, le=1)
    """Maximum share of the T - W removed entries that LOD2 spans may remove (one span is always
    allowed); 1.0: no limit.
    """

    # Positions
    position_scheme: Literal["span", "order"] = "span"
    """Rotary position of an entry: `span`, the mean position of its tokens in the history; `order`,
    its index in the working context.
    """

    # GistNet
    gist_dim: Width | None = None
    """Width of GistNet's blocks, which have one head per 64 channels; empty: the backbone's
    width.
    """
    gist_layers: Depth = 2
    """Non-causal transformer blocks over the K children."""

    # LensNet
    lens_dim: Width = 256
    """Width of LensNet."""
    lens_layers: Depth = 2
    """Non-causal blocks of LensNet, each preceded by an ask layer (see `lens_ask`)."""
    lens_heads: Width = 4
    """Attention heads of LensNet's blocks."""
    lens_index: bool = True
    """Give every tree node an index vector, a gated sum of its token embeddings, against which
    LensNet matches the tail.
    """
    lens_index_white: bool = True
    """Whiten a new LensNet's index vectors (equal variance in all directions), with the embedding
    statistics of its first step.
    """
    lens_ask: Literal["tied", "untied", "none"] = "tied"
    """Ask layers, in which every entry attends to the visible tail. `tied`: query and key
    projections start equal; `none`: no ask layers.
    """
    lens_ask_reach: Literal["tail", "open"] = "tail"
    """What ask layers after the first attend to: the visible `tail`, or all `open` tokens, so that
    an opened fact can point to another one.
    """
    lens_matches: Literal["none", "words", "meaning"] = "none"
    """Let LensNet see how a block matches the last tokens of the visible tail. `words`: repeated
    phrases, shared rare tokens, and where the text has gone on before; `meaning`: also single
    tokens of similar meaning, which needs `lens_index`. Older configs say true for `words`.
    """
    lens_block_scores: Literal["own", "shared"] = "own"
    """Scores of the tokens in an open block, which can only collapse together: each its `own`, or
    for all of them the block's maximum (`shared`).
    """

    # Losses
    horizon_loss_weight: NonNegativeFloat = 0.0
    """Weight of the horizon loss, which is added to the mean loss of all entries."""
    lens_objective: Literal["pair", "entry"] = "pair"
    """Preference loss: `pair`, a Bradley-Terry loss on the sign of a move's gain, or `entry`, a
    logistic loss per entry. A move turns one variant of a pair into the other.
    """
    lens_split_margins: bool = True
    """Apply the loss also to a move's expansions alone and to its collapses alone (one-sided
    margins).
    """
    lens_temperature: PositiveFloat = 0.5
    """Temperature tau of the Bradley-Terry margins. With a low one, scores stay farther from -1
    and 1, where tanh is saturated.
    """
    max_lens_pairs: PositiveInt = 32
    """Maximum unordered pairs per sequence: first the best variant paired with each other one,
    then the pairs with the largest |gain|.
    """
    lens_hard_negative_ratio: float = Field(default=1.0, gt=0, le=1)
    """Share of these pairs that is kept, in the same order (at least one)."""
    lens_pair_baseline: bool = False
    """Pair the baseline too. It omits the head (all tokens before the tail), which is no choice
    that LensNet's scores can express.
    """
    lens_collapse_weight: NonNegativeFloat = 1.0
    """Weight of collapses in the one-sided and per-entry terms; expansions have weight 1."""
    lens_rank_weight: NonNegativeFloat = 0.0
    """Weight of the hinge loss max(0, `lens_margin` - signed margin) of every move."""
    lens_margin: NonNegativeFloat = 0.1
    """Margin of that hinge loss, in units of a move's margin."""
    lens_budget_weight: NonNegativeFloat = 0.0
    """Weight of a penalty on the difference between a row's positive (expand) and negative
    (collapse) scores, each summed with weights by span.
    """
    lens_adv_norm_beta: float = Field(default=0.99, ge=0, lt=1)
    """Decay, per optimizer step, of the running second moment that normalises gains."""
    lens_start_step: NonNegativeInt | Literal["curriculum_end"] = 0
    """First optimizer step in which LensNet runs and learns; `curriculum_end`: the first step of
    the curriculum's last stage.
    """

    # LensNet's own optimizer
    lens_lr: PositiveFloat = 5e-4
    """Peak learning rate of LensNet."""
    lens_warmup_steps: NonNegativeInt = 200
    """Linear warm-up of LensNet's learning rate, in its own optimizer steps; without warm-up its
    tanh outputs saturate.
    """

    @model_validator(mode="before")
    @classmethod
    def _without_withdrawn(cls, given: Any) -> Any:
        """Drop settings of older configs that did nothing."""
        if not isinstance(given, dict):
            return given
        return {k: v for k, v in given.items() if k not in WITHDRAWN or v != WITHDRAWN[k]}

    @field_validator("lens_matches", mode="before")
    @classmethod
    def _name_matches(cls, value: Any) -> Any:
        """Name the values of older configs."""
        return MATCHES_BEFORE.get(str(value).lower(), value)

    @model_validator(mode="before")
    @classmethod
    def _fit_horizon(cls, data: Any) -> Any:
        """Default `horizon_tokens` to at most half of `recent_tokens`."""
        if (
            isinstance(data, dict)
            and "horizon_tokens" not in data
            and str(data.get("recent_tokens", "")).isdecimal()
        ):
            return {
                **data,
                "horizon_tokens": max(
                    1,
                    min(
                        cls.model_fields["horizon_tokens"].default, int(data["recent_tokens"]) // 2
                    ),
                ),
            }
        return data

    @model_validator(mode="after")
    def _check(self) -> "MCConfig":
        geometry = self.geometry  # raises for an impossible geometry or an unreachable W
        if self.horizon_tokens >= self.recent_tokens:
            raise ValueError(
                f"horizon_tokens = {self.horizon_tokens} must be below recent_tokens ="
                f" {self.recent_tokens}, so that LensNet sees some of the tail: use at most"
                f" {self.recent_tokens - 1}"
            )
        if self.num_random_variants == 1 and not self.lens_pair_baseline:
            raise ValueError(
                "num_random_variants = 1 gives no pairs to learn from: use 0 (plain language model)"
                " or at least 2"
            )
        if self.lens_ask_reach == "open" and (self.lens_layers < 2 or self.lens_ask == "none"):
            raise ValueError(
                "lens_ask_reach = 'open' needs a second ask layer, but lens_layers ="
                f" {self.lens_layers} and lens_ask = {self.lens_ask!r}: use lens_layers >= 2 and"
                " lens_ask = 'tied' or 'untied', or lens_ask_reach = 'tail'"
            )
        if self.lens_matches == "meaning" and not self.lens_index:
            raise ValueError(
                "lens_matches = 'meaning' compares index vectors, but lens_index = False: use"
                " lens_index = true or lens_matches = 'words'"
            )
        self._check_random_blocks(geometry)
        previous = -1
        for stage in self.wc_schedule:
            geometry.check_wc_length(stage.train_wc_length, name="wc_schedule: train_wc_length")
            if stage.start_step <= previous:
                raise ValueError(
                    f"wc_schedule: start_step = {stage.start_step} must be above that of the stage"
                    f" before, {previous}"
                )
            previous = stage.start_step
        if self.wc_schedule:
            if self.wc_schedule[0].start_step != 0:
                raise ValueError(
                    f"wc_schedule must start at step 0, not at {self.wc_schedule[0].start_step}"
                )
            if self.wc_schedule[-1].train_wc_length != self.train_wc_length:
                raise ValueError(
                    f"wc_schedule ends at {self.wc_schedule[-1].train_wc_length} entries but"
                    f" train_wc_length = {self.train_wc_length}: the last stage must reach"
                    " train_wc_length"
                )
        if self.wc_period is not None and not self.wc_schedule:
            raise ValueError(
                f"wc_period = {self.wc_period} repeats wc_schedule, which is empty: add stages to"
                " wc_schedule, or leave out wc_period"
            )
        if self.wc_period is not None and self.wc_period <= self.wc_schedule[-1].start_step:
            raise ValueError(
                f"wc_period = {self.wc_period} ends before the last stage of wc_schedule starts:"
                f" use at least {self.wc_schedule[-1].start_step + 1}"
            )
        if self.lens_dim % self.lens_heads or self.lens_dim // self.lens_heads % 2:
            raise ValueError(
                f"lens_heads = {self.lens_heads} must divide lens_dim = {self.lens_dim} into heads"
                " of even width"
            )
        return self

    def _check_random_blocks(self, geometry: Geometry) -> None:
        """Raise ValueError if the variants of `random_blocks` do not fit their lengths."""
        if not self.random_blocks:
            return
        for length in sorted(
            {self.train_wc_length, *(s.train_wc_length for s in self.wc_schedule)}
        ):
            room = (length - self.seq_len + geometry.head_len) // self.block_size
            distant = distant_blocks(geometry, length, self.random_blocks)
            if length < self.seq_len and not self.random_blocks <= min(room, distant - 1):
                raise ValueError(
                    f"random_blocks = {self.random_blocks} does not fit: contexts of {length}"
                    f" entries hold {room} blocks beside the tail of {self.recent_tokens}, and"
                    f" {distant} blocks lie before the latest tokens: use fewer"
                )
        if self.lens_pair_baseline:
            raise ValueError(
                "lens_pair_baseline = true pairs a baseline without random blocks: use"
                " random_blocks = 0, or lens_pair_baseline = false"
            )

    @property
    def geometry(self) -> Geometry:
        """The LOD geometry of a training sequence at the final W."""
        return Geometry(
            seq_len=self.seq_len,
            block_size=self.block_size,
            max_lod=self.max_lod,
            recent_tokens=self.recent_tokens,
        ).check_wc_length(self.train_wc_length)

    @property
    def rows_per_sequence(self) -> int:
        """Rows per sequence G: the baseline and N variants; 1 without variants."""
        return self.num_random_variants + 1

    @property
    def wc_lengths(self) -> set[int]:
        """Every length W that training uses; only T without variants."""
        if self.num_random_variants == 0:
            return {self.seq_len}
        return {self.train_wc_length, *(stage.train_wc_length for stage in self.wc_schedule)}

    def rows_at(self, wc_length: int) -> int:
        """Return the rows per sequence at W = `wc_length`: G, or 1 if W = T, where contexts are
        uncompressed and all variants would be equal.
        """
        return 1 if wc_length == self.seq_len else self.rows_per_sequence

    def varies_at(self, step: int) -> bool:
        """Return whether optimizer step `step` has several rows per sequence; False without
        variants or if W = T at that step.
        """
        return self.rows_at(self.wc_length_at(step)) > 1

    def wc_length_at(self, step: int) -> int:
        """Return W at global optimizer step `step`; T without variants.

        It depends on nothing else, so all ranks agree.
        """
        if self.num_random_variants == 0:
            return self.seq_len
        if self.wc_period is not None:
            step %= self.wc_period
        reached = [s.train_wc_length for s in self.wc_schedule if s.start_step <= step]
        return reached[-1] if reached else self.train_wc_length
