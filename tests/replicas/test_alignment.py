"""Symmetry alignment: the block stays what it was, and lies nearer to its base."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor, nn

from families import FAMILIES, FULL_RANK, NUM_BLOCKS, block_list, tiny_model, token_ids
from flexigpt import PruneOptions, prune
from flexigpt.model import ARCHITECTURES, find_architecture
from flexigpt.model.architecture import Architecture
from flexigpt.replicas.alignment import BlockSymmetries, align, block_symmetries
from flexigpt.weights import load_model

Tensors = dict[str, Tensor]


def linears_of(block: nn.Module, architecture: Architecture) -> Tensors:
    return {
        f"{path}.{name}": tensor.detach().clone()
        for path in architecture.linears
        for name, tensor in block.get_submodule(path).named_parameters()
    }


def distance(one: Tensors, other: Tensors) -> float:
    """Sum of squared differences of the weights."""
    return sum((one[name] - other[name]).square().sum().item() for name in one if name.endswith("weight"))


def squares(tensors: Tensors) -> float:
    return distance(tensors, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_aligned_block_computes_what_it_did_and_lies_nearer(family: str) -> None:
    """Float64, so that rounding hides nothing but what the models' own float32 norms round."""
    model = tiny_model(family, torch.float64)
    architecture, symmetries = find_architecture(model.config), block_symmetries(model.config)
    pruned, base = (linears_of(block_list(model)[index], architecture) for index in (2, 4))
    aligned = align(pruned, base, symmetries)
    with torch.no_grad():
        expected = model(token_ids()).logits
        for name, tensor in aligned.items():
            block_list(model)[2].get_parameter(name).copy_(tensor)
        logits = model(token_ids()).logits
        for name, tensor in base.items():
            block_list(model)[2].get_parameter(name).copy_(tensor)
        others = model(token_ids()).logits
    assert aligned.keys() == pruned.keys()
    assert (logits - expected).abs().max() < 1e-6 * expected.abs().max() < 1e-2 * (others - expected).abs().max()
    assert distance(aligned, base) < 0.9 * distance(pruned, base)
    assert distance(align(aligned, base, symmetries), base) <= distance(aligned, base) * (1 + 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scrambled_base_is_recovered(family: str) -> None:
    """Units, heads and turns are all found again: every family's linears are read right."""
    model = tiny_model(family, torch.float64)
    architecture, symmetries = find_architecture(model.config), block_symmetries(model.config)
    block = block_list(model)[2]
    base = linears_of(block, architecture)
    scrambled = {name: tensor.clone() for name, tensor in base.items()}
    scramble(parts_of(scrambled, architecture, symmetries), FAMILIES[family][0])
    with torch.no_grad():
        expected = model(token_ids()).logits
        for name, tensor in scrambled.items():
            block.get_parameter(name).copy_(tensor)
        assert (model(token_ids()).logits - expected).abs().max() < 1e-6 * expected.abs().max()
    assert distance(scrambled, base) > squares(base)
    aligned = align(scrambled, base, symmetries)
    for name, tensor in base.items():
        torch.testing.assert_close(aligned[name], tensor, atol=1e-9, rtol=0)


def parts_of(tensors: Tensors, architecture: Architecture, symmetries: BlockSymmetries) -> dict[str, list[Tensor]]:
    """Views of a block's weights and biases by role, read off as the models' forward does.

    The first dimensions are (heads, dimensions of a head), or (units,).
    """
    roles, heads, groups, size = architecture.roles, symmetries.heads, symmetries.groups, symmetries.head_size

    def stored(path: str) -> list[Tensor]:
        found = [tensors[f"{path}.{name}"] for name in ("weight", "bias") if f"{path}.{name}" in tensors]
        return [found[0].T, *found[1:]] if "c_attn" in roles.query else found  # Conv1D

    if roles.query == "attention.query_key_value":
        by_head = [tensor.unflatten(0, (heads, 3, size)) for tensor in stored(roles.query)]
        parts = {role: [tensor[:, n] for tensor in by_head] for n, role in enumerate(("query", "key", "value"))}
    elif roles.query == roles.key:
        split = [tensor.split([heads * size, groups * size, groups * size]) for tensor in stored(roles.query)]
        parts = {
            role: [tensor[n].unflatten(0, (-1, size)) for tensor in split]
            for n, role in enumerate(("query", "key", "value"))
        }
    else:
        parts = {
            role: [tensor.unflatten(0, (-1, size)) for tensor in stored(path)]
            for role, path in (("query", roles.query), ("key", roles.key), ("value", roles.value))
        }
    parts["output"] = [stored(roles.output)[0].T.unflatten(0, (-1, size))]
    parts["down"] = [stored(roles.down)[0].T]
    if roles.gate == roles.up:
        halves = [tensor.chunk(2) for tensor in stored(roles.up)]
        parts["gate"], parts["up"] = ([tensor[n] for tensor in halves] for n in range(2))
    else:
        parts["gate"], parts["up"] = stored(roles.gate) if roles.gate else [], stored(roles.up)
    return parts


def scramble(parts: dict[str, list[Tensor]], model_type: str) -> None:
    """Random symmetries of all kinds, in place, one head after the other."""
    generator = torch.Generator().manual_seed(7)
    units = torch.randperm(len(parts["down"][0]), generator=generator)
    signs = torch.randint(0, 2, (len(units),), generator=generator).double() * 2 - 1
    for role in ("gate", "up", "down"):
        for tensor in parts[role]:
            moved = tensor[units]
            if parts["gate"] and role != "gate":
                moved = moved * signs.view(-1, *[1] * (moved.ndim - 1))
            tensor.copy_(moved)

    groups, size = parts["key"][0].shape[:2]
    shared = len(parts["query"][0]) // groups
    movable = model_type != "olmo2"  # its norms have a weight for each head
    group_places = torch.randperm(groups, generator=generator).roll(1) if movable else torch.arange(groups)
    old = {role: [tensor.clone() for tensor in parts[role]] for role in ("query", "key", "value", "output")}
    for group, place in enumerate(group_places.tolist()):
        turn, mix = random_turn(model_type, size, generator), random_rotation(size, generator)
        for new, before in zip(parts["key"], old["key"], strict=True):
            new[place] = turn @ before[group]
        for new, before in zip(parts["value"], old["value"], strict=True):
            new[place] = mix @ before[group]
        head_places = torch.randperm(shared, generator=generator) if movable else torch.arange(shared)
        for head, head_place in enumerate(head_places.tolist()):
            for role, by in (("query", turn), ("output", mix)):
                for new, before in zip(parts[role], old[role], strict=True):
                    new[place * shared + head_place] = by @ before[group * shared + head]


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def random_turn(model_type: str, size: int, generator: torch.Generator) -> Tensor:
    """What queries and keys may be multiplied by, by family."""
    if model_type in ("gpt2", "gpt_neo", "opt"):  # no positions in attention
        return random_rotation(size, generator)
    turned = size // 4 if model_type == "gpt_neox" else size
    turn = torch.zeros(size, size, dtype=torch.float64)
    for plane in range(turned // 2):
        angle = torch.rand((), generator=generator).item() * 2 * np.pi
        if model_type in ("qwen3", "gemma3_text", "olmo2"):  # a norm follows, which half a circle passes
            angle = np.pi * round(angle)
        at = [plane, plane + turned // 2]
        turn[np.ix_(at, at)] = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn[turned:, turned:] = random_rotation(size - turned, generator)
    return turn


def random_block(symmetries: BlockSymmetries, hidden: int, units: int, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    roles, inner = symmetries.roles, symmetries.heads * symmetries.head_size
    shapes = dict.fromkeys((roles.query, roles.key, roles.value), (inner, hidden)) | {roles.output: (hidden, inner)}
    shapes |= {path: (units, hidden) for path in (roles.gate, roles.up) if path} | {roles.down: (hidden, units)}
    return {f"{path}.weight": torch.randn(s, generator=generator, dtype=torch.float64) for path, s in shapes.items()}


@pytest.mark.parametrize("seed", range(3))
def test_nothing_nearer_exists(seed: int) -> None:
    """Every order and sign of five units, every order of three heads, their turns by scipy and by trying angles."""
    symmetries = BlockSymmetries(roles=ARCHITECTURES["llama"].roles, heads=3, groups=3, head_size=2, rotary_size=2)
    pruned, base = (random_block(symmetries, 4, 5, 10 * seed + other) for other in range(2))
    ours, theirs = (parts_of(tensors, ARCHITECTURES["llama"], symmetries) for tensors in (pruned, base))

    def squared(role: str, mine: Tensor, place: int) -> float:
        return (mine - theirs[role][0][place]).square().sum().item()

    def unit_distance(unit: int, place: int) -> float:
        gate, up, down = (ours[role][0][unit] for role in ("gate", "up", "down"))
        signed = min(squared("up", sign * up, place) + squared("down", sign * down, place) for sign in (1, -1))
        return squared("gate", gate, place) + signed

    def head_distance(head: int, place: int) -> float:
        query, key, value, output = (ours[role][0][head] for role in ("query", "key", "value", "output"))
        mine, base = (
            torch.cat([value, output], 1),
            torch.cat([theirs["value"][0][place], theirs["output"][0][place]], 1),
        )
        mix = torch.from_numpy(orthogonal_procrustes(mine.T.numpy(), base.T.numpy())[0]).T
        turned = [
            squared("query", turn @ query, place) + squared("key", turn @ key, place)
            for angle in np.linspace(0, 2 * np.pi, 1000)
            for turn in [torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])]
        ]
        return min(turned) + squared("value", mix @ value, place) + squared("output", mix @ output, place)

    def best(count: int, cost: Callable[[int, int], float]) -> float:
        costs = [[cost(item, place) for place in range(count)] for item in range(count)]
        orders = itertools.permutations(range(count))
        return min(sum(costs[item][place] for place, item in enumerate(order)) for order in orders)

    nearest = best(5, unit_distance) + best(3, head_distance)
    assert distance(align(pruned, base, symmetries), base) == pytest.approx(nearest, rel=1e-4)


def test_the_same_blocks_give_the_same_bits_and_stay_as_they_were() -> None:
    model = tiny_model("llama-gqa", torch.bfloat16)
    architecture, symmetries = find_architecture(model.config), block_symmetries(model.config)
    pruned, base = (linears_of(block_list(model)[index], architecture) for index in (2, 4))
    before = {name: tensor.clone() for name, tensor in pruned.items()}
    first, second = (align(pruned, base, symmetries) for _ in range(2))
    for name, tensor in first.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, second[name])
        assert torch.equal(pruned[name], before[name])


def test_a_base_that_is_the_block_changes_nothing() -> None:
    model = tiny_model("gpt2")
    architecture = find_architecture(model.config)
    block = linears_of(block_list(model)[2], architecture)
    for name, tensor in align(block, block, block_symmetries(model.config)).items():
        torch.testing.assert_close(tensor, block[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_aligned_replica_of_full_rank_is_its_pruned_block(family: str, tmp_path: Path) -> None:
    """Whatever was turned or changed places: adapters mend all of the difference, biases their own."""
    tiny_model(family).save_pretrained(tmp_path / "source")
    plan = {"format_version": 1, "num_blocks": NUM_BLOCKS, "replicas": [{"block": 2, "base": 4, "rank": FULL_RANK}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    options = PruneOptions.paper(plan=tmp_path / "plan.json", align=True, output_norm="none")
    model, _, _ = prune(str(tmp_path / "source"), options)
    with torch.no_grad():
        expected = load_model(str(tmp_path / "source"))(token_ids()).logits
        torch.testing.assert_close(model(token_ids()).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_scrambled_copy_is_found_again_by_adapters_of_rank_one(tiny_source: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_source))
    mlps = [block_list(model)[i].mlp for i in (2, 4)]
    order = torch.randperm(mlps[0].up_proj.out_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        block_list(model)[2].load_state_dict(block_list(model)[4].state_dict())
        for name in ("gate_proj", "up_proj"):
            getattr(mlps[0], name).weight.copy_(getattr(mlps[1], name).weight[order])
        mlps[0].down_proj.weight.copy_(mlps[1].down_proj.weight[:, order])
    model.save_pretrained(tmp_path / "source")
    plan = {"format_version": 1, "num_blocks": NUM_BLOCKS, "replicas": [{"block": 2, "base": 4, "rank": 1}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    off = []
    for aligned in (False, True):
        options = PruneOptions.paper(plan=tmp_path / "plan.json", align=aligned, output_norm="none")
        compact, _, _ = prune(str(tmp_path / "source"), options)
        with torch.no_grad():
            off.append((compact(token_ids()).logits - model(token_ids()).logits).norm().item())
    assert off[1] < 1e-3 * off[0]
