"""What a compact model costs to run, held against its source: time, throughput, memory, storage (tables 6 and 7)."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from flexigpt.decoding.variants import (
    Clock,
    Models,
    Opened,
    PeakRequest,
    Timing,
    open_variants,
    peak_memory,
    pruned_of,
    spread,
    time_generation,
)
from flexigpt.model import FlexiGPTConfig, config_dtype, stored_bytes
from flexigpt.record import Rows, markdown
from flexigpt.runtime import InputError, Track, check_dtype, device_name, find_device, flag, megabytes, silent
from flexigpt.text import tokenize_text
from flexigpt.weights import load_tokenizer, read_config

Benchmark = dict[str, Any]

_SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")

_WARM_UP_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What to time, and how.

    Attributes:
        against: source that the model was made from: all times are told in percent of its.
        removal: source with the pruned blocks removed, as flexigpt baseline wrote it; default: made from the source.
        speculative: times speculative decoding too, one sequence at a time.
        batch_sizes: sequences that are generated at once.
        prompt_tokens: tokens in each prompt.
        new_tokens: tokens that follow each prompt.
        repeats: times that all is measured, every variant in turn.
        prompt: text that the prompts are taken from: a .txt, .jsonl, .jsonl.gz or .parquet file; default: random
            tokens.
        cpu_time: counts the process's CPU time instead of time passed: with one thread, beside other work.
        dtype: auto (each checkpoint's), float32, bfloat16 or float16.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
    """

    against: str
    removal: str | None = None
    speculative: bool = False
    batch_sizes: Sequence[int] = (1, 8)
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 5
    prompt: str | None = None
    cpu_time: bool = False
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        sizes = list(self.batch_sizes)
        if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
            given = ",".join(map(str, sizes)) or "none"
            raise InputError(f"--batch-sizes {given} cannot be used: give different numbers from 1, as 1,8")
        if self.speculative and 1 not in sizes:
            raise InputError("--speculative decodes one sequence at a time: add 1 to --batch-sizes, or leave it out")
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{flag(name)} {getattr(self, name)} is too small: give at least {least}")


