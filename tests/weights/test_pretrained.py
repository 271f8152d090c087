"""Llama-family models come in from Hugging Face folders and go out to them, computing the same,
bit for bit the same weights.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.data import train_tokenizer
from mc_ds.data.tokenizer import HFTokenizer, load_tokenizer
from mc_ds.model.backbone.layers import plain_tables
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.bundle.shard import ShardFile
from mc_ds.weights.export import export_bundle
from mc_ds.weights.open import open_weights
from mc_ds.weights.pretrained import export_hf
from tests.support import factories, tiny_hf
from tests.support.optional import optional
from tests.support.processes import ROOT
from tests.support.tiny_bundle import write_bundle
from tools import import_hf as tool

TOKENS = torch.randint(320, (2, 200), generator=torch.Generator().manual_seed(1))
SHAPES = {
    "gqa-tied": tiny_hf.GQA,
    "mha-untied": tiny_hf.UNTIED,
    "mqa": {**tiny_hf.UNTIED, "num_key_value_heads": 1},
}


def our_logits(model: MegaContextModel, tokens: Tensor) -> Tensor:
    """The backbone as a plain language model, [B, T, V]."""
    backbone = model.backbone
    cos, sin = plain_tables(
        tokens.size(1), backbone.config.head_dim, backbone.config.rope_base, tokens.device
    )
    with torch.no_grad():
        return backbone.head.logits(backbone.hidden(backbone.embedding(tokens), cos, sin))


def their_logits(folder: Path, tokens: Tensor) -> Tensor:
    """What transformers makes of a folder, all of whose weights it must use."""
    transformers = optional("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(tokens).logits


def focusing_bundle(folder: Path, *, tied: bool) -> tuple[Path, MegaContextModel]:
    """A bundle with GistNet and LensNet, as training leaves it, and its model."""
    tokenizer = train_tokenizer(tiny_hf.TEXT, 400)
    config = factories.run_config(backbone=dict(tie_embeddings=tied, rope_base=1e5, init_std=0.2))
    torch.manual_seed(0)
    model, lensnet = MegaContextModel(config, vocab_size=400), LensNet(config.mc, dim=32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    state = {
        **dict(model.named_parameters()),
        **{f"lensnet.{name}": p for name, p in lensnet.named_parameters()},
    }
    return write_bundle(folder, config, tokenizer, state.items(), step=7, source="a test"), model


@pytest.mark.parametrize("shape", SHAPES)
def test_an_imported_model_computes_what_transformers_computes(shape: str, tmp_path: Path) -> None:
    folder = tiny_hf.write_folder(tmp_path / "hf", SHAPES[shape])
    model, lensnet = open_bundle(export_bundle(folder, tmp_path / "bundle")).load()
    theirs = their_logits(folder, TOKENS)
    assert lensnet is None
    assert theirs.std() > 0.5, "the comparison would see nothing"
    torch.testing.assert_close(our_logits(model, TOKENS), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_what_an_exported_model_computes(tied: bool, tmp_path: Path) -> None:
    bundle, model = focusing_bundle(tmp_path / "bundle", tied=tied)
    folder = export_hf(bundle, tmp_path / "hf")
    ours = our_logits(model, TOKENS)
    assert ours.std() > 0.5
    torch.testing.assert_close(their_logits(folder, TOKENS), ours, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(folder).sha256 == open_bundle(bundle).tokenizer().sha256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_come_back_bit_for_bit(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    before = tiny_hf.weights(SHAPES[shape], dtype)
    folder = tiny_hf.write_folder(tmp_path / "hf", SHAPES[shape], before)
    back = export_hf(export_bundle(folder, tmp_path / "bundle"), tmp_path / "back")
    after = load_file(back / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor), name
    config = json.loads((back / "config.json").read_text())
    assert {key: config[key] for key in SHAPES[shape]} == SHAPES[shape]
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert (back / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_folders_that_transformers_writes_in_shards_are_read_and_written(tmp_path: Path) -> None:
    transformers = optional("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_hf.UNTIED))
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert "rope_parameters" in json.loads((tmp_path / "hf" / "config.json").read_text()), (
        "the config of transformers 5"
    )
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    (tmp_path / "hf" / "tokenizer.json").write_bytes(tiny_hf.byte_level(320))
    bundle = open_bundle(export_bundle(tmp_path / "hf", tmp_path / "bundle"))
    assert bundle.config.backbone.rope_base == 1e4
    with torch.no_grad():
        torch.testing.assert_close(
            our_logits(bundle.load()[0], TOKENS), theirs.eval()(TOKENS).logits, rtol=1e-4, atol=1e-5
        )
    back = export_hf(bundle, tmp_path / "back", max_shard_bytes=40_000)
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(their_logits(back, TOKENS), theirs(TOKENS).logits)


def test_an_exported_tokenizer_works_in_transformers(tmp_path: Path) -> None:
    transformers = optional("transformers")
    bundle = open_bundle(
        export_bundle(tiny_hf.write_folder(tmp_path / "hf", tiny_hf.GQA), tmp_path / "bundle")
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(export_hf(bundle, tmp_path / "back"))
    ids = bundle.tokenizer().encode(tiny_hf.TEXT[0])
    assert tokenizer.encode(tiny_hf.TEXT[0], add_special_tokens=False) == ids
    assert tokenizer.decode(ids) == tiny_hf.TEXT[0]
    assert tokenizer.eos_token_id == bundle.tokenizer().separator_id


def test_a_model_with_more_rows_than_its_tokenizer_has_ids(tmp_path: Path) -> None:
    folder = tiny_hf.write_folder(tmp_path / "hf", tiny_hf.GQA, tokenizer=tiny_hf.byte_level(300))
    bundle = open_bundle(export_bundle(folder, tmp_path / "bundle"))
    assert bundle.vocab_size == bundle.tokenizer().vocab_size == 320
    assert bundle.tokenizer().encode(tiny_hf.TEXT[0]) == HFTokenizer(
        tiny_hf.byte_level(300)
    ).encode(tiny_hf.TEXT[0])


def test_the_bundle_is_a_plain_language_model_that_knows_its_tokenizer(tmp_path: Path) -> None:
    bundle = open_bundle(
        export_bundle(tiny_hf.write_folder(tmp_path / "A model!", tiny_hf.GQA), tmp_path / "bundle")
    )
    assert bundle.config.name == "A-model-"
    assert bundle.config.mc.num_random_variants == 0
    assert bundle.config.mc.seq_len == bundle.config.mc.train_wc_length == 256
    assert Path(bundle.config.data.tokenizer or "") == tmp_path / "bundle"
    assert bundle.config.data.vocab_size == 320
    assert bundle.manifest["tied"] == {"backbone.head.weight": "backbone.embedding.weight"}


def test_float16_becomes_float32_and_a_given_dtype_counts(tmp_path: Path) -> None:
    half = tiny_hf.weights(tiny_hf.GQA, torch.float16)
    folder = tiny_hf.write_folder(tmp_path / "hf", tiny_hf.GQA, half)
    stored = dict(open_bundle(export_bundle(folder, tmp_path / "kept")).weights())
    assert torch.equal(stored["backbone.norm.weight"], half["model.norm.weight"].float())
    stored = dict(open_bundle(export_bundle(folder, tmp_path / "bf16", dtype="bf16")).weights())
    assert torch.equal(stored["backbone.norm.weight"], half["model.norm.weight"].bfloat16())


def test_a_tied_head_that_is_stored_anyway_must_be_the_embedding(tmp_path: Path) -> None:
    tensors = tiny_hf.weights(tiny_hf.GQA)
    equal = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    export_bundle(tiny_hf.write_folder(tmp_path / "equal", tiny_hf.GQA, equal), tmp_path / "bundle")
    other = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    with pytest.raises(
        ConfigError, match=r"backbone.head.weight differs from backbone.embedding.weight"
    ):
        export_bundle(
            tiny_hf.write_folder(tmp_path / "other", tiny_hf.GQA, other), tmp_path / "bundle2"
        )


def test_buffers_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    tensors = {
        **tiny_hf.weights(tiny_hf.GQA),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    bundle = open_bundle(
        export_bundle(
            tiny_hf.write_folder(tmp_path / "hf", tiny_hf.GQA, tensors), tmp_path / "bundle"
        )
    )
    assert len(bundle.parameters) == 2 + 2 * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, r"model_type = 'qwen2': should be 'llama'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            r"rope_type = 'llama3': scaled rotary positions are not supported",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_type = 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rope_type = 'yarn'"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor = 0.5",
        ),
        ({"attention_bias": True}, r"attention_bias = True: should be False"),
        ({"mlp_bias": True}, r"mlp_bias = True: should be False"),
        (
            {"head_dim": 16},
            r"head_dim = 16: only hidden_size / num_attention_heads = 32 / 4 is supported",
        ),
        ({"num_key_value_heads": 3}, r"num_kv_heads = 3 must divide num_heads = 4"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu': should be 'silu'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config"),
        ({"hidden_size": None}, r"hidden_size = None"),
        (
            {"intermediate_size": 64},
            r"model.layers.0.mlp.gate_proj.weight has shape \[48, 32\], but \[64, 32\] by its config",
        ),
        (
            {"num_hidden_layers": 3},
            r"num_hidden_layers = 3, but its files have 2: only complete models",
        ),
        (
            {"num_hidden_layers": 1},
            r"num_hidden_layers = 1, but its files have 2: only complete models",
        ),
        (
            {"vocab_size": 310},
            r"model.embed_tokens.weight has shape \[320, 32\], but \[310, 32\] by its config",
        ),
        ({"vocab_size": 10**18}, r"has shape \[320, 32\]"),
        ({"num_hidden_layers": 10**18}, r"num_layers = 10+: should be less than"),
        ({"hidden_size": 10**18}, r"dim = 10+: should be less than"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line_and_leaves_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tiny_hf.write_folder(tmp_path / "hf", tiny_hf.GQA)
    (folder / "config.json").write_text(json.dumps(tiny_hf.GQA | changes))
    with pytest.raises(ConfigError, match=message) as error:
        export_bundle(folder, tmp_path / "out" / "bundle")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("pytorch_model.bin", r"pytorch_model.bin is a pickle, which can run code"),
        ("adapter_config.json", r"it is an adapter: merge it"),
        ("model-00001-of-00002.safetensors", r"model.safetensors.index.json is missing"),
    ],
)
def test_what_stands_in_the_place_of_weights_is_named(
    there: str, message: str, tmp_path: Path
) -> None:
    folder = tiny_hf.write_folder(tmp_path / "hf", tiny_hf.GQA)
    (folder / "model.safetensors").rename(folder / there)
    with pytest.raises(ConfigError, match=message):
        export_bundle(folder, tmp_path / "bundle")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    tensors = tiny_hf.weights(tiny_hf.GQA, torch.float64)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    folder = tiny_hf.write_folder(tmp_path / "hf", tiny_hf.GQA, tensors)
    with pytest.raises(ConfigError, match=r"backbone.blocks.1.down.weight holds values that are"):
        export_bundle(folder, tmp_path / "bundle", dtype="fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_files_may_be_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    folder = tiny_hf.write_folder(tmp_path / "blobs", tiny_hf.GQA)
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    assert open_weights(tmp_path / "snapshot").load()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pipes_and_devices_are_refused(name: str, tmp_path: Path) -> None:
    """A pipe is read until somebody writes to it, a device for ever."""
    for number, make in enumerate([os.mkfifo, lambda path: path.symlink_to("/dev/zero")]):
        folder = tiny_hf.write_folder(tmp_path / str(number), tiny_hf.GQA)
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(ConfigError, match=rf"{name} .*it is not a regular file"):
            export_bundle(folder, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, r"config.json cannot be read"),
        ("config.json", b"[]", r"config.json holds a list"),
        ("config.json", b"[" * 100_000, r"config.json cannot be read: RecursionError"),
        ("config.json", b" " * (17 << 20), r"it has more than 16 MiB"),
        ("model.safetensors", None, r"hf has no model.safetensors: give a complete folder"),
        ("model.safetensors", POINTER, r"model.safetensors is a pointer of Git LFS"),
        (
            "model.safetensors",
            b"\x10\0\0\0\0\0\0\0{",
            r"model.safetensors is not a readable safetensors file",
        ),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"model.norm.weight": "../x"}}',
            r"no weight_map of files in this folder",
        ),
        (
            "tokenizer.json",
            None,
            r"tokenizer.json is not a readable tokenizer \(No such file or directory\)",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_told_in_one_line(
    file: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    folder = tiny_hf.write_folder(tmp_path / "hf", tiny_hf.GQA)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        export_bundle(folder, tmp_path / "bundle")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


OPTIMIZED = """
import sys
from pathlib import Path
import torch
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.bundle.shard import ShardFile
from mc_ds.weights.bundle.write import BundleWriter
from mc_ds.weights.pretrained import export_hf
assert False, "assertions are on"
folder = Path(sys.argv[1])
bundle = open_bundle(folder / "bundle")
export_hf(bundle, folder / "hf", max_shard_bytes=4000)
with BundleWriter(
    folder / "copy", bundle.config, bundle.tokenizer(), step=1, source="a test", max_shard_bytes=4000
) as writer:
    for name, tensor in bundle.weights():
        writer.add(name, tensor)
    writer.finish()
