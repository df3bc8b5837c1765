"""What is read, changed at random: each command ends well or with one line, and writes nowhere else.

FLEXIGPT_MUTATIONS says how many (default 200, some minutes), FLEXIGPT_SEED with which seed.
"""

import copy
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forks import Forks, Runner

MUTATIONS, SEED = int(os.environ.get("FLEXIGPT_MUTATIONS", "200")), int(os.environ.get("FLEXIGPT_SEED", "0"))

HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 64, 10**6, 10**18, -(10**18), 10**400, 0.5, -0.5, 1e-45, 1e308),
    *(float("nan"), float("inf"), "", "x", "1", "a[/b]", "x" * 5000, "../x", "/etc/passwd", "~", "\x1b[31m", "é\u2028"),
    *([], {}, [[]], [1, 2, 3], {"1": 2}, {"a": None}, [None], "float16", "bfloat16", "llama", "gpt2", "flexigpt"),
]


def places_in(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all that JSON holds."""
    if path:
        yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places_in(value, (*path, key))


def changed_json(data: Any, rng: random.Random) -> Any:
    """JSON of which one to three places were removed, renamed, repeated or given another value."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(places_in(data))
        if not places:
            return rng.choice(HOSTILE)
        *before, last = rng.choice(places)
        parent = data
        for key in before:
            parent = parent[key]
        how = rng.random()
        if how < 0.2:
            del parent[last]
        elif how < 0.35 and isinstance(parent, dict):
            parent[str(rng.choice(HOSTILE))] = parent.pop(last)
        elif how < 0.45 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        elif how < 0.6 and isinstance(parent[last], int | float) and not isinstance(parent[last], bool):
            parent[last] = rng.choice([parent[last] + 1, parent[last] - 1, parent[last] * 2, str(parent[last])])
        else:
            parent[last] = copy.deepcopy(rng.choice(HOSTILE))
    return data


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes of which some were exchanged, removed or inserted."""
    found = bytearray(content)
    for _ in range(rng.choice([1, 3, 20])):
        place, how = rng.randrange(len(found) + 1), rng.random()
        if how < 0.4 and place < len(found):
            found[place] = rng.randrange(256)
        elif how < 0.6:
            del found[place : place + rng.choice([1, 7, 1000])]
        elif how < 0.9:
            found[place:place] = rng.choice([b"\0", b"\xff\xfe", b"\n", b'"', b"{", b"\xef\xbb\xbf", b"x" * 3000])
        else:
            del found[place:]
    return bytes(found)


def change_file(path: Path, rng: random.Random) -> None:
    """Any file: JSON mostly as such, a safetensors file mostly in its header."""
    content = path.read_bytes()
    if path.suffix == ".safetensors" and rng.random() < 0.8:
        length = int.from_bytes(content[:8], "little")
        header = json.dumps(changed_json(json.loads(content[8 : 8 + length]), rng)).encode()
        length = len(header) if rng.random() < 0.9 else rng.choice([0, 1, len(header) + 9, 2**40, 2**63])
        content = length.to_bytes(8, "little") + header + content[8 + len(header) :]
    elif path.suffix == ".json" and rng.random() < 0.8:
        content = json.dumps(changed_json(json.loads(content), rng)).encode()
    else:
        content = changed_bytes(content, rng)
    path.write_bytes(content)


class Case:
    """What a command reads, and the command."""

    def __init__(self, files: list[str], command: list[str], begin: Callable[[Path], None]) -> None:
        self.files, self.command, self.begin = files, command, begin


@pytest.fixture(scope="module")
def runner(forks: Forks) -> Runner:
    return Runner(forks)


def text_file(folder: Path) -> None:
    (folder / "text.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * 400)


@pytest.fixture(scope="module")
def cases(
    runner: Runner, tiny_source: Path, tiny_compact: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Case]:
    made = tmp_path_factory.mktemp("made")
    (made / "work").mkdir()
    text_file(made / "work")
    source, compact = (shutil.copytree(path, made / name) for path, name in ((tiny_source, "s"), (tiny_compact, "c")))
    measured = ["--perplexity", "text.txt", "--window-length", "32"]
    pruned = ["prune", "model", "out", "--preset", "paper", *measured]
    calibrated = ["--ratio", "0.4", "--rank", "4", "--calibration", "text.txt", "--windows", "4"]
    trained = ["recover", "model", "out", "--data", "text.txt", "--window-length", "16", "--batch-tokens", "64"]
    trained += ["--tokens", "6400"]
    assert runner(made, ["prune", str(source), "planned", "--plan-only", *calibrated, "--window-length", "32"])[0] == 0

    def with_model(path: Path) -> Callable[[Path], None]:
        def begin(place: Path) -> None:
            shutil.copytree(path, place / "work" / "model")
            text_file(place / "work")

        return begin

    def with_plan(place: Path) -> None:
        with_model(source)(place)
        shutil.copy(made / "work" / "planned" / "plan.json", place / "work" / "plan.json")

    def with_cache(place: Path) -> None:
        with_model(source)(place)
        assert runner(place, [*pruned, *calibrated])[0] == 0
        shutil.rmtree(place / "work" / "out")

    def with_a_run(place: Path) -> None:
        with_model(compact)(place)
        for seconds in (1.0, 2.0, 4.0, 0.5, 8.0):
            runner(place, [*trained, "--overwrite"], signal.SIGTERM, seconds)
            if list((place / "work").glob("out.recovery/checkpoint-*")):
                return
        raise AssertionError("no checkpoint was left")

    of_model = ["model/config.json", "model/model.safetensors", "model/tokenizer_config.json", "model/tokenizer.json"]
    of_model += ["model/generation_config.json", "text.txt"]
    return {
        "inspect a source": Case(of_model[:2], ["inspect", "model"], with_model(source)),
        "inspect a compact model": Case(
            [*of_model[:2], "model/record.json"], ["inspect", "model"], with_model(compact)
        ),
        "eval a source": Case(of_model, ["eval", "model", *measured, "--json"], with_model(source)),
        "eval a compact model": Case(of_model, ["eval", "model", *measured, "--json"], with_model(compact)),
        "report": Case(["model/config.json", "model/record.json"], ["report", "model"], with_model(compact)),
        "prune": Case(of_model, [*pruned, *calibrated], with_model(source)),
        "prune by a plan": Case(["plan.json"], [*pruned, "--plan", "plan.json"], with_plan),
        "prune with a cache": Case(["../cache"], [*pruned, *calibrated], with_cache),
        "recover": Case([*of_model, "model/record.json"], trained, with_model(compact)),
        "recover --resume": Case(["out.recovery"], [*trained, "--resume"], with_a_run),
    }


def listing(place: Path) -> dict[str, tuple[int, int]]:
    """All files but those that a command may write."""
    mine = ("cache/", "work/out", "work/model/report", "work/model/figures", "printed", "errors")
    names = {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}
    states = {name: path.stat() for name, path in names.items() if not name.startswith(mine)}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


NAMES = (
    *("inspect a source", "inspect a compact model", "eval a source", "eval a compact model", "report"),
    *("prune", "prune by a plan", "prune with a cache", "recover", "recover --resume"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_ends_well_or_with_one_line(runner: Runner, cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    case, faults = cases[name], []
    (tmp_path / "start" / "work").mkdir(parents=True)
    case.begin(tmp_path / "start")
    for number in range(MUTATIONS // len(NAMES)):
        rng = random.Random(f"{SEED} {name} {number}")
        place = tmp_path / "place"
        shutil.copytree(tmp_path / "start", place)
        there = [place / "work" / file for file in case.files]
        files = [file for one in there for file in (sorted(one.rglob("*")) if one.is_dir() else [one])]
        file = rng.choice([file for file in files if file.is_file()])
        before = file.read_bytes()
        change_file(file, rng)
        seen = listing(place)
        code, printed, said = runner(place, ["-q", *case.command])
        lines = said.splitlines()
        fine = code == 0 or (code == 2 and len(lines) == 1 and lines[0].startswith("flexigpt: "))
        if code == 2 and (place / "work" / "out").exists():
            fine = False
        if code == 0 and "--json" in case.command:
            fine = json.loads(printed)["models"][0]["perplexity"]["perplexity"] > 0
        if not fine or listing(place) != seen:
            what = f"{number} {file.name}: rc {code}: {said[-400:]}"
            if file.suffix == ".json" and len(before) < 20_000:
                what += f"\n{file.read_bytes()[:20_000]!r}"
            faults.append(what)
        shutil.rmtree(place)
    assert not faults, "\n\n".join(faults)
