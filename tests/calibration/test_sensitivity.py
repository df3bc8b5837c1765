"""Sensitivities against one backward pass through the whole stock model."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from families import FAMILIES, block_list, tiny_model, token_ids
from flexigpt.calibration import sensitivities
from flexigpt.model import find_architecture
from flexigpt.weights import StreamedModel


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_a_backward_pass_through_the_whole_model(family: str) -> None:
    model, ids = tiny_model(family), token_ids(batch=3, tokens=16)
    roles = find_architecture(model.config).roles
    paths = (roles.output, roles.down)
    seen: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def note(key: tuple[int, str]) -> object:
        def hook(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            output.retain_grad()
            seen[key] = (args[0].detach(), output)

        return hook

    hooks = [
        block.get_submodule(path).register_forward_hook(note((number, path)))
        for number, block in enumerate(block_list(model))
        for path in paths
    ]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()

    found = dict(sensitivities(StreamedModel(model), ids, paths))
    assert list(found) == list(reversed(range(len(block_list(model)))))
    for (block, path), (given, output) in seen.items():
        for moment, rows in zip(found[block][path], (given, output.grad), strict=True):
            assert rows is not None
            rows = rows.flatten(0, -2).double()
            expected = (rows.T @ rows / ids.numel()).float()
            torch.testing.assert_close(moment, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
