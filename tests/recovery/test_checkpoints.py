"""The folder of an unfinished run: nothing in it is run, what was changed is told, and what others put there stays."""

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recover import QUICK, TOKENS, assert_same, last_line, quick, stopped_after
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from conftest import Run
from flexigpt import recover
from flexigpt.recovery import checkpoints as kept
from flexigpt.runtime import ALONE, file_digest, read_sealed, replace_sealed
from killing import Killed


@pytest.fixture(scope="module")
def unfinished(tiny_compact: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped_after(6, tiny_compact, text, tmp_path_factory.mktemp("unfinished") / "out")


@pytest.fixture(scope="module")
def whole(tiny_compact: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    recover(str(tiny_compact), out, quick(text))
    return out


class Planted:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def sealed(checkpoint: Path) -> None:
    """As if the checkpoint had been written as it is."""
    files = {path.name: file_digest(path) for path in checkpoint.iterdir() if path.name != "state.json"}
    state = read_sealed(checkpoint / "state.json")
    replace_sealed(checkpoint / "state.json", state | {"files": files}, checkpoint)


@pytest.mark.parametrize("place", ["metadata", "in the metadata", "data", "tensor as data", "tensor"])
def test_a_prepared_checkpoint_runs_no_code(
    run: Run, unfinished: Path, tiny_compact: Path, text: Path, tmp_path: Path, place: str
) -> None:
    """In each place that torch unpickles: what it wrote there is replaced by what makes a folder."""
    shutil.copytree(unfinished.parent, tmp_path, dirs_exist_ok=True)
    checkpoint, made = tmp_path / "out.recovery" / "checkpoint-6", tmp_path / "made"
    planted: Any = Planted(made)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    if place == "metadata":
        metadata = planted
    elif place == "in the metadata":
        metadata.planner_data = planted
    else:
        kinds = metadata.state_dict_metadata
        plain = place == "data"
        name = next(name for name, kind in kinds.items() if isinstance(kind, BytesStorageMetadata) is plain)
        if place == "tensor as data":
            kinds[name] = BytesStorageMetadata()
        file = next(checkpoint.glob("*.distcp"))
        with file.open("ab") as opened:
            start = opened.tell()
            torch.save(planted, opened)
            stored = next(stored for index, stored in metadata.storage_data.items() if index.fqn == name)
            stored.offset, stored.length = start, opened.tell() - start
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    sealed(checkpoint)
    assert made.is_dir() is False
    code, _, errors = run("recover", tiny_compact, tmp_path / "out", "--data", text, *TOKENS, *QUICK, "--resume")
    assert code == 2
    assert f"{checkpoint} cannot be read (" in last_line(errors)
    assert not made.exists()
    pickle.loads(pickle.dumps(planted))
    assert made.exists(), "it would have run"


def test_what_is_sealed_anew_is_read(
    run: Run, unfinished: Path, tiny_compact: Path, text: Path, tmp_path: Path, whole: Path
) -> None:
    """So that the refusals of what is planted mean something."""
    shutil.copytree(unfinished.parent, tmp_path, dirs_exist_ok=True)
    sealed(tmp_path / "out.recovery" / "checkpoint-6")
    code = run("recover", tiny_compact, tmp_path / "out", "--data", text, *TOKENS, *QUICK, "--resume")[0]
    assert code == 0
    assert_same(tmp_path / "out", whole)


@pytest.mark.parametrize("content", [b"", b"\x80", b"[]", b"{}", b'{"digest": 1, "data": {}}', b"[" * 100_000, None])
@pytest.mark.parametrize("name", ["run.json", "checkpoint-6/state.json", "checkpoint-6/.metadata"])
def test_files_of_a_run_that_were_changed_are_told_in_one_line(
    run: Run, unfinished: Path, tiny_compact: Path, text: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    shutil.copytree(unfinished.parent, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "out.recovery" / name
    if content is None:
        content = file.read_bytes()
        content = content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]
    file.write_bytes(content)
    code, _, errors = run("recover", tiny_compact, tmp_path / "out", "--data", text, *TOKENS, *QUICK, "--resume")
    assert code == 2
    assert re.search("(is not as it was written|cannot be read)", last_line(errors))
    progress = ("begins", "done in", "of memory")
    assert [line for line in errors.splitlines() if not any(word in line for word in progress)] == [last_line(errors)]


def test_a_checkpoint_whose_removal_was_killed_counts_no_more(tmp_path: Path) -> None:
    """One that is old, and those of a run that has ended: a half of one would be read."""
    folder = kept.RunFolder(tmp_path / "out", ALONE)
    folder.start({})
    for step in (1, 2):
        folder.save(step, {"values": torch.ones(2)}, {})

    def killed(path: Path, **_: Any) -> None:
        if path.exists():
            raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kept.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            folder.save(3, {"values": torch.ones(2)}, {})
        assert folder.steps() == [2, 3]
        with pytest.raises(Killed):
            folder.remove()
    assert not folder.exists()
    assert folder.steps() == []
    folder.start({})
    folder.remove()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run_of_ours_stays_as_it_is(
    run: Run, unfinished: Path, tiny_compact: Path, text: Path, tmp_path: Path
) -> None:
    """Checkpoints of others are called like ours."""
    mine = tmp_path / "out.recovery" / "checkpoint-500"
    mine.mkdir(parents=True)
    (mine / "weights").touch()
    arguments = ("recover", tiny_compact, tmp_path / "out", "--data", text, *TOKENS, *QUICK)
    for more in ((), ("--overwrite",), ("--resume",)):
        code, _, errors = run(*arguments, *more)
        assert code == 2
        assert f"{tmp_path / 'out.recovery'}" in last_line(errors)
        assert (mine / "weights").is_file()
    shutil.rmtree(mine.parent)
    shutil.copytree(unfinished.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out.recovery" / "notes.txt").touch()
    assert run(*arguments, "--resume")[0] == 0
    assert [path.name for path in (tmp_path / "out.recovery").iterdir()] == ["notes.txt"]
