"""What lies in a checkpoint's safetensors files, and reading some of it."""

import contextlib
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from flexigpt.runtime import InputError, digest, fingerprint, local_path, one_line, unique_names

# In the order of safetensors' own list, which is that of the tensors in the files that it writes, backwards.
FILE_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}

# What floats by themselves are stored as.
_NUMBERS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))

# Older versions stored what is computed: rotary frequencies, masks and positions.
_HARMLESS = r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\b(attn|attention)\.(masked_)?bias$|\bposition_ids$"

_AGAIN = "copy or download them again"


class StoredTensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
        name: in the file.
        file: the safetensors file.
        dtype: of the stored values.
        shape: of the stored tensor.
        start: bytes before its first one in the file.
        num_bytes: how many bytes it takes.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class WeightFiles:
    """The weights of one model on disk.

    Attributes:
        source: the folder or hub name.
        tensors: by the files' own names, in the order of the files.
        fingerprint: 16 hexadecimal digits that tell one state of the files from another, most of the weights unread:
            of config.json, the index and every file of weights the name, size, first and last MiB; of the latter also
            the header and the time of the last change.
    """

    source: str
    tensors: Mapping[str, StoredTensor]
    fingerprint: str

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by their names in the files, as views of the mapped files: no memory of the process's own.

        Each call maps the files again. A mapping, and with it the pages that were read through it, goes when the last
        tensor of the call from that file goes.

        Raises:
            InputError: files that are gone, damaged or other than when they were opened.
        """
        wanted = [self.tensors[name] for name in names]
        found = {}
        for path in dict.fromkeys(tensor.file for tensor in wanted):
            with opening(self.source), safe_open(path, "pt") as file:
                for tensor in (tensor for tensor in wanted if tensor.file == path):
                    values = file.get_tensor(tensor.name)
                    if (values.dtype, tuple(values.shape)) != (tensor.dtype, tensor.shape):
                        raise InputError(
                            f"the weights of {self.source} changed while they were being read: start again"
                        )
                    found[tensor.name] = values
        return {tensor.name: found[tensor.name] for tensor in wanted}


def open_weights(source: str) -> WeightFiles:
    """What lies in the safetensors files of a folder or a hub model; of the latter what is missing is downloaded.

    Raises:
        InputError: a model without weights or with pickled ones only; files that are missing, damaged or truncated; an
            index that cannot be read or contradicts them; a tensor of a dtype that torch does not know.
    """
    find = _finder(source)
    single = find(SAFE_WEIGHTS_NAME)  # before an index, as transformers has it
    index = find(SAFE_WEIGHTS_INDEX_NAME) if single is None else None
    if single is None and index is None:
        raise _no_weights(source)
    weight_map = {} if index is None else _read_index(source, index)
    shards = {name: _shard(source, find, name) for name in sorted(set(weight_map.values()))}
    files = list(shards.values()) if single is None else [single]
    tensors: dict[str, StoredTensor] = {}
    states = []
    for file in files:
        found, state = _read_file(source, file)
        both = sorted(found.keys() & tensors.keys())
        if both:
            places = f"{tensors[both[0]].file.name} and {file.name}"
            raise InputError(f"the weights of {source} hold {both[0]} twice, in {places}: {_AGAIN}")
        tensors |= found
        states.append(state)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != shards[shard]:
            place = f"{name} in {shard}, which does not hold it"
            raise InputError(f"the index of the weights of {source} places {place}: {_AGAIN}")
    parts = [file for file in (find(CONFIG_NAME), index, *files) if file is not None]
    return WeightFiles(source, tensors, digest(fingerprint(source, parts).encode(), *states))


def located(model: str) -> str:
    """A model's name as libraries take it: a folder that is there, or a name of the hub.

    Raises:
        InputError: a path that is not there.
    """
    path = local_path(model)
    return model if path is None else str(path)


@contextlib.contextmanager
def opening(model: str, what: str = "model") -> Iterator[None]:
    """Within it whatever libraries make of files that are wrong, or not there, becomes one line."""
    try:
        yield
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"the weights of {model} are damaged ({error}): {_AGAIN}") from error
    except Exception as error:  # files, names and connections can be wrong in as many ways as libraries have checks
        where = "" if Path(model).exists() else "no such folder here, and on the hub: "
        raise InputError(f"the {what} {model} cannot be opened: {where}{one_line(error)}") from error


def find_file(model: str, name: str) -> Path | None:
    """A file of a folder or a hub model, which is downloaded where it is not in the cache; None: it is not there.

    Raises:
        InputError: a hub model that cannot be reached.
    """
    return _finder(model)(name)


def _finder(source: str) -> Callable[[str], Path | None]:
    """What finds a file of a model by its name, None where it is not there. Of a hub model, always of one commit."""
    source = located(source)
    folder = Path(source)
    if folder.exists():
        return lambda name: path if (path := folder / name).is_file() else None
    config = _fetch(source, CONFIG_NAME, None)
    commit = None if config is None else config.parent.name
    return lambda name: _fetch(source, name, commit)


def _fetch(source: str, name: str, commit: str | None) -> Path | None:
    with opening(source), contextlib.suppress(EntryNotFoundError):  # of the cache too, where there is no connection
        return Path(hf_hub_download(source, name, revision=commit))
    return None


def _no_weights(source: str) -> InputError:
    pickled = next((name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if _is_there(source, name)), None)
    if pickled is None:
        where = "there" if Path(source).exists() else "in the repository or, without a connection, in the cache"
        return InputError(f"{source} holds no weights: neither {SAFE_WEIGHTS_NAME} nor its index is {where}")
    target = f"{Path(source).resolve().name}-safetensors"
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"[kind.from_pretrained({json.dumps(source)}).save_pretrained({json.dumps(target)}) for kind in (M, T)]"
    )
    return InputError(
        f"{source} holds pickled weights only ({pickled}), which can run code when they are opened: if you trust them, "
        f"convert them by `python -c {shlex.quote(code)}` and give {target}"
    )


def _is_there(source: str, name: str) -> bool:
    """Whether a model has that file, which is not downloaded."""
    if Path(source).exists():
        return (Path(source) / name).is_file()
    if isinstance(try_to_load_from_cache(source, name), str):
        return True
    with contextlib.suppress(Exception):  # no connection: what is not in the cache is not there
        return bool(file_exists(source, name))
    return False


def _read_index(source: str, index: Path) -> dict[str, str]:
    """The index's map, tensor -> file."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_bytes(), object_pairs_hook=unique_names)["weight_map"]
        outside = [file for file in weight_map.values() if Path(file).is_absolute() or ".." in Path(file).parts]
        if weight_map and not outside:
            return weight_map
        reason = f"names {outside[0]}, which lies outside the folder" if outside else "has no weight_map"
    except InputError as error:
        reason = str(error)
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except ValueError:
        reason = "is not JSON"
    except (LookupError, TypeError, AttributeError):
        reason = "has no weight_map"
    raise InputError(f"the index of the weights of {source} {reason}: {_AGAIN}")


