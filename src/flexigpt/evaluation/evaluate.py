"""What models are worth, side by side: perplexity, benchmark tasks, and how near they stay to their source."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexigpt.evaluation.fidelity import measure_fidelity
from flexigpt.evaluation.perplexity import check_stride, perplexity
from flexigpt.model import materialize, stored_bytes
from flexigpt.runtime import InputError, T, Track, check_dtype, device_name, find_device, flag, silent
from flexigpt.text import DEFAULT_TEXT, TokenizedText, check_window_length, tokenize_text
from flexigpt.weights import has_replicas, load_model, load_tokenizer, model_fingerprint, read_config

Evaluation = dict[str, Any]

_ACCURACIES = ("acc_norm", "acc")

_NEEDS = {
    "perplexity": ("text_column", "window_length", "stride", "against"),
    "tasks": ("num_fewshot", "limit", "batch_size", "include_path"),
}


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to measure, and how: perplexity, tasks, or both.

    Attributes:
        perplexity: text to measure perplexity on: a .txt, .jsonl, .jsonl.gz or .parquet file, or NAME[:CONFIG][@SPLIT]
            of a data set on the hub; the paper's is JeanKaddour/minipile.
        text_column: column that holds the text; default: text.
        window_length: tokens in a window; default: the shortest context of the models, at most 2048.
        stride: tokens from one window's start to the next's; default: the window length, no overlap.
        against: source to hold the models against, on the text of --perplexity: divergence and agreement.
        tasks: benchmarks of the LM Evaluation Harness, by its names; the paper's are arc_easy, arc_challenge, piqa,
            winogrande and hellaswag.
        num_fewshot: solved examples before each question; default: what the task says, mostly 0.
        limit: questions of each task, the first ones; default: all.
        batch_size: requests in one forward pass; default: auto, as many as fit.
        include_path: folder with task files of your own.
        materialize: folds the replicas' adapters into weights of their own first: faster, in the memory of the source.
        dtype: auto (the checkpoint's), float32, bfloat16 or float16.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
    """

    perplexity: str | None = None
    text_column: str | None = None
    window_length: int | None = None
    stride: int | None = None
    against: str | None = None
    tasks: Sequence[str] | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | str | None = None
    include_path: Path | None = None
    materialize: bool = False
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.perplexity is None and self.tasks is None:
            raise InputError(
                f"nothing to measure: give --perplexity TEXT (the paper's is {DEFAULT_TEXT}), --tasks, or both"
            )
        for needed, fields in _NEEDS.items():
            for name in fields:
                if getattr(self, needed) is None and getattr(self, name) is not None:
                    raise InputError(f"{flag(name)} has no effect without --{needed}: give one, or leave it out")
        if self.tasks is not None:
            _check_tasks(self)


