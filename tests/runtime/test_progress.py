"""Work on several cores: the same results in the same order."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import Run
from flexigpt.replicas import truncated_svd
from flexigpt.runtime import in_parallel


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_without_gradients(workers: int) -> None:
    weight = torch.ones(3, requires_grad=True)
    results = list(in_parallel((partial(torch.mul, weight, k) for k in range(7)), workers))
    assert [result[0].item() for result in results] == list(range(7))
    assert not any(result.requires_grad for result in results)


def test_work_overlaps_and_no_more_is_begun_than_was_asked_for() -> None:
    together, begun = threading.Barrier(2, timeout=60), []

    def task(number: int) -> int:
        begun.append(number)
        together.wait()  # breaks where the two do not run at the same time
        return number

    results = in_parallel((partial(task, number) for number in range(6)), 2)
    assert next(results) == 0
    assert len(begun) <= 3
    assert list(results) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_task_raises_is_raised(workers: int) -> None:
    results = in_parallel((partial(divmod, 1, number) for number in (1, 0, 1)), workers)
    assert next(results) == (1, 0)
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.usefixtures("two_threads")
def test_factors_do_not_depend_on_the_number_of_threads() -> None:
    """Of weights whose products torch would spread over its threads."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(900, 800, generator=generator) for _ in range(3)]
    spread = list(in_parallel((partial(truncated_svd, weight, 40) for weight in weights), 2))
    torch.set_num_threads(1)
    alone = list(in_parallel((partial(truncated_svd, weight, 40) for weight in weights), 1))
    assert all(
        torch.equal(*pair) for one, other in zip(spread, alone, strict=True) for pair in zip(one, other, strict=True)
    )


@pytest.mark.usefixtures("two_threads")
def test_pruning_on_two_cores_writes_the_same_bytes(
    run: Run, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--blocks", "1,3", "--rank", 3, "--preset", "paper"]
    for name, threads in (("two", 2), ("one", 1)):
        torch.set_num_threads(threads)
        monkeypatch.setenv("FLEXIGPT_CACHE", str(tmp_path / f"cache-{name}"))
        assert run("prune", tiny_source, tmp_path / name, *options)[0] == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
