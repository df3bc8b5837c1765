"""Commands killed at random moments, and started again: the bytes of an undisturbed run, and nothing left over.

FLEXIGPT_KILLS says how often (default 60, some minutes), FLEXIGPT_SEED with which seed.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from forks import Forks, Runner

KILLS, SEED = int(os.environ.get("FLEXIGPT_KILLS", "60")), int(os.environ.get("FLEXIGPT_SEED", "0"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
RECORDS = ("record.json", "evaluation.json")
WITHOUT = (*RECORDS, "README.md")  # hold times, memory and the command


@pytest.fixture(scope="module")
def runner(forks: Forks) -> Runner:
    return Runner(forks)


def content(out: Path) -> dict[str, Any]:
    """Every file's bytes; of the record all but times, memory and the command."""
    found: dict[str, Any] = {
        path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.name not in WITHOUT
    }
    records = (out / name for name in RECORDS if (out / name).exists())
    return found | {path.name: steady(json.loads(path.read_text())) for path in records}


def steady(data: Any) -> Any:
    if isinstance(data, dict):
        varies = ("seconds", "stages", "command", "tokens_per_second", "peak_bytes")
        return {key: steady(value) for key, value in data.items() if key not in varies}
    return [steady(value) for value in data] if isinstance(data, list) else data


@pytest.fixture(scope="module")
def places(runner: Runner, example: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six blocks of the shipped model, a compact model of them, and the beginning of its text."""
    made = tmp_path_factory.mktemp("made")
    (made / "work").mkdir()
    text = made / "text.jsonl"
    rows = [json.loads(line) for line in (example / "calibration.jsonl").read_text().splitlines()[:8]]
    text.write_text("".join(json.dumps({"text": row["text"][:2000]}) + "\n" for row in rows))
    removed = ",".join(map(str, range(5, 15)))
    cut = ["prune", str(example), "source", "--remove", "--preset", "paper", "--blocks", removed]
    shared = ["prune", "source", "compact", "--preset", "paper", "--blocks", "2,4", "--rank", "4"]
    for command in (cut, shared):
        code, _, said = runner(made, command)
        assert code == 0, said
    return {name: made / "work" / name for name in ("source", "compact")} | {"text": text}


@pytest.fixture
def commands(places: dict[str, Path]) -> dict[str, list[str]]:
    """What each writes to `out`, but for eval, which records there."""
    source, compact, text = places["source"], places["compact"], places["text"]
    calibrated = ["--calibration", str(text), "--window-length", "64", "--windows", "8", "--perplexity", str(text)]
    trained = ["--data", str(text), "--window-length", "16", "--batch-tokens", "64", "--tokens", "3200"]
    paper = ["prune", str(source), "out", "--ratio", "0.4", "--rank", "4", "--preset", "paper"]
    return {
        "prune": [*paper, *calibrated],
        "units": ["prune", str(source), "out", "--ratio", "0.4", *calibrated],
        "refit": [*paper, "--refit-kept", *calibrated],
        "remove": ["prune", str(source), "out", "--remove", "--ratio", "0.4", *calibrated],
        "extend": ["extend", str(source), "out", "--blocks", "1:4", "--rank", "2"],
        "recover": ["recover", str(compact), "out", *trained],
        "eval": ["eval", "out", "--perplexity", str(text), "--window-length", "64", "--record"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune", "refit", "units", "remove", "extend", "recover", "eval"])
def test_a_command_that_was_killed_ends_with_the_same_bytes(
    runner: Runner, commands: dict[str, list[str]], places: dict[str, Path], tmp_path: Path, name: str
) -> None:
    def begin(place: Path) -> Path:
        (place / "work").mkdir(parents=True)
        if name == "eval":
            shutil.copytree(places["compact"], place / "work" / "out")
        return place

    rng, command = random.Random(f"{SEED} {name}"), commands[name]
    undisturbed = begin(tmp_path / "undisturbed")
    assert runner(undisturbed, ["--version"])[0] == 0  # all is imported
    began = time.monotonic()
    code, _, said = runner(undisturbed, command)
    assert code == 0, said
    takes, expected = time.monotonic() - began, content(undisturbed / "work" / "out")
    left = KILLS // 5
    for trial in range(left):
        place = begin(tmp_path / str(trial))
        for _ in range(min(left, rng.choice([1, 1, 2, 3]))):
            left -= 1
            how = rng.choice(SIGNALS)
            code, _, said = runner(place, [*command, *resumed(place)], how, rng.uniform(0, 1.1 * takes))
            assert code in (0, 2, -how), said
            # What libraries do as Python ends, after the command has, is not the command's.
            assert "Traceback" not in said.partition("Exception ignored in atexit")[0], said
        again = [*command, *resumed(place)]
        code, _, said = runner(place, again)
        if code == 2 and "is not empty" in said:  # it had been written when the last kill came
            if name == "recover" and (place / "work" / "out.recovery").exists():
                code, _, said = runner(place, [*again, "--overwrite"])
            else:
                code = 0
        assert code == 0, said
        found = content(place / "work" / "out")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == value, key
        assert [path.name for path in (place / "work").iterdir()] == ["out"]
        kept = [path.name for path in (place / "cache").rglob("*")] if (place / "cache").exists() else []
        assert [one for one in kept if not one.endswith(".json")] == []
        shutil.rmtree(place)
        if left <= 0:
            break


def resumed(place: Path) -> list[str]:
    return ["--resume"] if list((place / "work").glob("out.recovery/run.json")) else []
