"""What a model costs to run: time, throughput, memory and storage, beside what its source costs.

Each variant is measured in a process of its own, one after the other: its peak memory is its own, and only one model is
in memory at a time.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteriaList

from flexigpt.decoding.draft import SpeculateStatistics
from flexigpt.decoding.options import BenchmarkOptions
from flexigpt.decoding.speculate import speculative_generate
from flexigpt.model import fast_half, materialize, quantised_by
from flexigpt.record import Rows, inspect_model
from flexigpt.runtime import (
    InputError,
    Track,
    device_name,
    find_device,
    megabytes,
    one_line,
    peak_bytes,
    silent,
    versions,
)
from flexigpt.text import check_tokenizer
from flexigpt.weights import has_replicas, load_model, load_tokenizer, read_config

Benchmark = dict[str, Any]

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 32, 3

_WARM_UP_TOKENS = 4

# Text and not random tokens, of which a draft guesses hardly any.
_TEXT = """The ferry left the island before dawn with eleven passengers, four crates of pears and a dog that nobody
claimed. By the time the lamps on the pier were out of sight, the wind had turned, and the captain sent the boy below to
count the blankets. There were nine. He counted them again, because his uncle had told him once that a number which
displeases people should always be brought to them twice, and then he sat down on the pears and thought about what to
say. Above him somebody had begun to sing, an old song about a bridge and a miller's daughter, and one after another the
others joined in, although it was clear that no two of them had learned the same words."""


def benchmark(model: str, options: BenchmarkOptions, track: Track = silent) -> Benchmark:
    """Measures a model and, where it has replicas, the same materialised and decoded speculatively; and its source.

    Args:
        model: folder or hub name of a compact or other model.
        options: what to measure, and against what.
        track: reports the progress: one item for each variant.

    Returns:
        JSON-ready: `format` (2), `versions`, `command` (None: the command line fills it in), `device`, `threads`,
        `prompt_tokens`, `new_tokens`, `repeats`, `options`, and `variants`, each with `variant`, `model`,
        `stored_bytes` (of its weight files), `library_bytes` (held before a model was opened) and `batches`. A batch
        has `batch_size`, medians of `prefill_seconds` (until the first token), `tokens_per_second` (of each sequence,
        from the first token on) and `throughput` (tokens of all sequences by the whole time), and `peak_bytes`. Against
        a source it has `time_percent` and `throughput_percent` of the source's. Where it applies, a variant has
        `same_tokens_as_compact` and `acceptance` (of the draft's tokens).

    Raises:
        InputError: a model that cannot be opened or run; `--against` another kind of model.
    """
    device = find_device(options.device)
    variants = variants_of(model, options)
    ids = _prompts(model, max(options.batch_sizes))
    bytes_of = {name: inspect_model(name)["bytes"] for name in set(variants.values())}
    measured = []
    for variant, name in track(list(variants.items()), "timing", len(variants)):
        sizes = [1] if variant == "speculative" else sorted(options.batch_sizes)
        asked = {"variant": variant, "model": name, "dtype": options.dtype, "device": str(device), "sizes": sizes}
        answer = _alone(asked | {"ids": ids, "threads": torch.get_num_threads()})
        stored = bytes_of[name]["files"] or bytes_of[name]["stored"]
        measured.append({"variant": variant, "model": name, "stored_bytes": stored, **answer})
    made = {one["variant"]: one.pop("made") for one in measured}
    source = measured[0]["batches"] if options.against is not None else []
    for one in measured:
        for batch, its in zip(one["batches"], source, strict=False):  # sizes go up: speculative has the first alone
            share = batch["throughput"] / its["throughput"]
            batch |= {"time_percent": 100 / share, "throughput_percent": 100 * share}
        if one["variant"] in ("materialised", "speculative"):
            own = made[one["variant"]]
            one["same_tokens_as_compact"] = all(own[size] == made["compact"][size] for size in own)
    return {
        "format": 2,
        "versions": versions(),
        "command": None,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "prompt_tokens": len(ids[0]),
        "new_tokens": NEW_TOKENS,
        "repeats": REPEATS,
        "options": asdict(options),
        "variants": measured,
    }


def variants_of(model: str, options: BenchmarkOptions) -> dict[str, str]:
    """What there is to measure, and the model that it is made of; no weight is read.

    Raises:
        InputError: as `read_config`; `--against` what cannot be the model's source.
    """
    variants = {}
    if options.against is not None:
        source, own = read_config(options.against), read_config(model).get_text_config()
        shape = ("model_type", "vocab_size", "hidden_size")
        if any(getattr(source, field, None) != getattr(own, field, None) for field in shape):
            raise InputError(f"{model} was not made from --against {options.against}: give its source")
        variants["source"] = options.against
    if not has_replicas(model):
        return variants | {"model": model}
    folded = ["materialised"] if quantised_by(read_config(model)) is None else []
    own_variants = ("compact", *folded, *(["speculative"] if 1 in options.batch_sizes else []))
    return variants | dict.fromkeys(own_variants, model)


def _prompts(model: str, count: int) -> list[list[int]]:
    """Ids of the text from one word after the other on; all as long as the shortest, and no longer than fits."""
    words = _TEXT.split()
    starts = [number % len(words) for number in range(count)]
    tokenizer, config = load_tokenizer(model), read_config(model).get_text_config()
    check_tokenizer(model, tokenizer, config)
    rows: list[list[int]] = tokenizer([" ".join(words[at:] + words[:at]) for at in starts]).input_ids
    context = getattr(config, "max_position_embeddings", None)
    most = max(1, context - NEW_TOKENS) if context else PROMPT_TOKENS
    length = min(PROMPT_TOKENS, most, *map(len, rows))
    return [row[:length] for row in rows]


def _alone(asked: dict[str, Any]) -> dict[str, Any]:
    """What `_measure` returns in a process of its own.

    Raises:
        InputError: the process failed, mostly for want of memory.
    """
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    ran = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if ran.returncode:
        why = one_line((ran.stderr.strip().splitlines() or [f"the process ended with {ran.returncode}"])[-1])
        raise InputError(f"{asked['variant']} cannot be measured, perhaps with smaller --batch-sizes: {why}")
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def _measure(
    variant: str, model: str, dtype: str, device: str, sizes: list[int], ids: list[list[int]], threads: int
) -> dict[str, Any]:
    """Times a variant at each batch size. Peaks are those up to that size, so sizes go up."""
    torch.set_num_threads(threads)
    where = find_device(device)
    libraries = None if where.type == "cuda" else peak_bytes(where)
    loaded = load_model(model, dtype, device)
    if variant == "materialised":
        materialize(loaded)
    prompts = torch.tensor(ids)
    run = partial(time_generation, loaded, speculative=variant == "speculative")
    batches, made = [], {}
    for size in sizes:
        run(prompts[:size], _WARM_UP_TOKENS)
        runs: list[Any] = [run(prompts[:size], NEW_TOKENS) for _ in range(REPEATS)]
        prefill, total = (median(one[place] for one in runs) for place in (1, 2))
        decoding = median(one[2] - one[1] for one in runs)
        batches.append(
            {
                "batch_size": size,
                "prefill_seconds": prefill,
                "tokens_per_second": (NEW_TOKENS - 1) / decoding,
                "throughput": size * NEW_TOKENS / total,
                "peak_bytes": peak_bytes(where),
            }
        )
        made[size] = runs[-1][0].tolist()
    answer = {"library_bytes": libraries, "batches": batches, "made": made}
    return answer | ({"acceptance": runs[-1][3].acceptance} if variant == "speculative" else {})


def time_generation(
    model: PreTrainedModel,
    ids: torch.Tensor,
    new_tokens: int,
    speculative: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[torch.Tensor, float, float, SpeculateStatistics]:
    """Generates greedily, past any end of text, and times it.

    Args:
        model: in eval mode.
        ids: (batch, prompt) ids; one sequence where `speculative`.
        new_tokens: tokens to make of each sequence.
        speculative: whether the model's own draft proposes them.
        clock: seconds.

    Returns:
        (batch, prompt + new) ids; seconds until the first new token of each sequence stands, and until all do; what
        speculative decoding did.
    """
    ids, times = ids.to(model.device), [0.0]

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return clock()

    def note_first(*_: Any, **__: Any) -> torch.Tensor:
        if len(times) < 2:
            times.append(now())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    seen = SpeculateStatistics()
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
    if speculative:
        given |= {"custom_generate": speculative_generate, "statistics": seen}
    generate: Any = model.generate
    criteria = StoppingCriteriaList([note_first])
    times[0] = now()
    with fast_half(model):
        made = generate(ids, max_new_tokens=new_tokens, do_sample=False, stopping_criteria=criteria, **given)
    return made, times[1] - times[0], now() - times[0], seen


def benchmark_rows(result: Benchmark) -> Rows:
    """A row for each batch size and variant; throughput in percent of the source's, where there is one."""
    rows = []
    for size in sorted(result["options"]["batch_sizes"]):
        for variant in result["variants"]:
            for batch in (one for one in variant["batches"] if one["batch_size"] == size):
                row = {
                    "batch": str(size),
                    "variant": variant["variant"],
                    "prefill, ms": f"{1000 * batch['prefill_seconds']:.1f}",
                    "tokens/s each": f"{batch['tokens_per_second']:.1f}",
                    "tokens/s all": f"{batch['throughput']:.1f}",
                }
                if "throughput_percent" in batch:
                    row["of source, %"] = f"{batch['throughput_percent']:.1f}"
                row |= {"peak, MB": megabytes(batch["peak_bytes"]), "stored, MB": megabytes(variant["stored_bytes"])}
                rows.append(row)
    sides = "rl".ljust(len(rows[0]), "r")
    return Rows(list(rows[0]), [list(row.values()) for row in rows], align=sides, notes=_notes(result))


def _notes(result: Benchmark) -> list[str]:
    """What a reader of the rows has to know."""
    libraries, versions = result["variants"][0]["library_bytes"], result["versions"]
    lines = [
        f"greedy, prompts of {result['prompt_tokens']} tokens, {result['new_tokens']} new ones; medians of "
        f"{result['repeats']} runs; each variant in a process of its own",
        f"peak: memory of that process, {megabytes(libraries)} MB of it libraries"
        if libraries
        else "peak: memory on the GPU, weights included",
    ]
    for variant in result["variants"]:
        if "same_tokens_as_compact" in variant:
            same = "the tokens" if variant["same_tokens_as_compact"] else "by rounding, not all of the tokens"
            accepted = f"; {variant['acceptance']:.0%} of drafted tokens accepted" if "acceptance" in variant else ""
            lines.append(f"{variant['variant']}: {same} that compact gives{accepted}")
    names = ", ".join(f"{name} {versions[name]}" for name in versions)
    return [*lines, f"{result['device']}, torch threads: {result['threads']}; {names}"]


if __name__ == "__main__":  # what `_alone` starts
    try:
        print(json.dumps(_measure(**json.load(sys.stdin))))
    except InputError as error:
        sys.exit(str(error))
