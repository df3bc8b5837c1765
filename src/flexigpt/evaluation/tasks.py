"""Benchmark tasks through the LM Evaluation Harness (lm_eval), as it is installed: the only file that knows it.

Importing lm_eval takes a second or more, so `evaluate.py` imports this module only when tasks are asked for.
"""

import contextlib
import difflib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexigpt.evaluation.options import EvalOptions
from flexigpt.model import fast_half
from flexigpt.runtime import InputError, Track, one_line, silent
from flexigpt.text import batch_size_for

# Shown of each task: the first of these that lm_eval returns, which gives the figures of the paper's tables.
_SHOWN = ("acc_norm", "acc")

# Numbers in one batch's logits: lm_eval keeps some three copies. On a GPU also at most a part of what is free.
_CPU_LOGITS, _GPU_LOGITS, _GPU_FREE_PART = 2**24, 2**28, 32


class Tasks:
    """Tasks with their data, loaded once for all models.

    Args:
        options: `tasks` as lm_eval names them, groups and tags too; task files in `include_path` go before lm_eval's of
            the same name.
        note: takes a line that names the user's task files in use that run code.

    Raises:
        InputError: an unknown task, task files or data that cannot be read, or too few examples.
    """

    def __init__(self, options: EvalOptions, note: Callable[[str], None] = lambda _: None) -> None:
        self._options = options
        names = list(options.tasks or ())
        with _quiet():
            self._manager = _manager(names, options.include_path)
        if files := _with_code(self._manager, names):
            note(f"the tasks run code of the user's own, named in {', '.join(files)}")
        with _quiet():
            self._loaded = {name: _load(self._manager, name) for name in names}
        asked: dict[str, str] = {}
        for name, loaded in self._loaded.items():
            for task_name, task in loaded["tasks"].items():
                if task_name in asked:
                    raise InputError(f"task {task_name} is in {asked[task_name]} and in {name}: leave one out")
                asked[task_name] = name
                sampler, shots = getattr(task, "sampler", None), options.num_fewshot
                examples = 0 if sampler is None else len(sampler.df)
                if shots and shots >= examples:  # the question itself cannot be one of them
                    raise InputError(
                        f"--num-fewshot {shots} is too many: task {task_name} has {examples} examples to choose from"
                    )

    def check(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses a tokenizer that lacks a token which these tasks need.

        Args:
            name: of the model that it belongs to.
            tokenizer: the model's.

        Raises:
            InputError: neither a token for the beginning nor one for the end, or none for the end of what is generated.
        """
        kinds = {task.OUTPUT_TYPE for loaded in self._loaded.values() for task in loaded["tasks"].values()}
        needed = "an end" if "generate_until" in kinds else "a beginning or an end"
        if tokenizer.eos_token_id is None and ("generate_until" in kinds or tokenizer.bos_token_id is None):
            raise InputError(
                f"the tokenizer of {name} has no token for {needed}, which these tasks need: set eos_token in its "
                "tokenizer_config.json"
            )

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, track: Track = silent
    ) -> dict[str, Any]:
        """What lm_eval's `simple_evaluate` measures of a model.

        Args:
            model: source or compact, in eval mode.
            tokenizer: the model's.
            track: reports the progress, request by request.

        Returns:
            `tasks`, by task (of a group that lm_eval sums up, the group): the `metric` shown (`acc_norm` where there is
            one, else `acc`, else the first), its `value` and `stderr` (None where lm_eval gives none), `samples`
            measured, `num_fewshot`, the task's `version`, and all `metrics`. And `truncated`, where there were any:
            requests longer than the model's context, which lost their beginning.

        Raises:
            InputError: questions that do not fit into the model's context, or that a task file of the user's spoils.
        """
        lm = _Model(model, tokenizer, self._options.batch_size, track)
        with _quiet(), self._faults_told():
            found = simple_evaluate(
                model=lm,
                tasks=[task for loaded in self._loaded.values() for task in _parts(loaded)],
                num_fewshot=self._options.num_fewshot,
                limit=self._options.limit,
                task_manager=self._manager,
                log_samples=False,
            )
        tasks = {row: _row(found, row, one["tasks"]) for one in self._loaded.values() for row in _rows(found, one)}
        return {"tasks": tasks} | ({"truncated": lm.truncated} if lm.truncated else {})

    @contextlib.contextmanager
    def _faults_told(self) -> Iterator[None]:
        """Within it what the user's own tasks raise, which are code, becomes one line."""
        try:
            yield
        except (InputError, RuntimeError, MemoryError):  # the latter two are of the model
            raise
        except Exception as error:
            if self._options.include_path is None:
                raise
            names, what = ", ".join(self._loaded), f"{type(error).__name__}: {one_line(error)}"
            raise InputError(f"{names} cannot be measured ({what}): check the files of --include-path") from error


class _Model(HFLM):
    """lm_eval's Hugging Face model around one that is loaded, with our progress and batch size."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str, track: Track
    ) -> None:
        self._auto, self._track, self._stderr = batch_size == "auto", track, sys.stderr
        with _quiet():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1 if self._auto else batch_size)
        self.truncated = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """lm_eval's own."""
        empty = next((request for request in requests if not request.args[1]), None)
        if empty is not None:
            asked = one_line(empty.args[0])[-60:]
            raise InputError(f"task {empty.task_name} has an empty answer (to {asked!r}): correct the task file")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        lengths = [len(context) + len(answer) - 1 for _, context, answer in requests]
        if any(len(answer) > self.max_length for *_, answer in requests):
            raise InputError(f"an answer is longer than the model's context of {self.max_length}: leave the task out")
        self.truncated += sum(length > self.max_length for length in lengths)
        longest = min(max(lengths, default=1), self.max_length)
        with self._reported(len(requests), longest), fast_half(self.model):
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        empty = next((one for one in requests if not one.args[0].strip() and not self.tok_encode(one.args[0])), None)
        if empty is not None:
            raise InputError(f"task {empty.task_name} has an empty question: correct the task file")
        with self._reported(len(requests), self.max_length):
            return super().generate_until(requests, disable_tqdm=True)

    @contextlib.contextmanager
    def _reported(self, total: int, length: int) -> Iterator[None]:
        """Within it every answer is reported, through the hook that lm_eval has for a cache of answers.

        A batch has as many requests of that many tokens as the logits' budget lets: lm_eval's own search is for GPUs.
        """
        if self._auto:
            budget = _CPU_LOGITS
            if self.device.type == "cuda":
                budget = min(_GPU_LOGITS, torch.cuda.mem_get_info(self.device)[0] // _GPU_FREE_PART)
            vocabulary = self.model.config.get_text_config().vocab_size
            self.batch_size_per_gpu = batch_size_for(length, vocabulary, budget)
        with contextlib.redirect_stderr(self._stderr):
            answers = self._track(range(total), "answering", total)
            next(answers, None)
            self.set_cache_hook(SimpleNamespace(add_partial=lambda *_: next(answers, None)))
            yield
            for _ in answers:
                pass


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the logs, prints and bars of lm_eval and its libraries off the terminal; errors come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Bars that build the requests cannot be switched off. Warnings are about task files of others.
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(action="ignore", category=SyntaxWarning),
        ):
            yield
    finally:
        logging.disable(before)


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """Knows the tasks of that name, the user's own before lm_eval's; all 14,000 of them only where it must.

    To read them takes several seconds, and most tasks lie in a folder with which their name begins: those are tried
    first. Groups and tags may reach into any folder.
    """
    own = []
    if include_path is not None:
        _check_task_files(include_path)
        own = [str(include_path)]
    folders = Path(lm_eval.tasks.__file__).parent.iterdir()
    near = [str(folder) for folder in folders if folder.is_dir() and any(n.startswith(folder.name) for n in names)]
    try:
        for places in (own, [*near, *own]):
            manager = TaskManager(include_path=places, include_defaults=False)
            if set(names) <= set(manager.all_subtasks):
                return manager
        manager = TaskManager(include_path=own)
    except TypeError as error:  # what it makes of names that are no words
        raise InputError(f"--include-path {include_path} has a task file without a name: give it a `task`") from error
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm_eval ls tasks` lists them"
            raise InputError(f"task {name} is unknown: {hint}")
    return manager


def _check_task_files(folder: Path) -> None:
    """lm_eval would pass over a file that it cannot read."""
    if not os.path.isdir(folder):
        raise InputError(f"--include-path {folder} is no folder: give one with task files (.yaml)")
    files = sorted(folder.glob("**/*.yaml"))
    if not files:
        raise InputError(f"--include-path {folder} holds no task file: give a folder with .yaml files")
    for file in files:
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise InputError(f"the task file {file} cannot be read: {one_line(error)}") from error


def _with_code(manager: Any, names: Sequence[str]) -> list[str]:
    """The user's own files, of these tasks and of what groups, tags and files lead to, that name code to run."""
    folder, todo, seen = Path(lm_eval.tasks.__file__).parent, list[str | Path](names), dict[str | Path, bool]()
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen[one] = False
        if isinstance(one, str):
            entry = manager.task_index[one]
            todo += entry.tags if entry.yaml_path is None else [entry.yaml_path]
        elif not one.is_relative_to(folder):
            events = [event for event in yaml.parse(one.read_text(encoding="utf-8")) if hasattr(event, "value")]
            words = [event.value for event in events]
            seen[one] = "class" in words or any(event.tag == "!function" for event in events)
            # Any of its words may be a file to include, or a task of a group.
            todo += [one.parent / word for word in words if word.endswith(".yaml") and (one.parent / word).is_file()]
            todo += [word for word in words if "group" in words and word in manager.task_index]
    return [str(file) for file, has in seen.items() if has]


def _load(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except OSError as error:  # among them what `datasets` raises for a data set that it does not find or reach
        raise InputError(
            f"the data of task {name} cannot be read: {one_line(error)}: check the connection, or give --include-path "
            "with a task file for a copy of your own"
        ) from error
    except Exception as error:  # a task is code
        raise InputError(f"task {name} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error


def _parts(loaded: Any) -> list[Any]:
    """What `simple_evaluate` is given for one name: its group, or its tasks."""
    groups = loaded["groups"]
    inner = {child for children in loaded["group_map"].values() for child in children}
    return [group for name, group in groups.items() if name not in inner] if groups else list(loaded["tasks"].values())


def _rows(found: Any, loaded: Any) -> list[str]:
    """The results for one name: of a group that lm_eval sums up the group's, else those of its tasks."""
    groups = [part.name for part in _parts(loaded)] if loaded["groups"] else []
    return [name for name in groups if name in found.get("groups", {})] or list(loaded["tasks"])


def _row(found: Any, row: str, tasks: Any) -> dict[str, Any]:
    results = found["results"][row] if row in found["results"] else found["groups"][row]
    keys = [key for key in results if "," in key and "_stderr," not in key]
    metric = next((key for name in _SHOWN for key in keys if key.split(",")[0] == name), keys[0])
    samples, stderr = found["n-samples"], results.get(metric.replace(",", "_stderr,", 1))
    return {
        "metric": metric.removesuffix(",none"),
        "value": float(results[metric]),
        "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        "samples": sum(samples[name]["effective"] for name in ([row] if row in samples else tasks)),
        "num_fewshot": found["n-shot"].get(row),
        "version": found["versions"].get(row),
        "metrics": {key.removesuffix(",none"): value for key, value in results.items() if "," in key},
    }