def benchmark(model: str, options: BenchmarkOptions, track: Track = silent) -> Benchmark:
    """Times a model's variants and its source, every variant in turn, and measures what memory each takes.

    The variants are the source, plain removal of the pruned blocks, the compact model, the same materialised, and
    decoded speculatively. All of them are in memory at once, or their times could not be taken in turn: source and
    compact model, and of the materialised one the replicas.

    Args:
        model: folder or hub name of a compact model, or of another model of the source's shape.
        options: against what, and how.
        track: told of the progress of each stage.

    Returns:
        JSON-ready: `format` (1), `versions`, `command` (None: the command line fills it in), `device`, `dtype`,
        `threads`, `load` (of the machine at the end, in processes), `clock` (wall or cpu), `peak_bytes_of_libraries`
        (None on a GPU), `options`, and `variants`: each with `variant`, `model` (None: made from the source),
        `parameters` and `weight_bytes` in memory, `stored_bytes` on disk, `load_seconds`, `peak_bytes` and `batches`,
        one for each batch size: seconds, rates and percent of the source's, each as median, least and most; percent
        are of ratios within a repeat.

    Raises:
        InputError: options that do not fit the models; a model that cannot be opened.
    """
    check_dtype(options.dtype)
    device = find_device(options.device)
    if options.cpu_time and device.type != "cpu":
        raise InputError(f"--cpu-time counts nothing of what {device} does: leave it out")
    variants = variants_of(model, options)
    models = Models(
        model=model, source=options.against, removal=options.removal, dtype=options.dtype, device=options.device
    )
    ids = _prompts(model, options)
    peaks = {} if device.type == "cuda" else _peaks_alone(variants, models, ids, options)
    opened = open_variants(variants, models)
    cases = [(variant, size) for size in options.batch_sizes for variant in variants if _is_run(variant, size)]
    clock = time.process_time if options.cpu_time else time.perf_counter
    run = _Run(opened, ids, clock, peaks)
    for case in track(cases, "warming up", len(cases)):
        run.once(*case, min(options.new_tokens, _WARM_UP_TOKENS))
    turns = cases * options.repeats
    timings: dict[tuple[str, int], list[Timing]] = {case: [] for case in cases}
    for case in track(turns, "timing", len(turns)):
        timings[case].append(run.once(*case, options.new_tokens))
    return {
        "format": 1,
        "versions": {name: version(name) for name in ("flexigpt", "torch", "transformers")},
        "command": None,
        "device": device_name(device),
        "dtype": str(opened["source"].model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "clock": "cpu" if options.cpu_time else "wall",
        "peak_bytes_of_libraries": peaks.get(""),
        "options": {name: value for name, value in asdict(options).items() if value is not None},
        "variants": [_entry(variant, models, opened, timings, peaks[variant]) for variant in variants],
    }


def variants_of(model: str, options: BenchmarkOptions) -> tuple[str, ...]:
    """What there is to time of a model; no weight is read.

    Raises:
        InputError: models that cannot be held against each other.
    """
    config, source = read_config(model), read_config(options.against)
    if isinstance(source, FlexiGPTConfig):
        raise InputError(f"--against {options.against} is a compact model: give the source that {model} was made from")
    others = {model: config} | ({} if options.removal is None else {options.removal: read_config(options.removal)})
    for name, other in others.items():
        own = other.get_text_config()
        for field in _SHAPE:
            mine, its = getattr(own, field, None), getattr(source, field, None)
            if mine != its:
                raise InputError(
                    f"--against {options.against} has {field} {its}, {name} has {mine}: give the source of the model"
                )
    longest = min(getattr(one, "max_position_embeddings", None) or 2**62 for one in (source, *others.values()))
    if options.prompt_tokens + options.new_tokens > longest:
        raise InputError(
            f"--prompt-tokens {options.prompt_tokens} and --new-tokens {options.new_tokens} exceed the context of "
            f"{longest}: give fewer of one"
        )
    pruned = pruned_of(model)
    if options.speculative and not pruned:
        raise InputError(f"{model} has no replicas to skip, so it has no draft: leave --speculative out")
    if options.removal is not None and pruned_of(options.removal):
        raise InputError(f"--removal {options.removal} is a compact model: give what flexigpt baseline wrote")
    deeper = config.get_text_config().num_hidden_layers - source.num_hidden_layers
    if pruned and deeper < 0:
        raise InputError(f"--against {options.against} has {-deeper} more blocks than {model}: give its source")
    removal = ["removal"] if options.removal is not None or (pruned and not deeper) else []
    own_variants = ["compact", "materialised"] if pruned else ["model"]
    return ("source", *removal, *own_variants, *(["speculative"] if options.speculative else []))


def _prompts(model: str, options: BenchmarkOptions) -> torch.Tensor:
    """(largest batch, prompt) ids: random ones, or those of a text, one prompt after the other."""
    count, length = max(options.batch_sizes), options.prompt_tokens
    if options.prompt is None:
        vocabulary = read_config(model).get_text_config().vocab_size
        return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    ids = tokenize_text(options.prompt, load_tokenizer(model), window_length=length).ids
    if len(ids) < count * length:
        raise InputError(
            f"--prompt {options.prompt} has {len(ids)} tokens, {count} prompts of {length} take {count * length}: give "
            "a longer text, smaller --batch-sizes or fewer --prompt-tokens"
        )
    return torch.as_tensor(ids[: count * length]).long().view(count, length)


def _peaks_alone(
    variants: Sequence[str], models: Models, ids: torch.Tensor, options: BenchmarkOptions
) -> dict[str, int]:
    """Peak memory of each variant alone, at the largest batch that it is run at; of the libraries under ''."""
    threads = torch.get_num_threads()
    requests = [
        PeakRequest(
            variant=variant or None,
            models=models,
            ids=ids[: max(size for size in options.batch_sizes if _is_run(variant, size))].tolist(),
            new_tokens=options.new_tokens,
            threads=threads,
        )
        for variant in ("", *variants)
    ]
    return dict(zip(("", *variants), peak_memory(requests), strict=True))


def _is_run(variant: str, size: int) -> bool:
    return variant != "speculative" or size == 1


class _Run:
    """Generation with one variant at one batch size; on a GPU the peak memory of each goes into `peaks`."""

    def __init__(self, opened: dict[str, Opened], ids: torch.Tensor, clock: Clock, peaks: dict[str, int]) -> None:
        self._opened, self._ids, self._clock, self._peaks = opened, ids, clock, peaks

    def once(self, variant: str, size: int, new_tokens: int) -> Timing:
        model = self._opened[variant].model
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(model.device)
            before = torch.cuda.memory_allocated(model.device)
        speculative = variant == "speculative"
        timing = time_generation(model, self._ids[:size], new_tokens, speculative=speculative, clock=self._clock)
        if on_gpu:
            # The other variants' weights are there as well.
            peak = torch.cuda.max_memory_allocated(model.device) - before + stored_bytes(model)
            self._peaks[variant] = max(peak, self._peaks.get(variant, 0))
        return timing


def _entry(
    variant: str, models: Models, opened: dict[str, Opened], timings: dict[tuple[str, int], list[Timing]], peak: int
) -> dict[str, Any]:
    """One variant's part of the result."""
    own = {size: its for (name, size), its in timings.items() if name == variant}
    model = opened[variant].model
    entry: dict[str, Any] = {
        "variant": variant,
        "model": {"source": models.source, "removal": models.removal}.get(variant, models.model),
        "parameters": model.num_parameters(),
        "weight_bytes": stored_bytes(model),
        "stored_bytes": _bytes_on_disk(variant, models, opened),
        "load_seconds": opened[variant].load_seconds,
        "peak_bytes": peak,
        "batches": [_batch(size, its, timings[("source", size)]) for size, its in own.items()],
    }
    if variant in ("materialised", "speculative"):
        compact = {size: timings[("compact", size)] for size in own}
        entry["same_ids_as_compact"] = all(
            torch.equal(one.ids, other.ids)
            for size, its in own.items()
            for one, other in zip(its, compact[size], strict=True)
        )
        for batch in entry["batches"]:
            size = batch["batch_size"]
            batch["throughput_percent_of_compact"] = _percent(compact[size], own[size])
    done = own[1][-1].statistics if variant == "speculative" else None
    if done is not None:
        entry["acceptance"] = done.acceptance
        entry["block_evaluations_per_token"] = done.block_evaluations_per_token
    return entry


def _bytes_on_disk(variant: str, models: Models, opened: dict[str, Opened]) -> int:
    """Of a folder's weight files, or what such files would hold."""
    lies_in = {"source": models.source, "removal": models.removal}.get(variant, models.model)
    files = list(Path(lies_in).glob("*.safetensors")) if lies_in is not None else []
    if files:
        return sum(file.stat().st_size for file in files)
    stored = opened["compact"] if variant in ("materialised", "speculative") else opened[variant]
    dtype = config_dtype(read_config(models.source if lies_in is None else lies_in))
    return stored.model.num_parameters() * dtype.itemsize


def _batch(size: int, its: list[Timing], source: list[Timing]) -> dict[str, Any]:
    """What one variant took at one batch size: seconds for the whole batch, rates of all its tokens."""
    return {
        "batch_size": size,
        "prefill_seconds": spread([one.prefill for one in its]),
        "token_seconds": spread([_per_token(one) for one in its]),
        "tokens_per_second": spread([size * one.new_tokens / one.total for one in its]),
        "prefill_percent": spread([100 * (a.prefill / b.prefill) for a, b in zip(its, source, strict=True)]),
        "token_percent": spread([100 * (_per_token(a) / _per_token(b)) for a, b in zip(its, source, strict=True)]),
        "time_percent": _percent(its, source),
        "throughput_percent": _percent(source, its),
    }


def _per_token(one: Timing) -> float:
    """Seconds from the first new token to the last, by the tokens between: what a reader waits for each."""
    return (one.total - one.prefill) / (one.new_tokens - 1)


def _percent(one: list[Timing], other: list[Timing]) -> dict[str, float]:
    """All of one's time in percent of the other's, within each repeat."""
    return spread([100 * (a.total / b.total) for a, b in zip(one, other, strict=True)])


_COST = ("variant", "parameters in memory", "weights, MB", "stored, MB", "load, s", "peak, MB", "of source, %")

_TIME = ("batch", "variant", "prefill, ms", "a token, ms", "tokens/s", "time, %", "least-most", "throughput, %")


def cost_rows(result: Benchmark) -> Rows:
    """What each variant takes of disk and memory."""
    source = result["variants"][0]
    rows = [
        [
            variant["variant"],
            f"{variant['parameters']:,}",
            megabytes(variant["weight_bytes"]),
            megabytes(variant["stored_bytes"]),
            "" if variant["load_seconds"] is None else f"{variant['load_seconds']:.2f}",
            megabytes(variant["peak_bytes"]),
            f"{100 * variant['peak_bytes'] / source['peak_bytes']:.1f}",
        ]
        for variant in result["variants"]
    ]
    return list(_COST), rows


def time_rows(result: Benchmark) -> Rows:
    """How long each takes, and in percent of the source, as in the paper's tables 6 and 7."""
    rows = []
    for size in result["options"]["batch_sizes"]:
        for variant in result["variants"]:
            rows += [[str(size), variant["variant"], *_times(b)] for b in variant["batches"] if b["batch_size"] == size]
    return list(_TIME), rows


def _times(batch: dict[str, Any]) -> list[str]:
    share = batch["time_percent"]
    return [
        f"{1000 * batch['prefill_seconds']['median']:.1f}",
        f"{1000 * batch['token_seconds']['median']:.2f}",
        f"{batch['tokens_per_second']['median']:.1f}",
        f"{share['median']:.1f}",
        f"{share['min']:.1f}-{share['max']:.1f}",
        f"{batch['throughput_percent']['median']:.1f}",
    ]


def benchmark_tables(result: Benchmark) -> list[Table]:
    """Costs and times, for a terminal of 80 columns."""
    tables = []
    for headings, rows in (cost_rows(result), time_rows(result)):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for heading, cells in zip(headings, zip(*rows, strict=True), strict=True):
            width = max(len(text) for text in (*heading.split(), *cells))  # or rich would cut off words
            table.add_column(heading, justify="left" if heading in ("batch", "variant") else "right", min_width=width)
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def benchmark_notes(result: Benchmark) -> list[str]:
    """What a reader of the tables has to know."""
    options, versions = result["options"], result["versions"]
    kind = "of CPU time" if result["clock"] == "cpu" else "passed"
    text = options.get("prompt", "random tokens")
    lines = [
        f"greedy, prompts of {options['prompt_tokens']} tokens ({text}), {options['new_tokens']} new ones; seconds "
        f"{kind}; medians (least-most) of {options['repeats']} repeats, all variants in turn; % of the source's within "
        "a repeat",
    ]
    if result["peak_bytes_of_libraries"] is None:
        lines.append("peak memory: weights, and what the GPU's allocator gave besides while the variant ran")
    else:
        libraries = megabytes(result["peak_bytes_of_libraries"])
        lines.append(f"peak memory: RSS of a process of its own, {libraries} MB of it libraries")
    lines += [line for variant in result["variants"] for line in _of_compact(variant)]
    names = ", ".join(f"{name} {versions[name]}" for name in ("flexigpt", "torch", "transformers"))
    machine = f"{result['device']}, {result['dtype']}, {result['threads']} threads, load {result['load']}"
    return [*lines, f"{machine}; {names}"]


def _of_compact(variant: dict[str, Any]) -> list[str]:
    if "same_ids_as_compact" not in variant:
        return []
    shares = [
        f"{batch['throughput_percent_of_compact']['median']:.1f} % at batch {batch['batch_size']}"
        for batch in variant["batches"]
    ]
    same = "the same tokens" if variant["same_ids_as_compact"] else "other tokens (the last bit decided otherwise)"
    line = f"{variant['variant']}: {same} as compact, its throughput {', '.join(shares)}"
    if "acceptance" in variant:
        line += (
            f"; {100 * variant['acceptance']:.0f} % of the draft's tokens accepted, "
            f"{variant['block_evaluations_per_token']:.1f} block evaluations a token"
        )
    return [line]


def benchmark_markdown(result: Benchmark) -> str:
    """Tables and notes in Markdown."""
    notes = "".join(f"\n{note[0].upper()}{note[1:]}.\n" for note in benchmark_notes(result))
    return f"{markdown(*cost_rows(result))}\n{markdown(*time_rows(result))}{notes}"
