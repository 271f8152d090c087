"""The attention of the last tokens of a history, against attention matrices written out token by
token.
"""

import torch
from torch import Tensor

from tests.support.factories import mc_config, model, run_config, tokens


def test_attention_of_the_last_tokens_is_that_of_every_head() -> None:
    """Against attention matrices written out token by token."""
    mc = mc_config(position_scheme="span")
    root = model(run_config(mc, backbone=dict(norm_eps=0.3, init_std=0.5))).eval()
    for block in root.backbone.blocks:
        torch.nn.init.uniform_(block.attention_norm.weight, 0.5, 1.5)
    ids, queries = tokens(mc, 2)[:, :20], 3
    with torch.no_grad():
        mass = root(ids, attended_by=queries).mass
        expected = torch.stack([slow_attention(root, row, queries) for row in ids])
    torch.testing.assert_close(mass, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mass.sum(1), torch.ones(2))
    assert mass.max() > 0.1, "far from even, which would be 1/20"


def slow_attention(root: torch.nn.Module, ids: Tensor, queries: int) -> Tensor:
    """Attention [W] of the last `queries` tokens, head by head, with rotations as complex
    numbers."""
    config, count = root.backbone.config, len(ids)
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    speeds = config.rope_base ** (-torch.arange(0, width, 2).double() / width)
    turn = torch.polar(
        torch.ones(count, width // 2).double(), torch.arange(count)[:, None] * speeds
    )
    x, total = root.backbone.embedding(ids)[None], torch.zeros(count)
    starts = torch.arange(count)[None]
    tables = root._tables(torch.zeros_like(starts), starts)
    for block in root.backbone.blocks:
        projected = block.attention_norm(x[0]) @ block.qkv.weight.T
        parts = projected.double().view(count, heads + 2 * kv_heads, width)
        turned = torch.complex(parts[..., : width // 2], parts[..., width // 2 :]) * turn[:, None]
        for head in range(heads):
            key = turned[:, heads + head // (heads // kv_heads)]
            for at in range(count - queries, count):
                logits = (turned[at, head] * key[: at + 1].conj()).real.sum(1) / width**0.5
                total[: at + 1] += logits.softmax(0).float()
        x = block(x, *tables)
    return total / (len(root.backbone.blocks) * heads * queries)
