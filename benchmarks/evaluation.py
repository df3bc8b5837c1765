"""`flexigpt eval --tasks` against plain lm_eval on the same model and questions: requests a second, and equal figures.

Both run in this process, from names to figures (opening model and data included), in turn; float32. And `--perplexity`
against a loop of ten lines, and against the bare products of its linears, all in CPU time.

python benchmarks/evaluation.py > benchmarks/results/evaluation.md
python benchmarks/evaluation.py --products --model out/smollm2-135m
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexigpt import EvalOptions, evaluate
from flexigpt.evaluation import perplexity
from flexigpt.model import fast_half
from flexigpt.text import tokenize_text
from flexigpt.weights import load_model, load_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
BENCHMARKS = ("arc_easy", "arc_challenge", "piqa", "winogrande", "hellaswag")
TASKS = [f"{name}_sample" for name in BENCHMARKS]
Figures = dict[str, dict[str, float]]


@contextmanager
def task_files(data: Path | None) -> Iterator[Path]:
    """The folder of the samples, or one like it with all questions of `data`, a .parquet or .jsonl file a benchmark."""
    if data is None:
        yield EXAMPLES / "benchmarks"
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(EXAMPLES / "benchmarks", Path(name) / "tasks"))
        for benchmark in BENCHMARKS:
            (file,) = data.glob(f"{benchmark}_*")
            lines = file.read_text(encoding="utf-8").splitlines() if file.suffix == ".jsonl" else rows_of(file)
            (folder / f"{benchmark}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield folder


def rows_of(file: Path) -> list[str]:
    return [json.dumps(row) for row in pyarrow.parquet.read_table(file).to_pylist()]


def ours(model: str, folder: Path, batch_size: int | str, limit: int | None) -> Figures:
    options = EvalOptions(tasks=TASKS, include_path=folder, batch_size=batch_size, limit=limit, dtype="float32")
    tasks = evaluate(model, options)["models"][0]["tasks"]
    return {name: task["metrics"] for name, task in tasks.items()}


def theirs(model: str, folder: Path, batch_size: int | str, limit: int | None) -> Figures:
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32"},
        tasks=TASKS,
        batch_size=batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        limit=limit,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=False,
    )
    results = found["results"]
    return {t: {k.removesuffix(",none"): v for k, v in results[t].items() if "," in k} for t in TASKS}


def timed(function: Callable[..., Figures], *arguments: object) -> tuple[float, float, Figures]:
    """Seconds on the clock and of this process on the CPU, which other processes disturb less, and the figures."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        started, worked = time.perf_counter(), time.process_time()
        figures = function(*arguments)
        return time.perf_counter() - started, time.process_time() - worked, figures


def both(model: str, folder: Path, sizes: tuple[int | str, int | str], limit: int | None, number: int) -> list[Any]:
    """What `timed` returns of both, ours first; which of them runs first changes from run to run."""
    functions = list(zip((ours, theirs), sizes, strict=True))
    results = [timed(f, model, folder, size, limit) for f, size in functions[:: 1 if number % 2 == 0 else -1]]
    return results[:: 1 if number % 2 == 0 else -1]


def count_requests(folder: Path, limit: int | None) -> tuple[int, int]:
    """Questions and requests: one for each choice."""
    tasks = TaskManager(include_path=str(folder), include_defaults=False).load(list(TASKS))["tasks"].values()
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        for task in tasks:
            task.set_config(key="num_fewshot", value=0)
            task.build_all_requests(limit=limit, rank=0, world_size=1)
    return sum(len({i.doc_id for i in t.instances}) for t in tasks), sum(len(t.instances) for t in tasks)


@torch.no_grad()
def loop_perplexity(model: str, text: str, length: int) -> float:
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokenize_text(text, tokenizer, window_length=length).ids
    total = 0.0
    for start in range(0, len(ids) - 1, length):
        window = ids[start : start + length + 1]
        logits = network(window[None, :-1]).logits[0]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (len(ids) - 1))


