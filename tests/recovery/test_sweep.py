"""--lr auto: which rates are tried, what each is worth, and that the run at the best one is as if it had been given."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recover import WINDOW, WINDOWS, assert_same, quick
from test_training import mark_trained

import textbook
from flexigpt import InputError, recover
from flexigpt.record import Record
from flexigpt.recovery import sweep
from flexigpt.recovery.sweep import best_of, next_rate

EACH, JUDGING = 5, 4  # steps of a trial, and batches of 4 windows that it is judged on


def trial(lr: float, loss: float | None) -> dict[str, Any]:
    return {"lr": lr, "loss": loss, "losses": [1.0]}


@pytest.mark.parametrize(
    ("worth", "tried", "best"),
    [
        (lambda lr: 1 + abs(lr - 4e-3), [4e-3, 2e-3, 8e-3], 4e-3),
        (lambda lr: 1 + abs(lr - 2e-3), [4e-3, 2e-3, 1e-3], 2e-3),
        (lambda lr: 1 + 10 * lr, [4e-3, 2e-3, 1e-3, 5e-4], 5e-4),
        (lambda lr: 1 - lr, [4e-3, 2e-3, 8e-3, 16e-3], 16e-3),
        (lambda lr: 1 + lr / 10, [4e-3, 2e-3, 8e-3], 4e-3),
        (lambda lr: None if lr > 1e-3 else 1 + lr, [4e-3, 2e-3, 1e-3, 5e-4], 1e-3),
    ],
    ids=["middle", "below", "low", "high", "hardly apart", "given up"],
)
def test_the_search_goes_where_it_gets_better(
    worth: Callable[[float], float | None], tried: list[float], best: float
) -> None:
    trials: list[dict[str, Any]] = []
    while (rate := next_rate(trials)) is not None:
        trials.append(trial(rate, worth(rate)))
    assert [one["lr"] for one in trials] == pytest.approx(tried)
    found = best_of(trials)
    assert found is not None
    assert found["lr"] == pytest.approx(best)


def test_no_rate_is_told() -> None:
    with pytest.raises(InputError, match=r"found no rate: the loss is not finite at 0\.0005, 0\.001, 0\.002, 0\.004"):
        next_rate([trial(lr, None) for lr in (4e-3, 2e-3, 1e-3, 5e-4)])


@pytest.fixture(scope="module")
def found(tiny_compact: Path, single: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record, list[str]]:
    """A run whose rate was found, its record, and the lines before its first step."""
    out, lines = tmp_path_factory.mktemp("found") / "out", list[str]()
    record = recover(str(tiny_compact), out, quick(single, lr="auto", warmup=0.4), note=lines.append)
    assert record is not None
    return out, record, lines


def test_each_rate_is_worth_what_the_textbook_says(
    found: tuple[Path, Record, list[str]], tiny_compact: Path, single: Path
) -> None:
    """Trained from the same start on the first batches, with a whole cosine; the mean loss on the batches after."""
    _, record, _ = found
    batches = textbook.batches_of(textbook.text_ids(single, tiny_compact), WINDOWS, WINDOW, EACH + JUDGING)
    trials = record["recovery"]["trials"]
    assert len(trials) >= 3
    for one in trials:
        model = textbook.opened(tiny_compact)
        mark_trained(model, "replicas+kept", lora_rank=4)
        textbook.train(model, batches[:EACH], steps=EACH, lr=one["lr"], warmup=2)
        with torch.no_grad():
            losses = [textbook.batch_loss(model, batch).item() for batch in batches[EACH:]]
        assert one["loss"] == pytest.approx(sum(losses) / JUDGING, rel=1e-4)
        assert one["steps"] == EACH


def test_the_run_is_the_one_at_the_rate_that_was_found(
    found: tuple[Path, Record, list[str]], tiny_compact: Path, single: Path, tmp_path: Path
) -> None:
    out, record, lines = found
    losses = {one["lr"]: one["loss"] for one in record["recovery"]["trials"]}
    best = 4e-3
    for lr, loss in losses.items():
        best = lr if loss < 0.999 * losses[best] else best
    assert record["options"]["lr"] == best
    recover(str(tiny_compact), tmp_path / "given", quick(single, lr=best, warmup=0.4))
    assert_same(out, tmp_path / "given")
    assert lines[1] == "--lr auto tries up to 4 rates, 5 steps each: 100% of the run at most"
    assert lines[2:] == [*(f"lr {lr:g}: loss {loss:.4f}" for lr, loss in losses.items()), f"trains with --lr {best:g}"]
    assert f"--lr {best} the best of {len(losses)} tried" in (out / "README.md").read_text()
    assert not out.with_name("out.recovery").exists()


def test_a_sweep_that_is_stopped_goes_on_after_the_rates_it_has_tried(
    found: tuple[Path, Record, list[str]], tiny_compact: Path, single: Path, tmp_path: Path
) -> None:
    whole, record, _ = found
    options, out = quick(single, lr="auto", warmup=0.4), tmp_path / "out"

    def stop(line: str) -> None:
        if line.startswith("lr 0.004: loss"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InputError, match="interrupted while learning rates were tried: --resume goes on from there"):
        recover(str(tiny_compact), out, options, note=stop)
    with pytest.raises(InputError, match="holds an unfinished run: go on with --resume"):
        recover(str(tiny_compact), out, options)
    kept = out.with_name("out.recovery") / "trials.json"
    before = kept.read_text()
    kept.write_text(before.replace("0.004", "0.005"))
    with pytest.raises(InputError, match=r"trials\.json is not as it was written"):
        recover(str(tiny_compact), out, options, resume=True)
    kept.write_text(before)
    lines: list[str] = []
    recover(str(tiny_compact), out, options, resume=True, note=lines.append)
    assert not any(line.startswith("lr 0.004:") for line in lines), "it was tried again"
    assert json.loads((out / "record.json").read_text())["recovery"]["trials"] == record["recovery"]["trials"]
    assert_same(out, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_clearly_worse_is_given_up_halfway(
    tiny_compact: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_WORSE", 0.0)
    lines: list[str] = []
    record = recover(str(tiny_compact), tmp_path / "out", quick(single, lr="auto"), note=lines.append)
    assert record is not None
    given_up = [one for one in record["recovery"]["trials"] if one["loss"] is None]
    assert [(one["lr"], one["steps"]) for one in given_up] == [(2e-3, 3), (8e-3, 3)]
    assert "lr 0.008: given up after step 3" in lines
    assert record["options"]["lr"] == 4e-3
