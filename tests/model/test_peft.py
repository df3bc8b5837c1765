"""PEFT by the usual names: on replicas with output norms, on narrow MLPs, where sublayers are gone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from conftest import Run
from families import NUM_BLOCKS, compact_of, initialize_replicas, tiny_model, token_ids
from flexigpt import FlexiGPTForCausalLM, Plan, Replica
from flexigpt.model import SharedLinear, SublayerReplica, plan_of
from flexigpt.model.peft_layers import SharedIa3Linear, SharedLoraLinear

# PEFT asks for an attribute that transformers gave another name, and (0.19) for the file of a model without one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

FAMILIES = ["llama-gqa", "gpt2", "opt-norm-before", "gemma2"]
REPLICAS = (Replica(block=2, base=1, rank=3), Replica(block=4, base=1, rank=3))
GONE = (
    SublayerReplica(block=1, sublayer="mlp", form="none"),
    SublayerReplica(block=3, sublayer="attention", form="none"),
    SublayerReplica(block=4, sublayer="mlp", form="units", units=8),
)


def compact(family: str, sublayers: tuple[SublayerReplica, ...] = ()) -> FlexiGPTForCausalLM:
    """With two replicas, or with these sublayers narrow or gone."""
    source = tiny_model(family)
    plan = Plan(num_blocks=NUM_BLOCKS, replicas=() if sublayers else REPLICAS, sublayers=sublayers)
    model = compact_of(source, plan)
    if sublayers:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(model.config).eval()
    initialize_replicas(model, source, plan, adapter_init="svd", norm_init=0.5, seed=0)
    return model.eval()


def names(model: FlexiGPTForCausalLM) -> list[str]:
    """What people call the linears: q_proj, down_proj ..."""
    return [path.rpartition(".")[2] for path in model.config.linears]


def trained(model: PeftModel, seed: int = 3) -> PeftModel:
    """With numbers in what is trained, instead of training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=token_ids()).logits


def lora(model: FlexiGPTForCausalLM, targets: Any = None, **settings: Any) -> PeftModel:
    transposed = model.config.text_config.model_type == "gpt2"
    config = LoraConfig(r=2, target_modules=targets or names(model), fan_in_fan_out=transposed, **settings)
    return get_peft_model(model, config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sublayers", [(), GONE], ids=["replicas", "sublayers"])
def test_a_lora_on_every_linear_is_trained_saved_opened_and_merged(
    family: str, sublayers: tuple[SublayerReplica, ...], tmp_path: Path
) -> None:
    model = compact(family, sublayers)
    other, before = copy.deepcopy(model), logits(model)
    peft = lora(model)
    assert torch.equal(logits(peft), before)
    peft.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    outer = [parameter for name, parameter in peft.named_parameters() if "lora_B" in name]
    # What is gone, an MLP and an attention, makes one whole block.
    assert len(outer) == (NUM_BLOCKS - bool(sublayers)) * len(model.config.linears)
    assert all(parameter.grad.abs().sum() > 0 for parameter in outer)
    expected = logits(trained(peft))
    assert not torch.allclose(expected, before)
    peft.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path / "adapter")), expected)
    with peft.disable_adapter():
        assert torch.equal(logits(peft), before)
    merged = peft.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))
    assert [replica.rank for replica in plan_of(again.config).replicas] == [5 for _ in again.config.replicas]


def test_a_merged_adapter_raises_the_ranks_of_its_linears_alone(tmp_path: Path, run: Run) -> None:
    model = trained(lora(compact("llama-gqa"), ["q_proj", "o_proj"], layers_to_transform=[1, 2])).merge_and_unload()
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    first, second = plan_of(read.config).replicas
    assert first == Replica(block=2, base=1, rank=3, ranks={"self_attn.q_proj": 5, "self_attn.o_proj": 5})
    assert second == REPLICAS[1]
    assert read.config.format_version == 3
    code, shown, errors = run("inspect", tmp_path)
    assert code == 0, errors
    assert "3 to 5" in shown


def test_layers_to_transform_are_the_logical_blocks() -> None:
    peft = lora(compact("llama-gqa"), ["v_proj"], layers_to_transform=[2])
    found = [name for name, module in peft.named_modules() if isinstance(module, SharedLoraLinear)]
    assert found == ["base_model.model.language_model.model.layers.2.self_attn.v_proj"]
    assert len([name for name, _ in peft.named_parameters() if "lora_B" in name]) == 1


