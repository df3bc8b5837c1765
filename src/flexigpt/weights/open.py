"""Opening source and compact models, and building the compact model of a source."""

import contextlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME

from flexigpt.model import FlexiGPTConfig, empty_model, plan_of, quantised_by, right_on_cpus, stored_tensors
from flexigpt.runtime import InputError, check_dtype, find_device, fingerprint, one_line
from flexigpt.weights.files import FILE_DTYPES, find_file, located, names_in_files, open_weights, opening
from flexigpt.weights.quantised import quantised_parts
from flexigpt.weights.sizes import check_sizes

_ADAPTER = "adapter_config.json"

# Of a source; they go where its weights go.
_TRAVEL = (
    "tokenizer.model",
    *(f"{name}{end}" for name in ("LICENSE", "NOTICE", "USE_POLICY") for end in ("", ".md", ".txt")),
)


def read_config(model: str) -> PreTrainedConfig:
    """The configuration of a local or hub model.

    Raises:
        InputError: a model that cannot be found or is of a kind unknown to this transformers, or a compact model of a
            newer format version.
    """
    model = located(model)
    if find_file(model, _ADAPTER) is not None:
        raise InputError(f"{model} holds a PEFT adapter ({_ADAPTER}), not a model alone: merge it into its base first")
    if Path(model).exists() and not Path(model, "config.json").is_file():
        raise InputError(f"{model} holds no model: config.json is not there; give the folder of a checkpoint")
    with opening(model):
        settings, _ = PreTrainedConfig.get_config_dict(model)
        kind = settings.get("model_type")
        if "auto_map" in settings and kind not in CONFIG_MAPPING:
            raise InputError(f"{model} (model type {kind}) needs code that comes with it, which flexigpt never runs")
        check_sizes(model, settings)
        config: PreTrainedConfig = AutoConfig.from_pretrained(model, trust_remote_code=False)
    if isinstance(config, FlexiGPTConfig) and config.text_config is None:
        raise InputError(f"the model {model} cannot be opened: its config.json lacks text_config")
    if isinstance(config, FlexiGPTConfig):
        plan_of(config)
    return config


def open_empty(model: str, dtype: str = "auto", quantised: bool = False) -> PreTrainedModel:
    """`empty_model` of a local or hub model's configuration; `auto` is the dtype of the weights.

    Raises:
        InputError: as `read_config`, a configuration that no model can be built from, or a quantised model where the
            caller does not say that it can do with one.
    """
    model = located(model)
    config = read_config(model)
    if not quantised and (library := quantised_by(config)) is not None:
        raise InputError(f"{model} is quantised by {library} and can only be run: give the model that it was made from")
    if dtype != "auto":
        config.dtype = getattr(torch, dtype)
    if config.dtype is None:
        config.dtype = _dtype_in_files(model)
    try:
        empty = empty_model(config)
        for each in (config, config.get_text_config()):
            each.validate()  # as saving does, once the model has chosen how it attends
        return empty
    except Exception as error:
        raise InputError(f"the model {model} cannot be built from its config.json: {one_line(error)}") from error


def check_quantiser(model: str, config: PreTrainedConfig) -> None:
    """Raises InputError for a quantised model whose library is not installed."""
    library = quantised_by(config)
    if library is not None and find_spec(library) is None:
        raise InputError(f"{model} is quantised by {library}, which is not installed: pip install 'flexigpt[quantize]'")


def _dtype_in_files(model: str) -> torch.dtype:
    """For configurations that name none: the dtype of a folder's weights; float32 where there are several, or none."""
    found: set[torch.dtype | None] = set()
    for path in sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []:
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            found |= {FILE_DTYPES.get(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
    floating = [dtype for dtype in found if dtype is not None and dtype.is_floating_point]
    return floating[0] if len(floating) == 1 and floating[0].itemsize == 2 else torch.float32


def load_model(model: str, dtype: str = "auto", device: str = "auto", quantization: Any = None) -> PreTrainedModel:
    """A source or a compact model, in eval mode. On the CPU its tensors stay in the file until they are used.

    Args:
        model: folder or hub name; it may be quantised.
        dtype: of what is not quantised.
        device: as `find_device` takes it.
        quantization: how transformers is to quantise it on the way, a configuration of its own; None: it is not.

    Raises:
        InputError: as `read_config`; weights that are missing, truncated, not finite, of the wrong shape or more than
            the configuration has places for; an unknown dtype.
    """
    check_dtype(dtype)
    model, where = located(model), find_device(device)
    open_checked(model)
    how = {} if quantization is None else {"quantization_config": quantization}
    with opening(model):
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, trust_remote_code=False, **how
        )
    loaded.generation_config = generation_config(model) or loaded.generation_config  # transformers skips a damaged one
    for name, values in loaded.named_parameters():
        for tensor in stored_tensors(values):
            check_numbers(name, tensor, f"in {model}")  # logits need not tell: attention on a CPU makes 0 of NaN
    right_on_cpus(loaded)
    return move(loaded.eval(), where)


def open_checked(model: str) -> PreTrainedModel:
    """`open_empty` of a model whose weights are all there and fit, where what stores them can be read.

    Raises:
        InputError: as `read_config`; weights that are missing, truncated, of the wrong shape or more than the
            configuration has places for; a library that is missing.
    """
    empty = open_empty(model, quantised=True)
    check_quantiser(model, empty.config)
    check = names_in_files if quantised_by(empty.config) is None else quantised_parts
    check(open_weights(model), empty)  # transformers takes what does not fit
    return empty


@torch.no_grad()
def check_numbers(name: str, parameter: torch.Tensor, where: str) -> None:
    """Raises InputError for a parameter that holds NaN or infinity."""
    lowest_and_highest: tuple[torch.Tensor, ...] = parameter.aminmax() if parameter.numel() else ()
    if not all(torch.isfinite(end) for end in lowest_and_highest):
        raise InputError(
            f"the weights hold NaN or infinity {where}, in {name}: get the model again, or, if you gave "
            "--dtype float16, which overflows above 65504, give another"
        )


def move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on that device. (`PreTrainedModel.to` loses nn.Module.to's types.)"""
    nn.Module.to(model, device)
    return model


def model_fingerprint(model: str) -> str:
    """What tells one model from another, without reading all of its weights; of a model on the hub its name."""
    folder = Path(located(model))
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return fingerprint(model, [folder / "config.json", *files] if files else [])


def generation_config(model: str) -> GenerationConfig | None:
    """How a model is to generate by the file beside it; None: there is none, and config.json says it.

    Raises:
        InputError: a file that cannot be read.
    """
    if find_file(model, GENERATION_CONFIG_NAME) is None:
        return None
    with opening(model, f"{GENERATION_CONFIG_NAME} of"):
        return GenerationConfig.from_pretrained(model)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model.

    Raises:
        InputError: none is there, or it cannot be read.
    """
    model = located(model)
    with opening(model, "tokenizer of"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        tokenizer("a")  # settings of a wrong kind come to light here
    return tokenizer


def travelling(model: str) -> list[Path]:
    """What goes along with a model's weights: the older form of its tokenizer, its licence, notices, use policy."""
    return [file for file in (find_file(model, name) for name in _TRAVEL) if file is not None]


def has_replicas(model: str) -> bool:
    """Whether a local or hub model is a compact one with at least one replica; no weight is read.

    Raises:
        InputError: as `read_config`.
    """
    config = read_config(model)
    return isinstance(config, FlexiGPTConfig) and bool(config.replicas)
