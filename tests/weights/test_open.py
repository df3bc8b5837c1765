"""The compact checkpoint on disk: who can open it, what it holds, and what happens when writing fails."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from families import compact_of, initialize_replicas, tiny_model, token_ids
from flexigpt import FlexiGPTForCausalLM, InputError, Plan, PruneOptions, Replica, prune, write_checkpoint
from flexigpt.runtime import check_output
from flexigpt.weights import (
    Source,
    StreamedModel,
    check_finite,
    has_replicas,
    load_model,
    load_tokenizer,
    model_fingerprint,
    open_empty,
    read_config,
)
from forks import Forks

Apart = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def checkpoint(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _, record = prune(str(tiny_source), PruneOptions.paper(blocks=(2, 4), rank=4))
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    write_checkpoint(out, model, record, source=str(tiny_source))
    return out


@pytest.fixture
def run_python(early_forks: Forks) -> Apart:
    """Runs code in a process of its own in which flexigpt cannot be imported."""

    def run(code: str, *arguments: str, modules: Path) -> "subprocess.CompletedProcess[str]":
        blocked = f"import sys; sys.modules['flexigpt'] = None\n{code}"
        return early_forks.run("-c", blocked, *arguments, env=os.environ | {"HF_MODULES_CACHE": str(modules)})

    return run


def test_each_tensor_is_stored_once(checkpoint: Path) -> None:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    loaded = load_model(str(checkpoint))
    assert sum(torch.Size(size).numel() for size in sizes.values()) == loaded.num_parameters()
    assert not [name for name in sizes if ".layers.2." in name and name.endswith("q_proj.weight")]


def test_a_fresh_process_without_flexigpt_opens_it(run_python: Apart, checkpoint: Path, tmp_path: Path) -> None:
    ids = token_ids()
    expected = load_model(str(checkpoint))(ids).logits
    torch.save(ids, tmp_path / "ids.pt")
    code = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.load(sys.argv[2] + "/ids.pt")
torch.save((model(ids).logits, model.generate(ids[:1], max_new_tokens=4, do_sample=False)), sys.argv[2] + "/out.pt")
model.save_pretrained(sys.argv[2] + "/again")
"""
    ran = run_python(code, str(checkpoint), str(tmp_path), modules=tmp_path / "modules")
    assert ran.returncode == 0, ran.stderr
    logits, generated = torch.load(tmp_path / "out.pt")
    assert torch.equal(logits, expected)
    assert generated.shape == (1, ids.shape[1] + 4)
    again = load_model(str(tmp_path / "again"))  # saved by the remote code, opened by the package
    assert torch.equal(again(ids).logits, expected)


def test_without_trust_it_is_a_loud_error(run_python: Apart, checkpoint: Path, tmp_path: Path) -> None:
    code = "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    ran = run_python(code, str(checkpoint), modules=tmp_path / "modules")
    assert ran.returncode != 0
    assert "trust_remote_code" in ran.stderr


