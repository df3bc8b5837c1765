"""Nothing in a model's folder is passed over: what flexigpt does not read, or reads otherwise, is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import Run
from families import tiny_model, token_ids
from flexigpt import InputError
from flexigpt.weights import Source, load_model, load_tokenizer, read_config

UP = "model.layers.3.mlp.up_proj.weight"
Weights = dict[str, torch.Tensor]


def changed(source: Path, folder: Path, change: Callable[[Weights], object]) -> Path:
    """A copy of a model whose weights were changed in place."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: values.contiguous() for name, values in weights.items()}, folder / "model.safetensors")
    return folder


def to_fp8(weights: Weights) -> None:
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale[None]


def to_int8(weights: Weights) -> None:
    scale = weights[UP].abs().amax(1, keepdim=True) / 127
    weights[UP] = (weights[UP] / scale).round().to(torch.int8)
    weights[f"{UP}_scale"] = scale


def to_bare_int32(weights: Weights) -> None:
    weights[UP] = (weights[UP] * 1000).to(torch.int32)


def with_norms(weights: Weights) -> None:
    weights |= {f"model.layers.{block}.self_attn.q_norm.weight": torch.ones(8) for block in range(6)}


def with_prefix(weights: Weights) -> None:
    for name in list(weights):
        weights[f"_orig_mod.{name}"] = weights.pop(name)


def with_a_head_of_values(weights: Weights) -> None:
    weights["v_head.summary.weight"] = torch.ones(1, 32)


@pytest.mark.parametrize("opened", [Source, load_model])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (to_fp8, r"hold model\.layers\.0\.mlp\.down_proj\.weight as float8_e4m3fn, .*: give the model unquantised"),
        (to_int8, rf"hold {UP} as int8, which are no weights without their scales"),
        (to_bare_int32, f"hold {UP} as int32"),
        (with_norms, r"no place for 6 tensors of the weights, model\.layers\.0\.self_attn\.q_norm\.weight among them"),
        (with_prefix, r"lack 57 tensors, .*no place for, _orig_mod\.lm_head\.weight among them: rename them"),
        (with_a_head_of_values, r"no place for 1 tensors of the weights, v_head\.summary\.weight"),
    ],
)
def test_a_tensor_that_nobody_reads_is_named(
    tiny_source: Path, tmp_path: Path, change: Callable[[Weights], None], line: str, opened: Callable[[str], object]
) -> None:
    with pytest.raises(InputError, match=line) as raised:
        opened(str(changed(tiny_source, tmp_path / "model", change)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("family", "name", "values"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
        ("gpt2", "transformer.h.0.attn.bias", torch.ones(1, 1, 128, 128, dtype=torch.bool)),
        ("gpt2", "transformer.h.0.attn.masked_bias", torch.tensor(-1e4)),
        ("gpt_neo", "transformer.h.1.attn.attention.bias", torch.ones(1, 1, 128, 128, dtype=torch.uint8)),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias", torch.ones(1, 1, 128, 128, dtype=torch.bool)),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", torch.ones(1)),
    ],
)
def test_what_older_versions_stored_and_every_model_computes_is_no_loss(
    family: str, name: str, values: torch.Tensor, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path / "saved")
    folder = str(changed(tmp_path / "saved", tmp_path / "older", lambda weights: weights.update({name: values})))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(input_ids=token_ids()).logits
        assert torch.equal(load_model(folder)(input_ids=token_ids()).logits, expected)
    assert len(Source(folder)) == 6


COMMANDS = [
    "inspect MODEL",
    "eval MODEL --perplexity TEXT",
    "generate MODEL --prompt a",
    "prune MODEL OUT --blocks 2 --preset paper",
    "extend MODEL OUT --blocks 1:3",
    "recover MODEL OUT --data TEXT --tokens 1K",
    "benchmark MODEL",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_peft_adapter_beside_the_weights_is_not_left_out_in_silence(
    command: str, tiny_source: Path, tmp_path: Path, text: Path, run: Run
) -> None:
    shutil.copytree(tiny_source, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    places = {"MODEL": tmp_path / "model", "OUT": tmp_path / "out", "TEXT": text}
    code, _, error = run(*(places.get(word, word) for word in command.split()))
    assert code == 2
    assert error.endswith(
        "holds a PEFT adapter (adapter_config.json), not a model alone: merge it into its base first\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("opened", [read_config, load_model, load_tokenizer])
def test_code_that_comes_with_a_model_is_never_run(
    tiny_source: Path, tmp_path: Path, opened: Callable[[str], object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does anybody ask whether it may: of a family that is known, our own transformers' code is taken."""
    folder, touched = tmp_path / "model", tmp_path / "touched"
    shutil.copytree(tiny_source, folder)
    (folder / "modeling_evil.py").write_text(f"from pathlib import Path\nPath({str(touched)!r}).touch()\n")
    code = {"AutoConfig": "modeling_evil.A", "AutoModelForCausalLM": "modeling_evil.B"}
    tokenizer_code = {"AutoTokenizer": ["modeling_evil.C", None]}
    for name, new in (("config.json", code), ("tokenizer_config.json", tokenizer_code)):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | {"auto_map": new}))
    opened(str(folder))  # of a family that transformers knows
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"tokenizer_class": "Evil"}))
    with pytest.raises(InputError, match="code") as raised:
        opened(str(folder))
    assert "\n" not in str(raised.value)
    assert not touched.exists()
    assert not capsys.readouterr().out