"""


def test_without_assertions_no_tensor_is_lost(tmp_path: Path) -> None:
    """Under -O, also where files and headers are full; the header's room is cut so that it is."""
    bundle, model = focusing_bundle(tmp_path / "bundle", tied=False)
    program = OPTIMIZED.replace(
        "assert False",
        "import mc_ds.weights.bundle.shard as shard\nshard.DATA_START = 1024\nassert False",
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ours = our_logits(model, TOKENS)
    torch.testing.assert_close(their_logits(tmp_path / "hf", TOKENS), ours, rtol=1e-4, atol=1e-4)
    before = dict(open_bundle(bundle).weights())
    copy = open_bundle(tmp_path / "copy")
    assert copy.parameters == open_bundle(bundle).parameters
    assert all(torch.equal(before[name], tensor) for name, tensor in copy.weights())


@pytest.mark.parametrize("fault", ["left out", "changed", "another"])
def test_an_export_that_is_not_the_bundle_never_appears(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = focusing_bundle(tmp_path / "bundle", tied=True)
    add = ShardFile.add

    def faulty(shard: ShardFile, name: str, tensor: Tensor) -> bool:
        if name != "model.norm.weight":
            return add(shard, name, tensor)
        match fault:
            case "changed":
                return add(shard, name, -tensor)
            case "another":
                add(shard, f"{name}.2", tensor)
                return add(shard, name, tensor)
        return True

    monkeypatch.setattr(ShardFile, "add", faulty)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight.*: export again"):
        export_hf(bundle, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_failed_export_leaves_nothing_and_an_existing_folder_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = focusing_bundle(tmp_path / "bundle", tied=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match=r"there exists: give another name or remove it"):
        export_hf(bundle, tmp_path / "there")
    monkeypatch.setattr("mc_ds.weights.pretrained.exporting.hf_config", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_hf(bundle, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "there"]


def test_the_program_imports_and_tells_mistakes_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_hf.write_folder(tmp_path / "hf", tiny_hf.GQA)
    count = sum(tensor.numel() for tensor in tiny_hf.weights(tiny_hf.GQA).values())
    assert tool.main([str(folder), str(tmp_path / "bundle"), "--dtype", "bf16"]) == 0
    assert f"{count:,} parameters in bf16" in capsys.readouterr().out
    assert tool.main([str(folder), str(tmp_path / "bundle")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert tool.main([str(folder), str(tmp_path / "bundle"), "--overwrite"]) == 0
    assert open_bundle(tmp_path / "bundle").manifest["dtype"] == "fp32"