def _check_tasks(options: EvalOptions) -> None:
    tasks = list(options.tasks or ())
    if not tasks or not all(tasks):
        raise InputError("--tasks names a task that is empty: give names with commas between them, as arc_easy,piqa")
    twice = next((name for name in tasks if tasks.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"--tasks names {twice} twice: give it once")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise InputError(f"--num-fewshot {options.num_fewshot} is negative: give 0 or more")
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit {options.limit} is too small: give at least 1, or leave it out for all questions")
    size = options.batch_size
    if size not in (None, "auto") and not (str(size).isdecimal() and int(size) >= 1):
        raise InputError(f"--batch-size {size} cannot be used: give auto or a number from 1")


def evaluate(models: str | Sequence[str], options: EvalOptions, track: Track = silent) -> Evaluation:
    """Measures models side by side, one in memory at a time (beside the source of `against`).

    Args:
        models: folders or hub names, source or compact.
        options: what to measure, and how.
        track: told of each stage.

    Returns:
        JSON-ready: `format` (1), `versions`, `command` (None: the command line fills it in), `device`, `dtype`,
        `options` and `models`, in order: each with `name`, `revision` (the hub's commit, or a fingerprint of the
        files), `parameters` and `bytes` stored, and what was asked for: `perplexity` with its `text`; `tasks`, as
        `harness.Tasks.measure` returns them, and `tasks_mean` of their accuracies; `fidelity`, as `measure_fidelity`
        returns it.

    Raises:
        InputError: models, texts, tasks or task data that cannot be used, a window that does not fit. What can be told
            before weights are read is told then.
    """
    names = [models] if isinstance(models, str) else list(models)
    check_dtype(options.dtype)
    device = find_device(options.device)
    window_length = _check_models(names, options)
    tokenizers = {name: load_tokenizer(name) for name in names}
    _check_against(options.against, tokenizers)
    tasks = None if options.tasks is None else _load_tasks(options)
    texts = {name: _tokenize(options, tokenizer, window_length) for name, tokenizer in tokenizers.items()}
    source = None if options.against is None else load_model(options.against, options.dtype, options.device)
    entries, dtypes = [], []
    for number, (name, tokenizer) in enumerate(tokenizers.items(), 1):
        folded = options.materialize and has_replicas(name)
        same = source is not None and is_same(name, str(options.against)) and not folded
        model = source if same and source is not None else load_model(name, options.dtype, options.device)
        told = track if len(names) == 1 else _numbered(track, f"{number}/{len(names)}")
        entry = _size(name, model)
        if folded:
            materialize(model)
        text = texts[name]
        if text is not None:
            measured = perplexity(model, text, window_length=window_length, stride=options.stride, track=told)
            entry["perplexity"] = {"text": options.perplexity, **measured.to_dict()}
        if text is not None and source is not None:
            entry["fidelity"] = measure_fidelity(
                model, source, text, window_length=window_length, against=str(options.against), track=told
            )
        if tasks is not None:
            entry |= tasks.measure(model, tokenizer, told)
            entry |= mean_accuracy(entry["tasks"])
        entries.append(entry)
        dtypes.append(str(model.dtype).removeprefix("torch."))
        del model  # before the next one is read
    resolved = {} if options.perplexity is None else {"window_length": window_length}
    return {
        "format": 1,
        "versions": {name: version(name) for name in ("flexigpt", "torch", "transformers", "lm_eval", "datasets")},
        "command": None,
        "device": device_name(device),
        "dtype": ", ".join(dict.fromkeys(dtypes)),
        "options": _plain(asdict(options) | resolved),
        "models": entries,
    }


def is_same(model: str, other: str) -> bool:
    """Whether two names mean the same model."""
    return model == other or (Path(model).exists() and Path(model).resolve() == Path(other).resolve())


def mean_accuracy(tasks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """`tasks_mean`, the mean of the tasks' accuracies, where all are accuracies."""
    if any(task["metric"] not in _ACCURACIES for task in tasks.values()):
        return {}
    return {"tasks_mean": sum(task["value"] for task in tasks.values()) / len(tasks)}


def _check_models(names: list[str], options: EvalOptions) -> int:
    """Refuses models that cannot be opened, and returns the window length that fits all."""
    for number, name in enumerate(names):
        if any(is_same(name, other) for other in names[:number]):
            raise InputError(f"the model {name} is given twice: give it once")
    if options.materialize and not any(map(has_replicas, names)):
        raise InputError(f"--materialize has no effect, since {', '.join(names)} has no replicas: leave it out")
    opened = [*names, *([] if options.against is None else [options.against])]
    configs = [read_config(name) for name in opened]
    shortest = min(configs, key=lambda config: check_window_length(None, config))
    window_length = check_window_length(options.window_length, shortest)
    check_stride(options.stride, window_length)
    return window_length


def _check_against(source: str | None, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """Predictions can only be held against those over the same tokens."""
    if source is None:
        return
    vocabulary = load_tokenizer(source).get_vocab()
    for name, tokenizer in tokenizers.items():
        if tokenizer.get_vocab() != vocabulary:
            raise InputError(f"--against {source} has another tokenizer than {name}: give the source it was made from")


def _load_tasks(options: EvalOptions) -> Any:
    # By name: lm_eval and what it imports take seconds, which no other command has to wait for.
    from flexigpt.evaluation.tasks import Tasks  # noqa: PLC0415 - lm_eval takes a second or more

    return Tasks(
        options.tasks,
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size="auto" if options.batch_size is None else options.batch_size,
    )


def _tokenize(options: EvalOptions, tokenizer: PreTrainedTokenizerBase, window_length: int) -> TokenizedText | None:
    if options.perplexity is None:
        return None
    return tokenize_text(options.perplexity, tokenizer, window_length=window_length)


def _numbered(track: Track, place: str) -> Track:
    """Says with each stage which of several models it is about."""

    def numbered(items: Iterable[T], stage: str, total: int) -> Iterator[T]:
        return track(items, f"{place} {stage}", total)

    return numbered


def _size(name: str, model: PreTrainedModel) -> dict[str, Any]:
    revision = getattr(model.config, "_commit_hash", None) or model_fingerprint(name)
    return {
        "name": name,
        "revision": revision,
        "parameters": model.num_parameters(),
        "bytes": stored_bytes(model),
    }


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
