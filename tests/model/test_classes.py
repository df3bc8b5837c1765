"""What the libraries around ask of the class that `from_pretrained` returns, and the two classes beside it."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from families import FAMILIES, NUM_BLOCKS, compact_of, initialize_replicas, tiny_model, token_ids
from flexigpt import FlexiGPTForCausalLM, Plan, Replica
from flexigpt.model import SharedLinear
from forks import Forks

ABILITIES = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")


def compact(family: str, dtype: torch.dtype = torch.float32) -> FlexiGPTForCausalLM:
    source = tiny_model(family, dtype)
    replicas = (Replica(block=2, base=1, rank=3), Replica(block=4, base=1, rank=3))
    plan = Plan(num_blocks=NUM_BLOCKS, replicas=replicas)
    model = compact_of(source, plan)
    initialize_replicas(model, source, plan, adapter_init="svd", norm_init=0.5, seed=0)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_its_source_can_do(family: str, tmp_path: Path) -> None:
    model = compact(family)
    model.save_pretrained(tmp_path)
    read, source = AutoModelForCausalLM.from_pretrained(tmp_path), tiny_model(family)
    for ability in (*ABILITIES, "_can_compile_fullgraph"):
        assert getattr(read, ability) == getattr(source, ability)
        if family not in ("gemma2", "gpt_neo", "gpt2"):
            assert getattr(type(read), ability) is getattr(type(source), ability) is True
    assert type(read).is_backend_compatible()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_base_model_is_all_below_the_head(family: str, tmp_path: Path) -> None:
    """As it is, and as AutoModel opens it; saved by itself, it opens again."""
    model, ids = compact(family), token_ids()
    hidden = model.base_model(ids).last_hidden_state
    assert getattr(model, model.base_model_prefix) is model.base_model
    expected = model(ids, output_hidden_states=True)
    torch.testing.assert_close(hidden, expected.hidden_states[-1])
    model.save_pretrained(tmp_path / "whole")
    for origin, folder in (("whole", "body"), ("body", "again")):
        body = AutoModel.from_pretrained(tmp_path / origin)
        assert type(body).__name__ == "FlexiGPTModel"
        assert torch.equal(body(ids).last_hidden_state, hidden)
        body.save_pretrained(tmp_path / folder)
    kept = {name for name, _ in body.named_parameters()}
    assert {name for name, _ in model.named_parameters()} - kept <= {"language_model.lm_head.weight"}
    with pytest.raises(ValueError, match="call save_pretrained of the compact model around it"):
        model.base_model.save_pretrained(tmp_path / "alone")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_classifies_like_its_source_or_is_refused_in_words(family: str, tmp_path: Path) -> None:
    """The source's own class around the hidden states; what is trained comes back."""
    model, ids = compact(family), token_ids()
    model.save_pretrained(tmp_path / "whole")
    if type(model.config.text_config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        with pytest.raises(ValueError, match="transformers has no sequence classification for granite"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
        return
    labels = {"num_labels": 3, "pad_token_id": 0}
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", **labels)
    scorer(ids, labels=torch.tensor([0, 2])).loss.backward()
    score = scorer.language_model.score
    assert score.weight.grad.abs().sum() > 0
    scorer.save_pretrained(tmp_path / "scorer")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer")
    with torch.no_grad():
        hidden = model.eval().base_model(ids).last_hidden_state
        torch.testing.assert_close(again(ids).logits, score(hidden[:, -1]))


def test_without_flexigpt_it_opens_with_the_code_beside_it(tmp_path: Path, early_forks: Forks) -> None:
    model = compact("llama-gqa")
    model.save_pretrained(tmp_path)
    names = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(names) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    code = (
        "import sys; sys.modules['flexigpt'] = None\n"
        "import transformers\n"
        f"for name in {sorted(set(names) - {'AutoConfig'})}:\n"
        f"    model = getattr(transformers, name).from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "    print(type(model).__name__, type(model).is_backend_compatible())"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    ran = early_forks.run("-c", code, env=environment)
    assert ran.returncode == 0, ran.stderr
    classes = ("FlexiGPTModel", "FlexiGPTForCausalLM", "FlexiGPTForSequenceClassification")
    assert ran.stdout == "".join(f"{name} True\n" for name in classes)


def test_it_drafts_with_its_own_first_blocks() -> None:
    model, ids = compact("llama-gqa"), token_ids(batch=1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_early_exit=3, **options), expected)


@pytest.mark.parametrize("family", ["llama-biases-tied", "gpt2", "opt-norm-before"])
@torch.no_grad()
def test_a_shared_linear_has_what_an_ordinary_one_has(family: str) -> None:
    model = compact(family, torch.float64)
    shared = {name: module for name, module in model.named_modules() if isinstance(module, SharedLinear)}
    assert shared
    for linear in shared.values():
        x = torch.randn(3, linear.in_features, dtype=torch.float64)
        weight = linear.weight if family == "gpt2" else linear.weight.T
        torch.testing.assert_close(linear(x), x @ weight + (0 if linear.bias is None else linear.bias))
        assert linear.weight.dtype == torch.float64


def test_a_base_that_is_gone_is_named() -> None:
    model = compact("llama-gqa")
    del model.block_list[1].mlp.up_proj
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj, which is not in the model"):
        model.block_list[2].mlp.up_proj(torch.zeros(1, 32))
