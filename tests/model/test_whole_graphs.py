"""LensNet and the preference loss with its metrics are each one graph for a compiler: no graph
break, and no recompilation while the shapes stay the same.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mc_ds.geometry import lod1_cover
from mc_ds.model.lensnet import LensNet
from mc_ds.preference.loss import preference_parts
from tests.support.factories import mc_config, model, plan, run_config, tokens, wake


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(lens_index=False),
        dict(lens_ask="none"),
        dict(lens_ask="untied"),
        dict(lens_block_scores="shared"),
        dict(lens_ask_reach="open", lens_layers=2),
        dict(lens_matches="words"),
        dict(lens_matches="words", random_blocks=3, max_lod=1),
        dict(lens_matches="meaning", random_blocks=3, max_lod=1),
    ],
    ids=str,
)
def test_each_is_one_graph_for_all_plans_of_a_length(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    mc = mc_config(**options)
    net, lens, graphs = model(run_config(mc)), wake(LensNet(mc, dim=32)), CompileCounter()
    compiled = torch.compile(lens.row_scores, backend=graphs, fullgraph=True, dynamic=False)
    losses = CompileCounter()
    for number in range(3):
        lods, starts = plan(mc, 2, first=2 + 2 * number)
        ids = tokens(mc, 2, seed=number)
        output = net(ids, lods, starts, torch.ones(2, mc.horizon_tokens))
        read = (x.expand(2, -1) for x in lod1_cover(mc.geometry)) if mc.random_blocks else ()
        inputs = (
            output.visible_entries.detach(),
            *(tuple(read) or (lods, starts)),
            output.lod0.detach(),
            ids,
        )
        scores = lens.row_scores(*inputs)
        torch.testing.assert_close(compiled(*inputs), scores)
        parts = partial(preference_parts, rows_per_sequence=len(lods) // 2, config=mc)
        of_rows = output.row_scores.detach()
        compiled_parts = torch.compile(parts, backend=losses, fullgraph=True, dynamic=False)
        expected = parts(scores, lods, starts, of_rows, None)
        found = compiled_parts(scores, lods, starts, of_rows, None)
        torch.testing.assert_close(found.numerator, expected.numerator)
    assert graphs.frame_count == 1
    assert losses.frame_count == 1


def test_nothing_is_asked_that_torch_2_11_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    mc = mc_config()
    net, lens, (lods, starts) = model(run_config(mc)), wake(LensNet(mc, dim=32)), plan(mc, 2)
    output = net(tokens(mc, 2), lods, starts, torch.ones(2, mc.horizon_tokens))
    monkeypatch.delattr(torch.amp, "is_autocast_available")
    lens.row_scores(output.visible_entries, lods, starts, output.lod0)
