"""Files and folders, complete or untouched; paths as people write them; what tells one thing from another."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexigpt import InputError
from flexigpt.runtime import (
    check_output,
    check_space,
    claimed,
    digest,
    find_device,
    fingerprint,
    local_path,
    read_sealed,
    replace_file,
    replace_sealed,
    replaced_file,
    replaced_folder,
    versions,
)


def test_the_output_is_checked_before_the_work(tmp_path: Path) -> None:
    source, full = tmp_path / "source", tmp_path / "full"
    for folder in (source, full):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    inputs = (str(source), None, "a/hub-name")
    check_output(tmp_path / "new" / "deep", inputs)
    check_output(full, inputs)
    for out, read in ((source, source), (tmp_path, source), (full, full / "plan.json")):
        read.touch()
        with pytest.raises(InputError, match=r"lies in .*, which is to be replaced"):
            check_output(out, (str(source), read))
    for inside in (source / "out", source / "deep" / "out"):
        with pytest.raises(InputError, match=r"out lies in the model .*source, which is read: give a folder outside"):
            check_output(inside, inputs)
    (tmp_path / "texts").mkdir()
    check_output(tmp_path / "texts" / "out", (str(tmp_path / "texts"),))  # whose files alone are read
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, reason in (
        (full / "config.json", "is a file"),
        (full / "config.json" / "out", "is no folder"),
        (tmp_path / "link", "a link to nowhere"),
        (Path("/"), "cannot be replaced"),
        (Path.cwd(), "cannot be replaced"),
        (tmp_path / ("long" * 100), "cannot be written to"),
    ):
        with pytest.raises(InputError, match=reason):
            check_output(out, inputs)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replaced_folder(out) as folder:
        (folder / "a").write_text("first")
    with replaced_folder(out) as folder:
        (folder / "b").write_text("second")
    assert [file.name for file in out.iterdir()] == ["b"]

    def write_half(error: BaseException) -> None:
        with replaced_folder(out) as folder:
            (folder / "c").write_text("half")
            raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            write_half(error())
    assert [file.name for file in out.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_between_the_two_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replaced_folder(out):
        pass
    assert [file.name for file in out.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_one_process_writes_a_place_and_the_other_is_told_which(tmp_path: Path) -> None:
    place = tmp_path / "new" / "out"
    hold = "import sys; from flexigpt.runtime import claimed; held = claimed(sys.argv[1]); held.__enter__()"
    with subprocess.Popen(
        [sys.executable, "-c", f"{hold}; print(flush=True); sys.stdin.read()", place],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for write in (replaced_folder, claimed):
            with pytest.raises(InputError) as refused, write(place):
                pass
            told = rf"{place} is being written by process {other.pid} on \S+ since .*: wait until it has ended, or give"
            assert re.match(told, str(refused.value))
        other.kill()
    with claimed(place), replaced_folder(place):  # it is dead: nothing of it is in the way
        pass
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_what_a_killed_process_left_goes_and_what_it_moved_comes_back(tmp_path: Path) -> None:
    place = tmp_path / "out"
    for step in ("rename(old)", "rename(out)"):
        place.mkdir(exist_ok=True)
        (place / "before").touch()
        code = f"""
import os, sys
from flexigpt.runtime import files
class Out(type(files.Path())):
    def rename(self, target):
        super().rename(target)
        if self.name == {"out" if step == "rename(old)" else "new"!r}: os.kill(os.getpid(), 9)
files.Path = Out
with files.replaced_folder(sys.argv[1]) as folder:
    (folder / "after").touch()