def _shard(source: str, find: Callable[[str], Path | None], name: str) -> Path:
    file = find(name)
    if file is None:
        raise InputError(f"the index of the weights of {source} names {name}, which is not there: {_AGAIN}")
    return file


def _read_file(source: str, file: Path) -> tuple[dict[str, StoredTensor], bytes]:
    """The tensors of one file by name, in its order, and what tells its state: its header and last change."""
    with opening(source):
        # It checks the header and that the file is as long as it says, but does not tell where tensors lie.
        with safe_open(file, "pt"):
            pass
        with file.open("rb") as opened:
            header = opened.read(int.from_bytes(opened.read(8), "little"))
        changed = file.stat().st_mtime_ns
    try:
        rows = json.loads(header, object_pairs_hook=unique_names)
    except InputError as error:
        raise InputError(f"the weights of {source} are damaged (the header of {file.name} {error}): {_AGAIN}") from None
    rows.pop("__metadata__", None)
    tensors = {}
    for name, row in sorted(rows.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = row["data_offsets"]
        dtype, shape = FILE_DTYPES.get(row["dtype"]), tuple(row["shape"])
        if dtype is None:
            raise InputError(f"the weights of {source} hold {name} as {row['dtype']}, which cannot be read: convert it")
        assert end - begin == math.prod(shape) * dtype.itemsize
        tensors[name] = StoredTensor(name, file, dtype, shape, 8 + len(header) + begin, end - begin)
    return tensors, f"{changed}\n".encode() + header


def names_in_files(weights: WeightFiles, model: PreTrainedModel) -> dict[str, str]:
    """Where each tensor of a model is read from: its name in `model.state_dict()` -> its name in the files.

    In the files the prefix of the base model (`transformer.` of GPT-2) may be there or not, and names may be older ones
    (`embed_out` of GPT-NeoX). A tensor that is tied to another is left out.

    Args:
        weights: the files of the model.
        model: the model; on the meta device it will do.

    Raises:
        InputError: weights of another model than config.json's, which transformers makes up, drops or ties with a
            warning: tensors that are missing, of the wrong shape, twice there, in numbers that only something else can
            read, or more than the model has places for; a head of their own where config.json ties it.
    """
    source, state = weights.source, model.state_dict()
    found: dict[str, str] = {}
    own_name = _own_names(model, state)
    for name in weights.tensors:
        own = own_name(name)
        if own in found:
            raise InputError(f"the weights of {source} hold {own} twice, as {found[own]} and {name}: {_AGAIN}")
        found[own] = name
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    for tied, origin in ties.items():
        if tied in found and origin not in found:  # the same tensor by its other name
            found[origin] = found.pop(tied)
    ignored = [_HARMLESS, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    left = [name for name in sorted(found.keys() - state.keys()) if not any(re.search(each, name) for each in ignored)]
    lacking = sorted(name for name in state if name not in found and ties.get(name) not in found)
    if lacking:
        which = lacking[0] if len(lacking) == 1 else f"{len(lacking)} tensors, {lacking[0]} among them"
        raise InputError(f"the weights of {source} lack {which}{_other(left)}")
    for name in sorted(found.keys() & state.keys()):
        _check_tensor(source, weights.tensors[found[name]], state[name])
    if left:
        raise InputError(
            f"config.json of {source} has no place for {len(left)} tensors of the weights, {left[0]} among them: "
            "correct it, or get the model again"
        )
    if any(not _equal(weights, found[tied], found[origin]) for tied, origin in ties.items() if tied in found):
        raise InputError(
            f"config.json of {source} ties the output head to the embeddings, but the weights hold another head: "
            "set tie_word_embeddings to false in it"
        )
    return {name: found[name] for name in state if name in found and name not in ties}


def _other(left: Sequence[str]) -> str:
    """What to do about tensors that are missing, by those that are there in their place."""
    if not left:
        return ": get them again, or correct config.json (tie_word_embeddings, biases)"
    return (
        f", and hold {len(left)} that it has no place for, {left[0]} among them: rename them, or save the model again "
        "without what is around it"
    )


def _check_tensor(source: str, stored: StoredTensor, wanted: torch.Tensor) -> None:
    if stored.shape != tuple(wanted.shape):
        sizes = f"{stored.shape} in the file, {tuple(wanted.shape)} by config.json"
        raise InputError(f"the weights of {source} do not fit: {stored.name} is {sizes}")
    if wanted.is_floating_point() and stored.dtype not in _NUMBERS:
        kind = str(stored.dtype).removeprefix("torch.")
        raise InputError(
            f"the weights of {source} hold {stored.name} as {kind}, which are no weights without their scales: give "
            "the model unquantised"
        )


def _own_names(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> Callable[[str], str]:
    """What turns a name in the files into the model's, by the rules of transformers."""
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]

    def own_name(name: str) -> str:
        for rules in (renamings, []):  # a name that a rule spoils may be right as it is
            own: str = rename_source_key(name, rules, [], model.base_model_prefix, state)[0]
            if own in state:
                return own
        return name

    return own_name


def _equal(weights: WeightFiles, name: str, other: str) -> bool:
    values = weights.read((name, other))
    return torch.equal(values[name], values[other].to(values[name].dtype))
