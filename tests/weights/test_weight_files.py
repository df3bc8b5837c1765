"""What lies in a checkpoint's files: everything that `from_pretrained` finds, and the same faults in the same words."""

import gc
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from families import FAMILIES, tiny_model
from flexigpt import InputError
from flexigpt.model import empty_model
from flexigpt.weights import find_file, load_model, open_empty
from flexigpt.weights.files import FILE_DTYPES, names_in_files, open_weights

UP = "model.layers.3.mlp.up_proj.weight"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edited(source: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a checkpoint in one file whose weights were edited in place."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def set_config(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))


def assert_reads_what_transformers_loads(folder: Path) -> None:
    weights = open_weights(str(folder))
    names = names_in_files(weights, open_empty(str(folder)))
    read = weights.read(names.values())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    parameters = dict(loaded.named_parameters())  # a tied one once
    assert names.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert read[names[name]].dtype == parameter.dtype
        assert torch.equal(read[names[name]], parameter), name


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_found_in_every_family(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    assert_reads_what_transformers_loads(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "opt-norm-before"])
def test_the_prefix_of_the_base_model_may_be_missing_in_the_files(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "whole")
    prefix = f"{model.base_model_prefix}."

    def strip(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix(prefix)] = weights.pop(name)

    folder = edited(tmp_path / "whole", tmp_path / "stripped", strip)
    assert "wte.weight" in open_weights(str(folder)).tensors or family != "gpt2"
    assert_reads_what_transformers_loads(folder)


def test_a_tied_tensor_may_lie_in_the_files_by_either_name_or_both(tmp_path: Path) -> None:
    tiny_model("llama-biases-tied").save_pretrained(tmp_path / "tied")
    for number, names in enumerate(((EMBEDDINGS,), (HEAD,), (EMBEDDINGS, HEAD))):

        def name_it(weights: dict[str, torch.Tensor], names: tuple[str, ...] = names) -> None:
            values = weights.pop(EMBEDDINGS)
            weights.update({name: values.clone() for name in names})

        folder = edited(tmp_path / "tied", tmp_path / str(number), name_it)
        assert_reads_what_transformers_loads(folder)
        assert names_in_files(open_weights(str(folder)), open_empty(str(folder)))[EMBEDDINGS] == names[0]


def test_tensors_lie_where_they_are_said_to(tmp_path: Path) -> None:
    weights = {
        name: torch.arange(-7, 8).to(torch.complex64 if dtype.is_complex else torch.float32).to(dtype)
        for name, dtype in FILE_DTYPES.items()
    }
    weights |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "odd": torch.ones(3, 1, dtype=torch.uint8)}
    save_file(weights, tmp_path / "model.safetensors")
    found = open_weights(str(tmp_path))
    assert found.tensors.keys() == weights.keys()
    content = (tmp_path / "model.safetensors").read_bytes()
    for name, values in weights.items():
        stored = found.tensors[name]
        assert (stored.dtype, stored.shape) == (values.dtype, tuple(values.shape))
        expected = values.reshape(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""
        assert content[stored.start : stored.start + stored.num_bytes] == expected
        assert found.read([name])[name].reshape(-1).view(torch.uint8).numpy().tobytes() == expected


def test_shards_are_read_as_one(tiny_source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_source)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_reads_what_transformers_loads(tmp_path)
    assert (
        sum(stored.num_bytes for stored in open_weights(str(tmp_path)).tensors.values()) == 4 * model.num_parameters()
    )


def test_what_is_read_lies_in_the_file_and_goes_with_its_last_tensor(tmp_path: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux tells what is mapped")

    def memory(kind: str) -> int:
        return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]

    size = 20_000_000
    save_file({name: torch.ones(size // 4) for name in ("a", "b", "c")}, tmp_path / "model.safetensors")
    gc.collect()
    weights = open_weights(str(tmp_path))
    anonymous, file_backed = memory("RssAnon"), memory("RssFile")
    read = weights.read(["a", "b"])
    assert memory("RssFile") - file_backed < size  # not read yet
    assert sum(float(values.sum()) for values in read.values()) == 2 * size // 4
    assert memory("RssFile") - file_backed > 1.9 * size
    assert memory("RssAnon") - anonymous < size / 4
    values = read.pop("a")
    read.clear()
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del values
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert memory("RssFile") - file_backed < size / 4


def fault_truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1000])


def fault_header(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:50] + b"}{" + content[52:])


def fault_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def fault_empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def fault_missing(folder: Path) -> None:
    edited_in_place(folder, lambda weights: [weights.pop(name) for name in (UP, HEAD)])


def fault_no_embeddings_tied(folder: Path) -> None:
    set_config(folder, tie_word_embeddings=True)
    edited_in_place(folder, lambda weights: [weights.pop(name) for name in (EMBEDDINGS, HEAD)])


def fault_shape(folder: Path) -> None:
    edited_in_place(folder, lambda weights: weights.update({UP: torch.zeros(7, 32)}))


def fault_depth(folder: Path) -> None:
    set_config(folder, num_hidden_layers=4)


def fault_tied(folder: Path) -> None:
    set_config(folder, tie_word_embeddings=True)


def fault_several(folder: Path) -> None:
    fault_shape(folder)
    fault_depth(folder)
    fault_tied(folder)


def edited_in_place(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    copy = edited(folder, folder.with_name("edited"), edit)
    shutil.rmtree(folder)
    copy.rename(folder)


FAULTS = [value for name, value in sorted(globals().items()) if name.startswith("fault_")]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_as_load_model_tells_them(
    tiny_source: Path, tmp_path: Path, fault: Callable[[Path], None]
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_source, folder)
    fault(folder)
    with pytest.raises(InputError) as expected:
        load_model(str(folder))
    with pytest.raises(InputError) as raised:
        names_in_files(open_weights(str(folder)), open_empty(str(folder)))
    assert str(raised.value) == str(expected.value)
    assert "\n" not in str(raised.value)


def test_a_tensor_that_is_there_with_and_without_the_prefix_is_refused(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "whole")
    folder = edited(tmp_path / "whole", tmp_path / "two", lambda w: w.update({"ln_f.bias": torch.zeros(32)}))
    with pytest.raises(InputError, match=r"hold transformer\.ln_f\.bias twice"):
        names_in_files(open_weights(str(folder)), open_empty(str(folder)))


INDEX_FAULTS: dict[str, Callable[[str], str]] = {
    "names model.norm.weight twice": lambda text: text.replace(
        '"weight_map": {', '"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors",'
    ),
    "is not JSON": lambda text: text[:-9],
    "has no weight_map": lambda text: text.replace("weight_map", "map"),
    "names ../x.safetensors, which lies outside": lambda text: text.replace(
        "model-00001-of", "../x.safetensors#"
    ).replace("#-00002.safetensors", ""),
    "names gone.safetensors, which is not there": lambda text: text.replace(
        "model-00001-of-00002.safetensors", "gone.safetensors"
    ),
    "places model.nothing in model-00001-of-00002.safetensors, which does not hold it": lambda text: text.replace(
        '"weight_map": {', '"weight_map": {"model.nothing": "model-00001-of-00002.safetensors",'
    ),
}


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory, tiny_source: Path) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "model"
    AutoModelForCausalLM.from_pretrained(tiny_source).save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


@pytest.mark.parametrize("reason", INDEX_FAULTS)
def test_an_index_that_cannot_be_trusted_is_refused(two_shards: Path, tmp_path: Path, reason: str) -> None:
    shutil.copytree(two_shards, tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(INDEX_FAULTS[reason](index.read_text()))
    with pytest.raises(InputError, match=re.escape(reason)) as raised:
        open_weights(str(tmp_path / "model"))
    assert "\n" not in str(raised.value)


def test_a_tensor_in_two_shards_is_refused(two_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(two_shards, tmp_path / "model")
    second = tmp_path / "model" / "model-00002-of-00002.safetensors"
    first = open_weights(str(two_shards)).tensors
    name = min(name for name in first if first[name].file.name != second.name)
    save_file(load_file(second) | {name: torch.zeros(4)}, second)
    with pytest.raises(InputError, match=rf"hold {re.escape(name)} twice, in model-00001-of-00002"):
        open_weights(str(tmp_path / "model"))


def test_a_dtype_that_torch_does_not_know_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with pytest.raises(InputError, match="hold a as F6_E2M3, which cannot be read"):
        open_weights(str(tmp_path))


def test_files_that_change_under_the_reader_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, file)
    weights = open_weights(str(tmp_path))
    save_file({"a": torch.ones(5)}, file)
    with pytest.raises(InputError, match="changed while they were being read"):
        weights.read(["a"])
    file.unlink()
    with pytest.raises(InputError, match="cannot be opened"):
        weights.read(["a"])


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no weights: neither model\.safetensors nor its index is there"):
        open_weights(str(tmp_path))


def test_pickled_weights_are_refused_with_the_command_that_converts_them(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "it's pickled"
    shutil.copytree(tiny_source, folder)
    weights = {name: t.to(torch.float16) for name, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    set_config(folder, dtype="float16")
    with pytest.raises(InputError, match=r"pickled weights only \(pytorch_model\.bin\), which can run code") as raised:
        open_weights(str(folder))
    message = str(raised.value)
    assert "\n" not in message
    python, option, code = shlex.split(re.search("`(.*)`", message)[1])  # type: ignore[index]
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # in this process, which has all that takes seconds to import
    converted = tmp_path / "it's pickled-safetensors"
    assert message.endswith(f"and give {converted.name}")
    assert (converted / "tokenizer.json").is_file()
    found = open_weights(str(converted))
    read = found.read(found.tensors)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], values) for name, values in weights.items())


def test_the_fingerprint_follows_every_change(two_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(two_shards, folder)  # with the times of the last change
    shard = folder / "model-00001-of-00002.safetensors"
    seen = [open_weights(str(two_shards)).fingerprint]
    assert open_weights(str(folder)).fingerprint == seen[0]
    assert re.fullmatch("[0-9a-f]{16}", seen[0])
    set_config(folder, rope_theta=5.0)
    seen.append(open_weights(str(folder)).fingerprint)
    (folder / "model.safetensors.index.json").write_text((folder / "model.safetensors.index.json").read_text() + " ")
    seen.append(open_weights(str(folder)).fingerprint)
    os.utime(shard, ns=(0, 0))
    seen.append(open_weights(str(folder)).fingerprint)
    weights = load_file(shard)
    weights[min(weights)].view(-1)[0] += 1
    save_file(weights, shard, metadata={"format": "pt"})
    os.utime(shard, ns=(0, 0))
    seen.append(open_weights(str(folder)).fingerprint)
    assert len(set(seen)) == len(seen)


def test_of_a_hub_model_the_cache_serves_without_a_connection(
    two_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suite runs offline; the cache is laid out as huggingface_hub does."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--model" / "snapshots" / commit
    shutil.copytree(two_shards, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    assert find_file("someone/model", "config.json") == snapshot / "config.json"
    assert find_file("someone/model", "record.json") is None
    (snapshot / "model-00003-of-00003.safetensors").write_text("no shard that the index names")
    weights = open_weights("someone/model")
    assert weights.tensors.keys() == open_weights(str(two_shards)).tensors.keys()
    names = names_in_files(weights, empty_model(open_empty(str(two_shards)).config))
    assert torch.equal(weights.read([names[UP]])[names[UP]], load_model(str(two_shards)).get_parameter(UP))
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"names model-00002-of-00002\.safetensors, which is not there"):
        open_weights("someone/model")
    (snapshot / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"someone/model holds no weights: .* without a connection, in the cache"):
        open_weights("someone/model")
    (snapshot / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"someone/model holds pickled weights only .*model-safetensors"):
        open_weights("someone/model")
    with pytest.raises(InputError, match="no such folder: a/b/c"):
        open_weights("a/b/c")
