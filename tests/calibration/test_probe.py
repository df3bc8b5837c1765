"""By what a block scales what it writes, told from a few tokens, against what its configuration says."""

import pytest
import torch

from families import FAMILIES, block_list, tiny_model, token_ids
from flexigpt.calibration import Probe
from flexigpt.calibration.hidden_states import Stream
from flexigpt.model import find_architecture


@pytest.mark.parametrize("family", FAMILIES)
def test_the_factor_is_the_configurations(family: str) -> None:
    model, ids = tiny_model(family), token_ids(batch=3, tokens=16)
    writers = find_architecture(model.config).output_norms
    expected = getattr(model.config, "residual_multiplier", 1.0)
    stream, probe = Stream(model, [ids]), Probe(model, ids)
    for index, block in enumerate(block_list(model)):
        factor = probe.residual_factor(block, index, stream.hidden[0], writers)
        assert factor == (None if family == "opt-norm-after" else pytest.approx(expected, rel=1e-4))
        stream.advance(block, index)


def test_a_token_that_is_huge_does_not_hide_what_is_added() -> None:
    """As the first token's hidden states are in most models: beside them what a block writes is lost in bfloat16."""
    model, ids = tiny_model("llama", torch.bfloat16), token_ids(batch=1, tokens=16)
    writers = find_architecture(model.config).output_norms
    hidden = Stream(model, [ids]).hidden[0].clone()
    hidden[0, 0] *= 10_000
    factor = Probe(model, ids).residual_factor(block_list(model)[0], 0, hidden, writers)
    assert factor == pytest.approx(1, abs=1e-3)