"""
        assert subprocess.run([sys.executable, "-c", code, place], check=False).returncode == -9
        assert [path.name for path in tmp_path.iterdir()] != ["out"]
        with claimed(place):
            assert [path.name for path in place.iterdir()] == (["before"] if step == "rename(old)" else ["after"])
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_nothing_was_written_to_leaves_no_folders(tmp_path: Path) -> None:
    with claimed(tmp_path / "new" / "deep" / "out"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "[" * 100_000, '{"digest": "x", "data": 1}', "1" * 9999, "null"]
)
def test_what_is_sealed_is_read_as_it_was_written_or_not_at_all(tmp_path: Path, content: str) -> None:
    data = {"a": [1, 2.5, float("inf"), None, "\u00e4"], "1": True}
    replace_sealed(tmp_path / "file", data, tmp_path)
    assert read_sealed(tmp_path / "file") == data
    (tmp_path / "file").write_text((tmp_path / "file").read_text().replace("2.5", "2.6"))
    with pytest.raises(ValueError, match="file is not as it was written"):
        read_sealed(tmp_path / "file")
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match=r"^(?!.*\n)"):
        read_sealed(tmp_path / "file")


def test_a_link_to_a_folder_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replaced_folder(tmp_path / "link") as folder:
        (folder / "a").touch()
    assert (tmp_path / "link").is_symlink()
    assert [file.name for file in (tmp_path / "real").iterdir()] == ["a"]


def test_a_disk_that_is_too_small_is_told_before_writing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"MB free, the checkpoint needs 1,000,000,000,000 MB"):
        check_space(tmp_path / "out", 10**18)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with replaced_file(file, tmp_path) as temporary:
        temporary.write_text("first")
        assert not file.exists()

    def write_half() -> None:
        with replaced_file(file, tmp_path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "first")]
    replace_file(tmp_path / "new" / "file", "second")
    assert (tmp_path / "new" / "file").read_text() == "second"
    with pytest.raises(InputError, match="cannot be written"):
        replace_file(file / "below", "third")


@pytest.mark.parametrize("name", ["name", "org/name", "org/name-2.0_b", "a.b", "long" * 24])
def test_a_name_that_is_not_here_may_be_one_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path(name) is None
    (tmp_path / name).mkdir(parents=True)
    assert local_path(name) == Path(name)


PATHS = [
    "/no/such",
    "./x",
    "../x",
    "~/x",
    "~",
    "a/b/c",
    "here/x",
    "x/",
    "./" + "x" * 300,
    "x" * 300,
    "my model",
    "a[/b]",
]


@pytest.mark.parametrize("name", PATHS)
def test_what_can_only_be_a_path_and_is_not_there_is_called_that(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match=r"^no such file or folder: ") as raised:
        local_path(name, "file or folder")
    assert "~" not in str(raised.value)


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    replace_file(Path("~/new/file"), "text")
    assert local_path("~/new/file") == tmp_path / "new" / "file"
    with replaced_folder("~/out") as folder:
        (folder / "record.json").write_text("{}")
    assert (tmp_path / "out" / "record.json").is_file()
    with pytest.raises(InputError, match="which is to be replaced"):
        check_output(tmp_path / "out", ("~/out/record.json",))


def test_digests_tell_values_shapes_and_files_apart(tmp_path: Path) -> None:
    values = torch.arange(6)
    parts = [(values,), (values.view(2, 3),), (values + 1,), (b"a",), (b"a", values), (None,)]
    assert len({digest(*part) for part in parts}) == len(parts)
    assert digest(values.clone()) == digest(values, None)
    files = []
    for name, content in {"a": b"x" * 3 * 2**20, "b": b"x" * 3 * 2**20, "c": b"x" * (3 * 2**20 - 1) + b"y"}.items():
        (tmp_path / name).write_bytes(content)
        files.append(tmp_path / name)
    prints = {fingerprint("name", given) for given in ([], files[:1], files[1:2], files[2:], files)}
    assert len(prints) == 5
    assert fingerprint("other", files) == fingerprint("name", files)
    assert fingerprint("other", []) != fingerprint("name", [])


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta", ""])
def test_devices_that_are_not_there_are_refused(device: str) -> None:
    with pytest.raises(InputError, match="cannot be used here"):
        find_device(device)


def test_versions_are_those_that_are_installed() -> None:
    assert versions("pytest") == json.loads(json.dumps(versions())) | {"pytest": pytest.__version__}
    assert versions()["torch"] == torch.__version__