def test_merging_is_undone_and_adapters_stand_beside_each_other() -> None:
    peft = lora(compact("llama-gqa"))
    peft.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    of_each = []
    for seed, name in enumerate(("default", "second")):
        peft.set_adapter(name)
        of_each.append(logits(trained(peft, seed)))
    peft.base_model.set_adapter(["default", "second"])
    both = logits(peft)
    peft.merge_adapter()
    torch.testing.assert_close(logits(peft), both, rtol=1e-4, atol=1e-4)
    peft.unmerge_adapter()
    for name, expected in zip(("default", "second"), of_each, strict=True):
        peft.set_adapter(name)
        torch.testing.assert_close(logits(peft), expected, rtol=1e-4, atol=1e-4)
    assert {len(m.adapter_A) for m in peft.modules() if isinstance(m, SharedLinear)} == {3}


@pytest.mark.parametrize("family", FAMILIES)
def test_ia3_is_trained_saved_and_opened_but_not_merged_into_replicas(family: str, tmp_path: Path) -> None:
    model, other = compact(family), compact(family)
    before, down = logits(model), names(model)[-1]
    settings = {"target_modules": names(model), "feedforward_modules": [down], "fan_in_fan_out": family == "gpt2"}
    peft = get_peft_model(model, IA3Config(**settings))
    assert any(isinstance(module, SharedIa3Linear) for module in peft.modules())
    expected = logits(trained(peft))
    assert not torch.allclose(expected, before)
    peft.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path)), expected)
    with pytest.raises(ValueError, match="keep the adapter beside the model"):
        peft.merge_and_unload()
    assert torch.equal(logits(peft), expected)
    assert torch.equal(logits(peft.unload()), before)


@pytest.mark.parametrize("setting", [{"init_lora_weights": "pissa"}, {"lora_bias": True}, {"use_dora": True}])
def test_what_would_change_the_bases_weight_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="name kept blocks alone by layers_to_transform"):
        lora(compact("llama-biases-tied"), **setting)


OTHERS = {
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=100, tinit=10, tfinal=10),
    "dora": lambda: LoraConfig(r=2, use_dora=True),
    "vera": lambda: VeraConfig(r=2),
    "loha": lambda: LoHaConfig(r=2),
    "oft": lambda: OFTConfig(r=0, oft_block_size=4),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_change_narrow_and_kept_linears_and_are_refused_on_replicas(kind: str, tmp_path: Path) -> None:
    model, other = compact("llama-gqa", GONE), compact("llama-gqa", GONE)
    config, before = OTHERS[kind](), logits(model)
    config.target_modules = names(model)
    peft = trained(get_peft_model(model, config))
    expected = logits(peft)
    assert not torch.allclose(expected, before)
    peft.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path)), expected)
    torch.testing.assert_close(logits(peft.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
    config = OTHERS[kind]()
    config.target_modules = names(model)
    with pytest.raises(ValueError, match="name kept blocks alone by layers_to_transform"):
        get_peft_model(compact("llama-gqa"), config)
    config.layers_to_transform, config.layers_pattern = [0, 3, 5], "layers"
    config.target_modules = ["q_proj", "v_proj"]
    kept = compact("llama-gqa")
    before = logits(kept)
    assert not torch.allclose(logits(trained(get_peft_model(kept, config))), before)


@pytest.mark.parametrize("make", [PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig])
@pytest.mark.parametrize("sublayers", [(), GONE], ids=["replicas", "sublayers"])
def test_what_is_put_before_the_text_is_trained_saved_and_opened(
    make: Any, sublayers: tuple[SublayerReplica, ...], tmp_path: Path
) -> None:
    model, other = compact("llama-gqa", sublayers), compact("llama-gqa", sublayers)
    before = logits(model)
    peft = get_peft_model(model, make(task_type="CAUSAL_LM", num_virtual_tokens=3))
    peft.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in peft.parameters() if p.requires_grad)
    expected = logits(peft.eval())
    assert not torch.allclose(expected[:, -before.shape[1] :], before)
    peft.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path).eval()), expected)
    with peft.disable_adapter():
        assert torch.equal(logits(peft), before)


def test_cached_generation_is_that_without_a_cache() -> None:
    peft = trained(lora(compact("llama-gqa")))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = token_ids(batch=1)
    assert torch.equal(
        peft.generate(input_ids=ids, **options), peft.generate(input_ids=ids, use_cache=False, **options)
    )