def test_after_importing_flexigpt_it_opens_by_itself(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert isinstance(model, FlexiGPTForCausalLM)
    assert model.config.vocab_size == 4096
    assert model.config.hidden_size == 32
    assert model.config.get_text_config().num_hidden_layers == 6
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model.config.nonsense


def test_a_newer_format_version_is_refused_politely(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text()) | {"format_version": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"format version 5, this flexigpt reads versions up to 4: upgrade flexigpt"):
        read_config(str(tmp_path))


def copy_with(source: Path, folder: Path, weights: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_truncated_file_is_named(tiny_source: Path, tmp_path: Path) -> None:
    broken = copy_with(tiny_source, tmp_path / "broken", load_file(tiny_source / "model.safetensors"))
    file = Path(broken) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"the weights of .*broken are damaged"):
        load_model(broken)


def test_missing_tensors_are_not_made_up(tiny_source: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_source / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    with pytest.raises(InputError, match=r"lack model\.layers\.3\.mlp\.up_proj\.weight"):
        load_model(copy_with(tiny_source, tmp_path / "broken", weights))


def test_tensors_without_a_place_are_not_dropped(tiny_source: Path, tmp_path: Path) -> None:
    """A configuration with fewer blocks than the weights have would prune another model."""
    broken = copy_with(tiny_source, tmp_path / "broken", load_file(tiny_source / "model.safetensors"))
    config = json.loads((Path(broken) / "config.json").read_text()) | {"num_hidden_layers": 4}
    (Path(broken) / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"no place for 18 tensors of the weights, model\.layers\.4\.input_layernorm"):
        load_model(broken)


def test_tensors_of_another_shape_are_refused(tiny_source: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_source / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"] = torch.zeros(7, 32)
    with pytest.raises(InputError, match=r"do not fit: .*layers\.3\.mlp\.up_proj\.weight is \(7, 32\) in the file"):
        load_model(copy_with(tiny_source, tmp_path / "broken", weights))


def test_a_head_that_the_configuration_would_tie_away_is_refused(tiny_source: Path, tmp_path: Path) -> None:
    broken = copy_with(tiny_source, tmp_path / "broken", load_file(tiny_source / "model.safetensors"))
    config = json.loads((Path(broken) / "config.json").read_text()) | {"tie_word_embeddings": True}
    (Path(broken) / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="set tie_word_embeddings to false"):
        load_model(broken)


def test_the_dtype_is_read_off_the_weights_where_config_json_names_none(tiny_source: Path, tmp_path: Path) -> None:
    weights = {name: t.to(torch.float16) for name, t in load_file(tiny_source / "model.safetensors").items()}
    half = copy_with(tiny_source, tmp_path / "half", weights)
    config = json.loads((Path(half) / "config.json").read_text())
    del config["dtype"]
    (Path(half) / "config.json").write_text(json.dumps(config))
    assert open_empty(half).dtype == load_model(half).dtype == torch.float16


def test_of_mixed_weights_none_is_rounded_where_config_json_names_no_dtype(tiny_source: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_source / "model.safetensors")
    weights = {name: t.half() if ".mlp." in name else t for name, t in weights.items()}
    mixed = copy_with(tiny_source, tmp_path / "mixed", weights)
    config = json.loads((Path(mixed) / "config.json").read_text())
    del config["dtype"]
    (Path(mixed) / "config.json").write_text(json.dumps(config))
    assert open_empty(mixed).dtype == load_model(mixed).dtype == Source(mixed).model.dtype == torch.float32


@pytest.mark.parametrize("opened", [load_model, Source])
def test_a_damaged_generation_config_is_not_passed_over(
    tiny_source: Path, tmp_path: Path, opened: Callable[[str], object]
) -> None:
    folder = copy_with(tiny_source, tmp_path / "damaged", load_file(tiny_source / "model.safetensors"))
    (Path(folder) / "generation_config.json").write_text("{not json")
    with pytest.raises(InputError, match=r"the generation_config\.json of .*damaged cannot be opened"):
        opened(folder)


@pytest.mark.parametrize(
    ("name", "where"),
    [("model.layers.3.mlp.up_proj.weight", "in block 3"), ("model.embed_tokens.weight", "outside the blocks")],
)
def test_weights_that_are_not_finite_name_the_block(name: str, where: str) -> None:
    source = tiny_model("llama-gqa")
    with torch.no_grad():
        source.get_parameter(name)[0, 0] = float("nan")
    with pytest.raises(InputError, match=f"NaN or infinity {where}"):
        check_finite(StreamedModel(source))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "config.json is not there"),
        ("{", "cannot be opened"),
        ('{"model_type": "nonsense"}', "nonsense"),
        ("null", "cannot be opened"),
        ('{"model_type": "llama", "hidden_size": "abc"}', "a whole number of 1 or more"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "a whole number of 1 or more"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "a whole number of 1 or more"),
        ('{"model_type": "llama", "hidden_act": "nope", "num_hidden_layers": 1}', "cannot be built"),
        ('{"model_type": "llama", "dtype": "float99"}', "cannot be"),
        ('{"model_type": "llama", "num_hidden_layers": 1, "output_attentions": true}', "cannot be built"),
        ('{"model_type": "flexigpt"}', "cannot be"),
        ('{"model_type": "flexigpt", "text_config": "llama"}', "text_config is 'llama'"),
        ('{"model_type": "flexigpt", "format_version": "2"}', "cannot be"),
        (
            '{"model_type": "flexigpt", "text_config": {"model_type": "llama", "num_hidden_layers": 2},'
            ' "replicas": [{"block": 9, "base": 0, "rank": 1}]}',
            "names block 9",
        ),
    ],
)
def test_folders_without_a_model_are_refused(tmp_path: Path, config: str | None, reason: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=reason) as raised:
        open_empty(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["nothing", "nobody/nothing"])
