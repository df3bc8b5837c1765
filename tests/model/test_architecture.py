import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families import FAMILIES, block_list, tiny_model
from flexigpt import FlexiGPTConfig, InputError
from flexigpt.model import ARCHITECTURES, find_architecture, model_shape
from flexigpt.model.architecture import ADDING_PAGE


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "granitemoe"])
def test_mixtures_of_experts_are_refused_by_name(model_type: str) -> None:
    with pytest.raises(InputError, match=f"{model_type} is a mixture of experts"):
        find_architecture(CONFIG_MAPPING[model_type]())


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba", "jamba", "falcon_h1", "recurrent_gemma", "lfm2"])
def test_recurrent_models_are_refused_by_name(model_type: str) -> None:
    settings = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2} if model_type == "lfm2" else {}
    with pytest.raises(InputError, match=f"{model_type} (has linear-attention or recurrent|is a mixture)"):
        find_architecture(CONFIG_MAPPING[model_type](**settings))


def test_other_types_are_refused_with_the_list_and_the_page() -> None:
    with pytest.raises(InputError, match="model type bloom is not supported") as raised:
        find_architecture(CONFIG_MAPPING["bloom"]())
    assert all(name in str(raised.value) for name in ARCHITECTURES)
    assert ADDING_PAGE in str(raised.value)


def test_a_quantised_source_is_refused() -> None:
    with pytest.raises(InputError, match="give it unquantised"):
        find_architecture(CONFIG_MAPPING["llama"](quantization_config={"quant_method": "gptq", "bits": 4}))


def test_a_compact_model_is_no_source() -> None:
    config = FlexiGPTConfig(text_config=CONFIG_MAPPING["llama"](num_hidden_layers=2))
    with pytest.raises(InputError, match="is a compact model already"):
        find_architecture(config)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_default_configurations_are_accepted(model_type: str) -> None:
    config: PreTrainedConfig = CONFIG_MAPPING[model_type]()
    assert find_architecture(config) is ARCHITECTURES[model_type]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linears_are_all_matrices_of_a_block(family: str) -> None:
    """What the table leaves out would silently stay with every replica."""
    source: PreTrainedModel = tiny_model(family)
    matrices = sum(p.numel() for p in block_list(source)[0].parameters() if p.ndim == 2)
    assert model_shape(source).linear_parameters == matrices
    assert model_shape(source).parameters == len(torch.cat([p.flatten() for p in source.parameters()]))
