"""The report of `--dry_run`: resolved config, parameters, shapes and estimated memory per rank.

Legend: B sequences per micro-step, G rows per sequence, R = B*G rows, W entries, T tokens, K block
size, V vocabulary, P parameters.

Bytes per parameter of the engine (ZeRO paper, arXiv:1910.02054, with float32 accumulation):

    weights 2 (bf16) or 4 (fp32); gradients 4; optimizer 12 (float32 master copy and two moments)

ZeRO-1 divides the optimizer's bytes by the number of ranks, ZeRO-2 also those of gradients, ZeRO-3
also those of weights. LensNet is replicated in float32: 16 bytes per parameter on every rank. On
several ranks ZeRO-3 has a float32 bucket of gradients, with at most `BUCKET` elements. Blocks
gathered by ZeRO-3 are not counted. Activations kept for the backward pass, as numbers of
values in the engine's precision:

    block     of width D, feed-forward F (three matrices if gated), key/value width C:
              8 D + 2 C + 4 F per entry
    stack     of L blocks, all but k of which are recomputed in the backward pass, one at a time:
              max(k, 1) * block + (L - max(k, 1)) * D per entry (the last block is kept if any is,
              and is done when the first one is recomputed)
    decoder   R*W * stack(layers, block(D, F, C))
    GistNet   B*(T + T/K) * stack(gist_layers, block(D_g, 4 D_g, D_g))
    LensNet   R*(W - h) * lens_layers * block(D_l, 4 D_l, D_l) + B * nodes * D_l  (index vectors)
    entries   (B * nodes + R*W) * D
    logits    one chunk of entries * V, in float32 twice (values and gradient)

Frozen parameters (`train.frozen`) have weights only. If the whole model is frozen, its forward pass
keeps one block at a time.
"""

from collections.abc import Mapping

from mc_ds.config import RunConfig
from mc_ds.config.recipe import to_yaml
from mc_ds.model.backbone.recompute import recomputed_blocks

GIB = 2**30
BUCKET = 500_000_000
"""`reduce_bucket_size` of ds_configs/zero3.json, in elements."""
REPLICATED = "lensnet"
"""Name of the module outside the engine, of which every rank has a float32 copy."""


def largest_shapes(config: RunConfig) -> dict[str, int]:
    """Return B, G, R and W of the stage of `wc_schedule` with most entries (W = T without
    variants).
    """
    mc, sequences = config.mc, config.train.micro_batch_size
    stages = {stage.train_wc_length for stage in mc.wc_schedule} or {mc.train_wc_length}
    lengths = stages if mc.num_random_variants else {mc.seq_len}
    longest = max(lengths, key=lambda length: mc.rows_at(length) * length)
    rows = mc.rows_at(longest)
    return {"B": sequences, "G": rows, "R": sequences * rows, "W": longest}


def activation_values(config: RunConfig) -> int:
    """Return the number of values kept for the backward pass of one micro-step, without logits (see
    the formula in the module's docstring).
    """
    mc, backbone, shapes = config.mc, config.backbone, largest_shapes(config)
    entries = shapes["R"] * shapes["W"]
    nodes = shapes["B"] * sum(mc.geometry.node_counts)
    block = _block_values(backbone.dim, backbone.ffn_dim, backbone.num_kv_heads * backbone.head_dim)
    model_learns = config.train.frozen != "all"
    share = config.train.activation_checkpointing
    layers, gist_layers = (backbone.num_layers, mc.gist_layers) if model_learns else (1, 1)
    total = entries * _stack_values(layers, block, backbone.dim, share)
    total += (nodes + entries) * backbone.dim
    if mc.num_random_variants:
        children = shapes["B"] * sum(mc.geometry.node_counts[:-1])
        visible = shapes["R"] * (shapes["W"] - mc.horizon_tokens)
        width = config.gist_width
        gist_block = _block_values(width, 4 * width, width)
        total += children * _stack_values(gist_layers, gist_block, width, share)
        total += (
            visible * mc.lens_layers * _block_values(mc.lens_dim, 4 * mc.lens_dim, mc.lens_dim)
            + nodes * mc.lens_dim
        )
    return total


