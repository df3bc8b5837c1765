"""Opening models and writing compact checkpoints."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexigpt.architecture import block_list, find_architecture, num_blocks
from flexigpt.configuration_flexigpt import FlexiGPTConfig
from flexigpt.errors import InputError
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM
from flexigpt.plan import Plan
from flexigpt.progress import Track, silent

DTYPES = ("auto", "float32", "bfloat16", "float16")
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
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device} cannot be used here: give {DEVICES}") from error
    return found


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
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the model {model} cannot be opened: {_one_line(error)}") from error


def load_model(model: str, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """A source or a compact model, in eval mode. On the CPU its tensors stay in the file until they are used.

    Raises:
        InputError: as `read_config`; weights that are missing, truncated or of the wrong shape; an unknown dtype.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is unknown: give {', '.join(DTYPES)}")
    where = find_device(device)
    read_config(model)
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, output_loading_info=True)
    except SafetensorError as error:
        raise InputError(f"the weights of {model} are damaged ({error}): copy or download them again") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the model {model} cannot be opened: {_one_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"the weights of {model} lack {len(missing)} tensors, {missing[0]} among them: get them again")
    return loaded.eval().to(where)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model.

    Raises:
        InputError: none is there, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # tokenizers raise bare Exceptions
        raise InputError(f"the tokenizer of {model} cannot be opened: {_one_line(error)}") from error


def check_finite(model: PreTrainedModel, track: Track = silent) -> None:
    """Raises InputError where a source's weights hold NaN or infinity; the message names the block."""
    blocks = block_list(model)
    prefix = find_architecture(model.config).blocks
    outside = (item for item in model.named_parameters() if not item[0].startswith(f"{prefix}."))
    parts = [("outside the blocks", outside), *((f"in block {i}", b.named_parameters()) for i, b in enumerate(blocks))]
    for where, parameters in track(parts, "checking weights", len(parts)):
        for name, parameter in parameters:
            if not torch.isfinite(parameter).all():
                raise InputError(f"the weights hold NaN or infinity {where}, in {name}: get the model again")


def compact_config(config: PreTrainedConfig, plan: Plan, output_norm: bool = True) -> FlexiGPTConfig:
    """The configuration of the compact model that a plan makes of a source.

    Raises:
        InputError: a plan of another depth than the source's.
    """
    if plan.num_blocks != num_blocks(config):
        raise InputError(
            f"the plan is for {plan.num_blocks} blocks, the model has {num_blocks(config)}: give a plan made for it"
        )
    architecture = find_architecture(config)
    return FlexiGPTConfig(
        text_config=config,
        replicas=plan.to_dict()["replicas"],
        blocks=architecture.blocks,
        linears=list(architecture.linears),
        output_norms=list(architecture.output_norms) if output_norm else [],
        dtype=config.dtype,
    )


def plan_of(config: FlexiGPTConfig) -> Plan:
    """The plan of a compact model."""
    return Plan.from_dict({"format_version": 1, "num_blocks": config.num_hidden_layers, "replicas": config.replicas})


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A source or compact model of that configuration with parameters on the meta device: no memory, all shapes."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32).eval()


def fill_model(empty: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives an empty model these tensors, without a copy; what it does not name is left."""
    known = empty.state_dict().keys()
    empty.load_state_dict({name: t for name, t in tensors.items() if name in known}, strict=False, assign=True)
    empty.tie_weights()


def compact_of(source: PreTrainedModel, plan: Plan, output_norm: bool = True) -> FlexiGPTForCausalLM:
    """The compact model that shares the source's tensors; what is the replicas' own is still on the meta device."""
    # from_config writes into the configuration it is given.
    config = compact_config(type(source.config).from_dict(source.config.to_dict()), plan, output_norm)
    config.dtype = source.dtype
    model = empty_model(config)
    fill_model(model, {f"language_model.{name}": tensor for name, tensor in source.state_dict().items()})
    model.generation_config = source.generation_config
    return model


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of the stored parameters, each counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def check_output(out: str | Path, source: str, overwrite: bool) -> None:
    """Refuses an output folder before the work begins.

    Raises:
        InputError: a folder that is not empty (without `overwrite`), that holds no checkpoint or plan (with it), or in
            which the source lies.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a folder to write to")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if Path(source).exists() and Path(source).resolve().is_relative_to(out.resolve()):
        raise InputError(f"the source lies in {out}: give another folder to write to")
    if not overwrite:
        raise InputError(f"{out} is not empty: give another folder, or --overwrite to replace it")
    if not any((out / name).is_file() for name in ("config.json", "plan.json")):
        raise InputError(f"{out} holds no checkpoint that --overwrite could replace: give another folder")


@contextlib.contextmanager
def replaced_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without an error, or vanishes.

    Raises:
        InputError: a disk that is full or cannot be written to.
    """
    out = Path(out).absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    try:
        content = temporary / "new"
        content.mkdir()
        yield content
        if out.exists():
            out.rename(temporary / "old")
        content.rename(out)
    except (OSError, SafetensorError) as error:
        raise _write_error(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_error(out: Path, error: Exception) -> InputError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or any(sign in str(error) for sign in ("No space left", "File too large", "StorageFull")):
        return InputError(f"the disk of {out.parent} is full: nothing was written; free space or give another folder")
    return InputError(f"{out} cannot be written: {_one_line(error)}")


def check_space(out: str | Path, num_bytes: int) -> None:
    """Raises InputError where the disk that `out` will lie on has less free space than a checkpoint needs."""
    folder = next(folder for folder in Path(out).absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free, the checkpoint needs {num_bytes / 1e6:,.0f} MB: "
            "free space or give another folder"
        )


def write_model(
    folder: Path, model: FlexiGPTForCausalLM, tokenizer: PreTrainedTokenizerBase | None, max_shard_size: str
) -> None:
    """Weights, configuration, remote code and tokenizer into an existing folder."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        os.chmod(file, 0o644)


def _one_line(error: Any) -> str:
    return " ".join(str(error).split()) or type(error).__name__
