import math
from pathlib import Path

import pytest
import torch

from families import NUM_BLOCKS, block_list, tiny_model, token_ids
from flexigpt import InputError
from flexigpt.calibration import block_means, check_means
from flexigpt.model import find_architecture, weight_matrix
from flexigpt.pruning.distances import BASE_DISTANCES, choose_bases, measure_distances
from flexigpt.pruning.scores import STATISTICS, check_blocks, lowest, num_pruned_at
from flexigpt.weights import StreamedModel
from textbook import naive_truncated, naive_unmended
from workspaces import workspace_of

RANK = 4


def naive_distance(name: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    difference = first - second
    return {
        "low-rank": naive_unmended(first, second, RANK),
        "full-rank": (difference - naive_truncated(difference, RANK)).norm(),
        "frobenius": difference.norm(),
    }[name]


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("name", BASE_DISTANCES)
def test_distances_equal_full_svds_summed_over_linears(family: str, name: str, tmp_path: Path) -> None:
    source = tiny_model(family)
    pruned = (1, 4)
    workspace = workspace_of(source, tmp_path, token_ids(), rank=RANK, base_distance=name)
    measured = measure_distances(workspace, pruned)
    assert list(measured) == [1, 4]
    for block, candidates in measured.items():
        assert list(candidates) == [0, 2, 3, 5]  # only kept blocks
        for candidate, distance in candidates.items():
            expected = sum(
                naive_distance(
                    name,
                    *(
                        weight_matrix(block_list(source)[i].get_submodule(path)).detach().double()
                        for i in (block, candidate)
                    ),
                ).item()
                for path in find_architecture(source.config).linears
            )
            assert distance == pytest.approx(expected, rel=1e-6)


def test_the_base_is_the_candidate_of_least_distance() -> None:
    plan = choose_bases({1: {0: 3.0, 2: 1.0, 3: 2.0}, 4: {0: 1.0, 2: 5.0, 3: 1.0}}, rank=2, num_blocks=5)
    assert [(r.block, r.base, r.rank) for r in plan.replicas] == [(1, 2, 2), (4, 0, 2)]


def test_a_copy_of_a_pruned_block_is_its_base(tmp_path: Path) -> None:
    source = tiny_model("llama-gqa")
    blocks = block_list(source)
    blocks[5].load_state_dict(blocks[2].state_dict())
    for name in BASE_DISTANCES:
        workspace = workspace_of(source, tmp_path, token_ids(), rank=RANK, base_distance=name)
        distances = measure_distances(workspace, (2,))
        assert choose_bases(distances, RANK, NUM_BLOCKS).replicas[0].base == 5


@pytest.mark.parametrize(
    ("ratio", "blocks", "pruned"),
    [(0.3, 32, 9), (0.4, 32, 12), (0.3, 16, 4), (0.29, 100, 29), (0.7, 10, 7), (0.99, 2, 1)],
)
def test_ratio_is_rounded_down_to_blocks(ratio: float, blocks: int, pruned: int) -> None:
    assert num_pruned_at(ratio, blocks) == pruned


def test_a_ratio_that_prunes_nothing_says_which_would() -> None:
    with pytest.raises(InputError, match=r"give at least 0\.063"):
        num_pruned_at(0.05, 16)
    assert num_pruned_at(0.063, 16) == 1


@pytest.mark.parametrize(
    ("blocks", "reason"), [((), "none"), ((6,), "0 to 5"), ((1, 1), "each once"), (range(6), "leaves none")]
)
def test_blocks_that_cannot_be_pruned_are_refused(blocks: tuple[int, ...], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_blocks(tuple(blocks), 6)


def test_lowest_scores_are_pruned_the_earlier_block_first() -> None:
    assert lowest([0.5, 0.1, 0.3, 0.1, 0.1], 2) == (1, 3)


@pytest.mark.parametrize("name", STATISTICS)
def test_scores_against_a_token_by_token_loop(name: str) -> None:
    inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    outputs = inputs + torch.randn(7, 5, generator=torch.Generator().manual_seed(1))

    def naive(x: torch.Tensor, y: torch.Tensor) -> float:
        cosine = (x @ y / (x.norm() * y.norm())).item()
        difference = (y - x).norm() / y.norm()
        return {
            "influence": 1 - cosine,
            "angular": math.acos(cosine) / math.pi,
            "relative-magnitude": difference.item(),
        }[name]

    expected = torch.tensor([naive(x, y) for x, y in zip(inputs, outputs, strict=True)])
    torch.testing.assert_close(STATISTICS[name](inputs, outputs), expected)


def test_calibration_leaves_the_model_as_it_was() -> None:
    source = tiny_model("llama-gqa")
    before = source(token_ids()).logits
    block_means(StreamedModel(source), token_ids(batch=3), STATISTICS)
    assert torch.equal(source(token_ids()).logits, before)


def test_statistics_that_are_not_finite_name_the_block() -> None:
    source = tiny_model("llama-gqa").to(torch.float16)
    with torch.no_grad():
        block_list(source)[3].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(InputError, match="block 3 are not finite"):
        check_means(block_means(StreamedModel(source), token_ids(), STATISTICS)["influence"])