def memory_per_rank(
    config: RunConfig,
    parameter_counts: Mapping[str, int],
    world_size: int,
    stage: int,
    *,
    precision: str,
) -> dict[str, float]:
    """Return the estimated bytes on one rank with ZeRO `stage` (1, 2 or 3), by purpose."""
    replicated = parameter_counts.get(REPLICATED, 0)
    engine = sum(parameter_counts.values()) - replicated
    learning = {"none": engine, "backbone": parameter_counts.get("gistnet", 0), "all": 0}[
        config.train.frozen
    ]
    size = 2 if precision == "bf16" else 4
    chunk = min(
        config.train.loss_chunk_entries, largest_shapes(config)["R"] * largest_shapes(config)["W"]
    )
    return {
        "weights": engine * size / (world_size if stage >= 3 else 1),
        "gradients": learning * 4 / (world_size if stage >= 2 else 1),
        "optimizer": learning * 12 / (world_size if stage >= 1 else 1),
        "LensNet": replicated * 16.0,
        "bucket": min(BUCKET, learning) * 4.0 if stage >= 3 and world_size > 1 else 0.0,
        "activations": activation_values(config) * size + chunk * config.data.vocab_size * 8.0,
    }


def dry_run_report(
    config: RunConfig,
    parameter_counts: Mapping[str, int],
    world_size: int,
    stage: int,
    *,
    device_type: str = "cpu",
) -> str:
    """Return the text of `--dry_run`.

    `parameter_counts` has one entry per module; "lensnet" is outside the engine. `stage` is the
    run's ZeRO stage, marked in the table. `device_type` resolves `train.precision: auto`.
    """
    precision = config.train.precision_on(device_type)
    sections = (
        ("Resolved config", to_yaml(config).rstrip()),
        ("Parameters", _parameters(parameter_counts)),
        ("Shapes of the largest stage", _shapes(config, world_size)),
        (
            (
                f"Memory per rank, estimated ({world_size} ranks, {precision}, GiB; offloaded state"
                " is in host memory)"
            ),
            _memory(config, parameter_counts, world_size, stage, precision),
        ),
    )
    return "\n\n".join(f"# {title}\n{body}" for title, body in sections) + "\n"


def _block_values(dim: int, ffn_dim: int, kv_dim: int) -> int:
    return 8 * dim + 2 * kv_dim + 4 * ffn_dim


def _stack_values(layers: int, block: int, dim: int, recomputed: float) -> int:
    """Return the values per entry of `layers` blocks with `block` values each, of which the share
    `recomputed` keeps only its input of width `dim`.
    """
    whole = max(1, layers - sum(recomputed_blocks(layers, recomputed)))
    return whole * block + (layers - whole) * dim


def _parameters(counts: Mapping[str, int]) -> str:
    rows = {**counts, "total": sum(counts.values())}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {count:>15,}" for name, count in rows.items())


def _shapes(config: RunConfig, world_size: int) -> str:
    mc, train, shapes = config.mc, config.train, largest_shapes(config)
    entries = shapes["G"] * shapes["W"]
    return "\n".join(
        (
            "B = {B} sequences per rank and micro-step, G = {G} rows per sequence, R = {R} rows, W"
            " = {W} entries".format(**shapes),
            (
                f"entries per sequence: {entries:,} (G*W) for {mc.seq_len:,} tokens, compression"
                f" {mc.seq_len / shapes['W']:.2f}"
            ),
            (
                "micro-steps per step:"
                f" {train.global_batch_size / (train.micro_batch_size * world_size):g}"
            ),
            (
                f"tokens per step: {train.global_batch_size * mc.seq_len:,}"
                f" ({train.global_batch_size * entries:,} entries)"
            ),
            f"tokens of the run: {train.total_steps * train.global_batch_size * mc.seq_len:,}",
        )
    )


def _memory(
    config: RunConfig, counts: Mapping[str, int], world_size: int, stage: int, precision: str
) -> str:
    table = {
        s: memory_per_rank(config, counts, world_size, s, precision=precision) for s in (1, 2, 3)
    }
    names = [*table[1], "total"]
    lines = ["        " + "".join(f"{name:>13}" for name in names)]
    for s, parts in table.items():
        values = [*parts.values(), sum(parts.values())]
        lines.append(
            f"ZeRO-{s}{' *' if s == stage else '  '}"
            + "".join(f"{value / GIB:>13.3f}" for value in values)
        )
    return "\n".join((*lines, "* this run"))
