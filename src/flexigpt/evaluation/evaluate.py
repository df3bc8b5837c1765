"""What models are worth, side by side: perplexity, benchmark tasks, and how near they stay to their source."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from flexigpt.evaluation.continuations import continuations, prompts_from
from flexigpt.evaluation.fidelity import measure_fidelity
from flexigpt.evaluation.options import EvalOptions
from flexigpt.evaluation.perplexity import perplexity
from flexigpt.model import stored_bytes
from flexigpt.runtime import InputError, T, Track, device_name, find_device, silent, versions
from flexigpt.text import check_tokenizer, check_window_length, tokenize_text
from flexigpt.weights import load_model, load_tokenizer, model_fingerprint, read_config

Evaluation = dict[str, Any]

_ACCURACIES = ("acc_norm", "acc")


def evaluate(
    models: str | Sequence[str],
    options: EvalOptions,
    track: Track = silent,
    note: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Measures models side by side, one in memory at a time (beside the source of `against`).

    Args:
        models: folders or hub names, source or compact.
        options: what to measure, and how.
        track: reports the progress of each stage.
        note: takes a line, before task files of the user's run code.

    Returns:
        JSON-ready: `format` (1), `versions`, `command` (None: the command line fills it in), `device`, `dtype`,
        `options` and `models`, in order: each with `name`, `revision` (the hub's commit, or a fingerprint of the
        files), `parameters` and `bytes` stored, and what was asked for: `perplexity` with its `text`, and
        `continuations` of the same words of it (`prompt` and `text` of each); `tasks`, as `Tasks.measure` returns them,
        and `tasks_mean` of their accuracies; `fidelity`, as `measure_fidelity` returns it.

    Raises:
        InputError: models, texts, tasks or task data that cannot be used, a window that does not fit. What is known
            before weights are read is said then.
    """
    names = [models] if isinstance(models, str) else list(models)
    device = find_device(options.device)
    window_length = _check_models(names, options)
    tokenizers = {name: load_tokenizer(name) for name in names}
    for name, tokenizer in tokenizers.items():
        check_tokenizer(name, tokenizer, read_config(name))
    against = None if options.perplexity is None else options.against
    if against is not None:
        vocabulary = load_tokenizer(against).get_vocab()
        other = next((name for name in names if tokenizers[name].get_vocab() != vocabulary), None)
        if other is not None:
            raise InputError(
                f"--against {against} has another tokenizer than {other}: give the source it was made from"
            )
    tasks: Any = None
    if options.tasks is not None:
        from flexigpt.evaluation.tasks import Tasks  # noqa: PLC0415 - lm_eval takes a second or more

        tasks = Tasks(options, note)
        for name, tokenizer in tokenizers.items():
            tasks.check(name, tokenizer)
    texts, prompts = {}, list[str]()
    if options.perplexity is not None:
        for name, tokenizer in tokenizers.items():
            texts[name] = tokenize_text(options.perplexity, tokenizer, window_length=window_length)
        prompts = prompts_from(texts[names[0]], tokenizers[names[0]], window_length)
    source = None if against is None else load_model(against, options.dtype, options.device)
    entries, dtypes = [], []
    for number, (name, tokenizer) in enumerate(tokenizers.items(), 1):
        same = source is not None and is_same(name, str(against))
        model = source if same and source is not None else load_model(name, options.dtype, options.device)
        numbered = track if len(names) == 1 else _numbered(track, f"{number}/{len(names)}")
        entry = _size(name, model)
        if name in texts:
            measured = perplexity(
                model, texts[name], window_length=window_length, stride=options.stride, track=numbered
            )
            entry["perplexity"] = {"text": options.perplexity} | measured
            entry["continuations"] = continuations(model, tokenizer, prompts, window_length)
        if source is not None:
            entry["fidelity"] = measure_fidelity(
                model, source, texts[name], window_length=window_length, against=str(against), track=numbered
            )
        if tasks is not None:
            entry |= tasks.measure(model, tokenizer, numbered)
            entry |= mean_accuracy(entry["tasks"])
        entries.append(entry)
        dtypes.append(str(model.dtype).removeprefix("torch."))
        del model  # before the next one is read
    return {
        "format": 1,
        "versions": versions("lm_eval", "datasets"),
        "command": None,
        "device": device_name(device),
        "dtype": ", ".join(dict.fromkeys(dtypes)),
        "options": _asked(options, window_length),
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
    configs = [read_config(name) for name in (*names, *([] if options.against is None else [options.against]))]
    shortest = min(configs, key=lambda config: check_window_length(None, config))
    return check_window_length(options.window_length, shortest)


def _numbered(track: Track, place: str) -> Track:
    """Says with each stage which of several models it is about."""

    def numbered(items: Iterable[T], stage: str, total: int) -> Iterator[T]:
        return track(items, f"{place} {stage}", total)

    return numbered


def _size(name: str, model: PreTrainedModel) -> dict[str, Any]:
    revision = getattr(model.config, "_commit_hash", None) or model_fingerprint(name)
    return {"name": name, "revision": revision, "parameters": model.num_parameters(), "bytes": stored_bytes(model)}


def _asked(options: EvalOptions, window_length: int) -> dict[str, Any]:
    """The options that had an effect, JSON-ready."""
    asked = asdict(options)
    if options.perplexity is not None:
        asked["window_length"] = window_length
    if options.tasks is None:
        del asked["batch_size"]
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in asked.items() if value is not None
    }
