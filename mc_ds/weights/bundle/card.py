"""The model card of a bundle: what it is, how it was trained, and how to use it."""

from collections.abc import Mapping
from math import prod
from typing import Any

from mc_ds.config import RunConfig
from mc_ds.weights.layout import part_of


def model_card(
    name: str, config: RunConfig, manifest: Mapping[str, Any], metrics: Mapping[str, float]
) -> str:
    """Return the model card in Markdown. `metrics` are named as in the run's `metrics.jsonl`."""
    backbone, mc = config.backbone, config.mc
    counts: dict[str, int] = {}
    for parameter, entry in manifest["parameters"].items():
        counts[part_of(parameter)] = counts.get(part_of(parameter), 0) + prod(entry["shape"])
    focusing = "lensnet" in counts
    sections = [
        f"# {name}",
        _summary(config, focusing=focusing),
        "## Model",
        _table({**_made(manifest), **_shape(config, manifest)}),
    ]
    sections.append(_table({f"{part} parameters": f"{count:,}" for part, count in counts.items()}))
    if focusing:
        sections += ["## Working context", _table(_context(config))]
    if "notes" in manifest:
        sections += [
            "## How it was made",
            "As stated by whoever wrote the bundle.",
            _table(manifest["notes"]),
        ]
    if metrics:
        sections += [
            "## Figures",
            "As recorded by the run, in nats unless a name says otherwise.",
            _table(_figures(metrics)),
        ]
    sections += ["## Use", _use(config, focusing=focusing)]
    trained = f"histories of {mc.seq_len:,} tokens" if focusing else "plain text"
    sections.append(
        f"Weights are `{manifest['dtype']}` safetensors of a decoder of width {backbone.dim}"
        f" trained on {trained}; `manifest.json` names every parameter, its file and the SHA-256 of"
        " every file, and all of them are checked when the bundle is opened."
    )
    return "\n\n".join(sections) + "\n"


def _summary(config: RunConfig, *, focusing: bool) -> str:
    if not focusing:
        return (
            "A plain language model as an mc_ds bundle: a decoder and its tokenizer, without"
            " GistNet and LensNet."
        )
    how = (
        "LensNet decides which blocks of tokens it contains besides the latest."
        if config.mc.random_blocks
        else "GistNet summarises blocks of tokens, LensNet decides where detail is worth its"
        " entries."
    )
    return (
        "A language model that reads a working context of fixed size instead of its whole history:"
        f" {how} An mc_ds bundle: backbone, GistNet, LensNet and tokenizer."
    )


def _made(manifest: Mapping[str, Any]) -> dict[str, str]:
    made = {"source": str(manifest["source"]), "optimizer step": f"{manifest['step']:,}"}
    for label, key in (("trained with", "trained_with"), ("made by", "created_by")):
        if key in manifest:
            made[label] = ", ".join(f"{name} {version}" for name, version in manifest[key].items())
    return made


def _shape(config: RunConfig, manifest: Mapping[str, Any]) -> dict[str, str]:
    backbone = config.backbone
    return {
        "layers": str(backbone.num_layers),
        "width": str(backbone.dim),
        "heads (query / key and value)": f"{backbone.num_heads} / {backbone.num_kv_heads}",
        "feed-forward width": str(backbone.ffn_dim),
        "rotary base": f"{backbone.rope_base:g}",
        "embeddings": "tied" if backbone.tie_embeddings else "not tied",
        "vocabulary": f"{manifest['tokenizer']['vocab_size']:,} ({manifest['tokenizer']['file']})",
    }


def _context(config: RunConfig) -> dict[str, str]:
    mc = config.mc
    return {
        "history T in training": f"{mc.seq_len:,} tokens",
        "working context W in training": f"{mc.train_wc_length:,} entries",
        "block size K": str(mc.block_size),
        "coarsest level of detail": str(mc.max_lod),
        "tail at full detail": (
            f"{mc.recent_tokens} tokens, of which the horizon {mc.horizon_tokens}"
        ),
        "position scheme": mc.position_scheme,
    }


def _figures(metrics: Mapping[str, float]) -> dict[str, str]:
    return {f"`{name}`": f"{value:,.4g}" for name, value in metrics.items()}


def _use(config: RunConfig, *, focusing: bool) -> str:
    if focusing:
        code = (
            "from mc_ds.inference import load_bundle\n\n"
            'model = load_bundle("path/of/this/folder", device="cpu")\n'
            f'session = model.session(policy="lens", budget={config.mc.train_wc_length},'
            ' tree="ram")\n'
            "session.ingest(model.tokenizer.encode(text))\n"
            "print(model.tokenizer.decode(session.generate(max_new_tokens=32)))"
        )
    else:
        code = (
            "from mc_ds.weights.bundle import open_bundle\n\nmodel, _ ="
            ' open_bundle("path/of/this/folder").load(device="cpu")'
        )
    return f"```python\n{code}\n```"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(
        [
            "| | |",
            "|---|---|",
            *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()),
        ]
    )


def _cell(text: str) -> str:
    """Return `text` with the column separator of Markdown tables escaped."""
    return text.replace("|", "\\|")