def compare_perplexity(model: str) -> None:
    text = str(EXAMPLES / "novel16" / "validation.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "text.jsonl"
        short.write_text(
            "".join(Path(text).read_text(encoding="utf-8").splitlines(keepends=True)[:4]), encoding="utf-8"
        )
        options = EvalOptions(perplexity=str(short), window_length=256, dtype="float32", device="cpu")
        measured = evaluate(model, options)["models"][0]["perplexity"]
        expected = loop_perplexity(model, str(short), 256)
    apart = abs(measured["perplexity"] / expected - 1)
    assert apart < 1e-6, apart
    print(f"\nPerplexity on {measured['tokens']:,} tokens: {measured['perplexity']:.6f}, by a loop of ten lines")
    print(f"{expected:.6f}: {apart:.1e} apart.")


def share_of_products(model: str, dtype: str, tokens: int = 4096, length: int = 256) -> float:
    """CPU time of the products of all linears with as many rows as a window has, over that of measuring perplexity."""
    network, tokenizer = load_model(model, dtype).eval(), load_tokenizer(model)
    text = tokenize_text(str(EXAMPLES / "novel16" / "validation.jsonl"), tokenizer, window_length=length)
    text = replace(text, ids=text.ids[: tokens + 1])

    def measured(function: Callable[[], object]) -> float:
        began = time.process_time()
        function()
        return time.process_time() - began

    products = 0.0
    with torch.no_grad(), fast_half(network):
        for linear in (module for module in network.modules() if isinstance(module, torch.nn.Linear)):
            rows = torch.randn(length, linear.in_features, dtype=linear.weight.dtype)
            products += min(measured(lambda: linear(rows)) for _ in range(3)) * tokens / length  # noqa: B023 - at once
    return products / min(measured(lambda: perplexity(network, text, window_length=length)) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EXAMPLES / "novel16"))
    parser.add_argument("--data", type=Path, help="folder with whole benchmarks; default: the samples")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=int, help="questions of each benchmark")
    parser.add_argument("--products", action="store_true", help="the share of the linears' products alone")
    arguments = parser.parse_args()
    if arguments.products:
        for dtype in ("float32", "bfloat16"):
            share = share_of_products(arguments.model, dtype)
            print(f"{Path(arguments.model).name}, {dtype}, {torch.get_num_threads()} threads: {share:.0%}")
        return
    print("# Evaluation\n")
    command = " ".join(["python", "benchmarks/evaluation.py", *sys.argv[1:]])
    print(f"`{command}`: torch {torch.__version__}, lm_eval {version('lm_eval')},")
    print(f"{torch.get_num_threads()} threads, {platform.machine()}; {Path(arguments.model).name}, float32.")
    with task_files(arguments.data) as folder:
        questions, requests = count_requests(folder, arguments.limit)
        which = "the samples" if arguments.data is None else "whole benchmarks"
        print(f"{questions:,} questions, {requests:,} requests, of the five benchmarks ({which}); medians of")
        print(f"{arguments.repeats} runs in turn, from names to figures.\n")
        print("| | flexigpt eval, requests/s | lm_eval, requests/s | ratio | ratio by CPU time | figures |")
        print("| --- | ---: | ---: | ---: | ---: | --- |")
        for function in (ours, theirs):
            timed(function, arguments.model, folder, 8, 2)  # what is imported or read for the first time
        for heading, sizes in (("batch size 8 for both", (8, 8)), ("each one's default", ("auto", 1))):
            pairs = [both(arguments.model, folder, sizes, arguments.limit, n) for n in range(arguments.repeats)]
            equal = all(mine[2] == other[2] for mine, other in pairs)
            assert equal or sizes[0] != sizes[1], "the figures differ"
            rates = [statistics.median(requests / pair[which][0] for pair in pairs) for which in (0, 1)]
            ratios = [statistics.median(other[unit] / mine[unit] for mine, other in pairs) for unit in (0, 1)]
            cells = [*(f"{rate:.1f}" for rate in rates), *(f"{ratio:.2f}" for ratio in ratios)]
            print(f"| {heading} | {' | '.join(cells)} | {'equal' if equal else 'differ'} |", flush=True)
    compare_perplexity(arguments.model)


if __name__ == "__main__":
    main()
