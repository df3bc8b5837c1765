"""Opening source and compact models, and building the compact model of a source."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexigpt.architecture import ARCHITECTURES, config_with_blocks, find_architecture, num_blocks
from flexigpt.configuration_flexigpt import FlexiGPTConfig
from flexigpt.data import fingerprint
from flexigpt.errors import InputError
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM
from flexigpt.plan import Plan

DTYPES = ("auto", "float32", "bfloat16", "float16")
_FILE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DEVICES = "auto, cpu, cuda or cuda:N"


def find_device(device: str) -> torch.device:
    """The device of that name; `auto` is the first GPU, or the CPU where there is none.

    Raises:
        InputError: a device that does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found, dtype=torch.float64).item()  # no values on meta, no float64 on mps
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {device} cannot be used here: give {DEVICES}") from error
    return found


def check_dtype(dtype: str) -> None:
    """Raises InputError for a dtype that is not one of DTYPES."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is unknown: give {', '.join(DTYPES)}")


def check_depth(plan: Plan, depth: int) -> None:
    """Raises InputError for a plan of another depth than the source's."""
    if plan.num_blocks != depth:
        raise InputError(
            f"the plan is for {plan.num_blocks} blocks, the model has {depth}: give a plan made for this model"
        )


def read_config(model: str) -> PreTrainedConfig:
    """The configuration of a local or hub model.

    Raises:
        InputError: a model that cannot be found or is of a kind unknown to this transformers, or a compact model of a
            newer format version.
    """
    path = Path(model)
    if path.exists() and not (path / "config.json").is_file():
        raise InputError(f"{model} holds no model: config.json is not there")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model)
    except Exception as error:  # a config.json can be wrong in as many ways as transformers has checks and code
        raise InputError(f"the model {model} cannot be opened: {one_line(error)}") from error
    if isinstance(config, FlexiGPTConfig) and config.text_config is None:
        raise InputError(f"the model {model} cannot be opened: its config.json lacks text_config")
    if getattr(config.get_text_config(), "num_hidden_layers", 1) < 1:
        raise InputError(f"the model {model} cannot be opened: its config.json says that it has no blocks")
    if isinstance(config, FlexiGPTConfig):
        plan_of(config)
    return config


def open_empty(model: str, dtype: str = "auto") -> PreTrainedModel:
    """`empty_model` of a local or hub model's configuration; `auto` is the dtype of the weights.

    Raises:
        InputError: as `read_config`, or a configuration that no model can be built from.
    """
    config = read_config(model)
    if dtype != "auto":
        config.dtype = getattr(torch, dtype)
    if config.dtype is None:
        config.dtype = _dtype_in_files(model)
    try:
        return empty_model(config)
    except Exception as error:
        raise InputError(f"the model {model} cannot be built from its config.json: {one_line(error)}") from error


def _dtype_in_files(model: str) -> torch.dtype:
    """The dtype in a folder's first weight file, for configurations that name none; float32 where there is no file."""
    for path in sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []:
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            names = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            return next((dtype for name, dtype in _FILE_DTYPES.items() if name in names), torch.float32)
    return torch.float32