@pytest.mark.parametrize("opened", [read_config, load_model, load_tokenizer, Source])
def test_what_neither_lies_here_nor_on_the_hub_is_one_clear_line(name: str, opened: Callable[[str], object]) -> None:
    with pytest.raises(InputError, match=f"{name} cannot be opened: no such folder here, and on the hub: .+") as raised:
        opened(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["/no/such", "./such", "../such", "~/such", "no/such/one", "here/such", "such/"])
@pytest.mark.parametrize("opened", [read_config, load_model, load_tokenizer, Source, model_fingerprint, has_replicas])
def test_a_path_that_is_not_there_is_called_that(
    name: str, opened: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = Path(name.replace("~", str(tmp_path)))
    with pytest.raises(InputError, match=f"^no such folder: {re.escape(str(shown))}$"):
        opened(name)


def test_the_home_folder_may_be_written_as_a_tilde(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    home = f"~/{checkpoint.name}"
    assert read_config(home).model_type == "flexigpt"
    assert load_model(home).num_parameters() == Source(home).model.num_parameters()
    assert load_tokenizer(home).get_vocab() == load_tokenizer(str(checkpoint)).get_vocab()
    assert model_fingerprint(home) == model_fingerprint(str(checkpoint))
    with pytest.raises(InputError, match="which is to be replaced"):
        check_output(checkpoint, (f"{home}/config.json",))


def test_a_tokenizer_with_settings_of_a_wrong_kind_is_one_clear_line(tiny_source: Path, tmp_path: Path) -> None:
    folder = copy_with(tiny_source, tmp_path / "odd", load_file(tiny_source / "model.safetensors"))
    settings = json.loads((Path(folder) / "tokenizer_config.json").read_text()) | {"model_max_length": "long"}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"the tokenizer of .* cannot be opened"):
        load_tokenizer(folder)


def test_a_missing_tokenizer_is_one_clear_line(tiny_source: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_source / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"the tokenizer of .* cannot be opened"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_of_sentencepiece_is_opened_without_more(tiny_source: Path, text: Path, tmp_path: Path) -> None:
    """As LLaMA's first releases have it: `tokenizer.model`, and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="an environment made before it was depended on")
    (tmp_path / "config.json").write_bytes((tiny_source / "config.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type="bpe", minloglevel=2
    )
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer("the house")["input_ids"]
    assert tokenizer.decode(ids) == "the house"
    assert len(tokenizer) == 400


def test_the_file_is_as_large_as_its_parameters(tmp_path: Path) -> None:
    """Within 0.1 %, at the sizes where a header of some 120 bytes a tensor does not count."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
    )
    source = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plan = Plan(num_blocks=8, replicas=(Replica(block=3, base=2, rank=32), Replica(block=5, base=2, rank=32)))
    model = compact_of(source, plan)
    initialize_replicas(model, source, plan, adapter_init="zero", norm_init=0.05, seed=0)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 1 < size / (2 * model.num_parameters()) < 1.001