def load_model(model: str, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """A source or a compact model, in eval mode. On the CPU its tensors stay in the file until they are used.

    Raises:
        InputError: as `read_config`; weights that are missing, truncated, of the wrong shape or more than the
            configuration has places for; an unknown dtype.
    """
    check_dtype(dtype)
    where = find_device(device)
    read_config(model)
    try:
        # With the report it returns a pair, which its annotation does not say.
        opened: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except SafetensorError as error:
        raise InputError(f"the weights of {model} are damaged ({error}): copy or download them again") from error
    except Exception as error:  # whatever transformers makes of wrong files
        raise InputError(f"the model {model} cannot be opened: {one_line(error)}") from error
    loaded: PreTrainedModel = opened[0]
    _check_loaded(model, loaded, opened[1])
    return move(loaded.eval(), where)


def _check_loaded(model: str, loaded: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuses what transformers only warns of: tensors made up, left out, or tied against the file."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"the weights of {model} lack {len(missing)} tensors, {missing[0]} among them: get them again")
    for name, in_file, in_config in report["mismatched_keys"]:
        sizes = f"{tuple(in_file)} in the file, {tuple(in_config)} by config.json"
        raise InputError(f"the weights of {model} do not fit: {name} is {sizes}")
    architecture = ARCHITECTURES.get(loaded.config.model_type)
    linears = () if architecture is None else architecture.linears
    ends = tuple(f".{path}.{kind}" for path in linears for kind in ("weight", "bias"))
    left = sorted(name for name in report["unexpected_keys"] if name.endswith(ends))
    if left:
        raise InputError(
            f"config.json of {model} has no place for {len(left)} tensors of the weights, {left[0]} among them: "
            "correct it, or get the model again"
        )
    embeddings, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    if loaded.config.tie_word_embeddings and head is not None and head.weight is not embeddings.weight:
        raise InputError(
            f"config.json of {model} ties the output head to the embeddings, but the weights hold another head: "
            "set tie_word_embeddings to false in it"
        )


def move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on that device. (`PreTrainedModel.to` loses nn.Module.to's types.)"""
    nn.Module.to(model, device)
    return model


def model_fingerprint(model: str) -> str:
    """What tells one model from another, without reading all of its weights; of a model on the hub its name."""
    folder = Path(model)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return fingerprint(model, [folder / "config.json", *files] if files else [])


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model.

    Raises:
        InputError: none is there, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # tokenizers raise bare Exceptions
        raise InputError(f"the tokenizer of {model} cannot be opened: {one_line(error)}") from error


def compact_config(
    config: PreTrainedConfig, plan: Plan, output_norm: bool = True, base_scale: bool = False
) -> FlexiGPTConfig:
    """The configuration of the compact model that a plan makes of a source.

    Raises:
        InputError: a plan of another depth than the source's.
    """
    check_depth(plan, num_blocks(config))
    architecture = find_architecture(config)
    return FlexiGPTConfig(
        text_config=config,
        replicas=plan.to_dict()["replicas"],
        blocks=architecture.blocks,
        linears=list(architecture.linears),
        output_norms=list(architecture.output_norms) if output_norm else [],
        base_scale=base_scale,
        dtype=config.dtype,
    )


def plan_of(config: PreTrainedConfig) -> Plan:
    """The plan of a compact model."""
    assert isinstance(config, FlexiGPTConfig)
    return Plan.from_dict({"format_version": 1, "num_blocks": config.num_hidden_layers, "replicas": config.replicas})


def has_replicas(model: str) -> bool:
    """Whether a local or hub model is a compact one with at least one replica; no weight is read.

    Raises:
        InputError: as `read_config`.
    """
    config = read_config(model)
    return isinstance(config, FlexiGPTConfig) and bool(config.replicas)


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A source or compact model of that configuration with parameters on the meta device: no memory, all shapes."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=config_dtype(config))
    model.tie_weights()
    return model.eval()


def config_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of the weights that a configuration names; float32 where it names none."""
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def all_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those buffers included that no checkpoint holds (such as rotary frequencies)."""
    return model.state_dict() | dict(model.named_buffers())


def fill_model(empty: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives an empty model these tensors (`all_tensors` of another), without a copy; others it keeps."""
    known = empty.state_dict().keys()
    empty.load_state_dict({name: t for name, t in tensors.items() if name in known}, strict=False, assign=True)
    for name, _ in list(empty.named_buffers()):
        if name in tensors:
            parent, _, last = name.rpartition(".")
            empty.get_submodule(parent)._buffers[last] = tensors[name]
    empty.tie_weights()


def names_of_blocks(source: PreTrainedModel, source_blocks: Sequence[int]) -> dict[str, str]:
    """What the model that consists of these blocks of the source, repeats allowed, calls its tensors, buffers included.

    Returns:
        Name in that model -> name in the source.
    """
    prefix = find_architecture(source.config).blocks
    names: dict[str, str] = {}
    own: dict[int, list[str]] = {}
    for name in all_tensors(source):
        if name.startswith(f"{prefix}."):
            block, _, path = name.removeprefix(f"{prefix}.").partition(".")
            own.setdefault(int(block), []).append(path)
        else:
            names[name] = name
    for index, source_block in enumerate(source_blocks):
        names |= {f"{prefix}.{index}.{path}": f"{prefix}.{source_block}.{path}" for path in own[source_block]}
    return names


def empty_compact(
    source: PreTrainedModel,
    plan: Plan,
    output_norm: bool = True,
    source_blocks: Sequence[int] | None = None,
    base_scale: bool = False,
) -> tuple[FlexiGPTForCausalLM, dict[str, str]]:
    """The compact model of a source, its parameters on the meta device, and which of the source's tensors it takes.

    Args:
        source: the source model; the meta device will do.
        plan: the plan of the compact model.
        output_norm: whether its replicas have output norms.
        source_blocks: the source's block behind each logical block; None: the same numbering.
        base_scale: whether each linear of a replica scales its base's output.

    Returns:
        The model, and name in it -> name in the source, buffers included; what is missing is the replicas' own.
    """
    origins = range(num_blocks(source.config)) if source_blocks is None else source_blocks
    text_config = config_with_blocks(source.config, origins)
    text_config._name_or_path = ""  # where the source lay when it was pruned; the record says so
    text_config.dtype = source.dtype
    model = cast(FlexiGPTForCausalLM, empty_model(compact_config(text_config, plan, output_norm, base_scale)))
    known = all_tensors(model).keys()
    taken = {}
    for name, origin in names_of_blocks(source, origins).items():
        # A family's own norm that an output norm follows lies one level deeper in a replica.
        parent, _, last = f"language_model.{name}".rpartition(".")
        key = next((key for key in (f"{parent}.inner.{last}", f"{parent}.{last}") if key in known), None)
        if key is not None:
            taken[key] = origin
    return model, taken


def compact_of(
    source: PreTrainedModel,
    plan: Plan,
    output_norm: bool = True,
    source_blocks: Sequence[int] | None = None,
    base_scale: bool = False,
) -> FlexiGPTForCausalLM:
    """The compact model that shares the tensors of a source in memory; what is the replicas' own is on the meta device.

    Arguments are those of `empty_compact`.
    """
    model, taken = empty_compact(source, plan, output_norm, source_blocks, base_scale)
    there = all_tensors(source)
    tensors: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for name, origin in taken.items():
        # What a repeated block keeps as its own (input norms, biases) must not share the memory of the first one's.
        tensors[name] = there[origin].clone() if origin in used else there[origin]
        used.add(origin)
    fill_model(model, tensors)
    model.generation_config = source.generation_config
    return model


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of the stored parameters, each counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def one_line(error: Any) -> str:
    """A library's error message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
