"""Speculative decoding against plain decoding and transformers' assisted decoding with the same draft, in one run.

python benchmarks/speculation.py > benchmarks/results/speculation.md

Two models: the shipped one pruned at 30 % (or a compact checkpoint of yours, --model), unrecovered, where a pass costs
mostly Python; and a random one of TinyLlama-1.1B's widths (--layers of its 22 blocks), where it costs reading weights.
The latter's replicas start at a gamma so small that draft and target agree: it shows what high acceptance is worth.
"""

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from flexigpt import Plan, PruneOptions, Replica, SpeculateOptions, SpeculateStatistics, prune, speculative_generate
from flexigpt.checkpoint import compact_of, load_model, load_tokenizer
from flexigpt.draft_length import expected_speedup
from flexigpt.initialization import initialize_replicas
from flexigpt.trainable import layout_of

EXAMPLE = Path(__file__).parents[1] / "examples" / "novel16"
DRAFT_LENGTHS = (1, 2, 4, 8, None)
PROMPT = 64
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def draft_view(model: Any) -> LlamaForCausalLM:
    """A LLaMA of the same modules without the replicas, as `assistant_model` takes it. It keeps the depth in its
    configuration: the blocks keep their places in the cache."""
    view = copy.copy(model.language_model)
    view._modules = dict(view._modules)
    view.model = copy.copy(view.model)
    view.model._modules = dict(view.model._modules)
    view.model.layers = nn.ModuleList(model.block_list[block] for block in layout_of(model).kept)
    view.generation_config = copy.deepcopy(model.generation_config)
    return view


def compare(model: Any, prompts: list[torch.Tensor], tokens: int, repeats: int, clock: Callable[[], float]) -> None:
    """All ways in turn on one prompt after the other; medians of rates, and of ratios within a turn."""
    assistant = draft_view(model)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    ways: dict[str, Callable[[torch.Tensor, SpeculateStatistics], Any]] = {
        "plain": lambda ids, _: model.generate(ids, max_new_tokens=tokens, **GREEDY),
        "assisted, 4": lambda ids, _: model.generate(ids, max_new_tokens=tokens, assistant_model=assistant, **GREEDY),
    }
    for length in DRAFT_LENGTHS:
        options = SpeculateOptions(draft_length=length)
        ways[f"speculative, {length or 'adaptive'}"] = lambda ids, seen, options=options: model.generate(
            ids,
            max_new_tokens=tokens,
            custom_generate=speculative_generate,
            speculate=options,
            statistics=seen,
            **GREEDY,
        )
    rates, ratios, calls = ({name: [] for name in ways} for _ in range(3))
    seen = {name: SpeculateStatistics() for name in ways}
    accepted, drafted, same = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0), dict.fromkeys(ways, True)
    for number in range(repeats):
        ids = prompts[number % len(prompts)]
        plain_rate, plain_ids = 0.0, None
        for name, decode in ways.items():
            seen[name] = SpeculateStatistics()
            started = clock()
            out = decode(ids, seen[name])
            rate = tokens / (clock() - started)
            if name == "plain":
                plain_rate, plain_ids = rate, out
            same[name] &= torch.equal(out, plain_ids)
            rates[name].append(rate)
            ratios[name].append(rate / plain_rate)
            calls[name].append(seen[name].block_evaluations_per_token)
            accepted[name] += seen[name].accepted
            drafted[name] += seen[name].drafted
    for name in list(ways)[:2]:  # counted apart, so that no hook slows what is timed
        calls[name] = [block_calls(model, prompts[0], ways[name]) / (tokens - 1)]
    print("| decoding, draft length | tokens/s | of plain | min | max | block calls a token | acceptance | same ids |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for name in ways:
        share = f"{accepted[name] / drafted[name]:.2f}" if drafted[name] else ""
        print(
            f"| {name} | {median(rates[name]):.1f} | {median(ratios[name]):.2f} | {min(ratios[name]):.2f} | "
            f"{max(ratios[name]):.2f} | {median(calls[name]):.1f} | {share} | {'yes' if same[name] else 'no'} |"
        )
    print()


def block_calls(model: Any, ids: torch.Tensor, decode: Callable[[torch.Tensor, Any], Any]) -> int:
    """Times that blocks run on one token or a few, the pass over the prompt left out."""
    counted = [0]

    def count(block: nn.Module, args: tuple[Any, ...]) -> None:
        counted[0] += args[0].shape[1] < ids.shape[1]

    hooks = [block.register_forward_pre_hook(count) for block in model.block_list]
    decode(ids, None)
    for hook in hooks:
        hook.remove()
    return counted[0]


def pruned_example() -> Any:
    """The shipped model pruned at 30 %, unrecovered."""
    options = PruneOptions(
        ratio=0.3, calibration=str(EXAMPLE / "calibration.jsonl"), window_length=256, dtype="float32", windows=32
    )
    return prune(str(EXAMPLE), options)[0].eval()


def prompts_of(model: str, count: int) -> list[torch.Tensor]:
    """The first tokens of validation documents."""
    tokenizer = load_tokenizer(model)
    rows = (EXAMPLE / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [tokenizer(json.loads(row)["text"][:600], return_tensors="pt").input_ids[:, :PROMPT] for row in rows]


def large(layers: int, dtype: torch.dtype) -> Any:
    """A random model of TinyLlama-1.1B's widths; the last third but one block are replicas that are nearly nothing."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        dtype=dtype,
    )
    torch.manual_seed(0)
    source = LlamaForCausalLM(config).to(dtype).eval()
    replicas = tuple(Replica(block=b, base=0, rank=64) for b in range(layers - 1 - int(0.3 * layers), layers - 1))
    plan = Plan(num_blocks=layers, replicas=replicas)
    model = compact_of(source, plan)
    initialize_replicas(model, source, plan, adapter_init="zero", norm_init=1e-3, seed=0)
    return model.eval()


def say(model: Any) -> None:
    """What is skipped, and what the cost model expects of full acceptance."""
    layout = layout_of(model)
    depth, first = len(layout.blocks), min(layout.bases)
    best = [
        f"{length}: {expected_speedup(1.0, length, depth, len(layout.bases), first):.2f}" for length in (1, 2, 4, 8)
    ]
    print(f"{depth} blocks, replicas {', '.join(map(str, sorted(layout.bases)))}.", end=" ")
    print(f"Were all accepted, the cost model says for draft lengths {', '.join(best)} of plain.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a compact checkpoint; default: the shipped model, pruned at 30 %%")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=10, help="of the random model; 0 leaves it out")
    parser.add_argument("--large-repeats", type=int, default=3)
    parser.add_argument("--large-tokens", type=int, default=24)
    parser.add_argument("--dtype", default="float32", help="of the random model")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time: for one thread beside other work on the machine"
    )
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print("# Speculative decoding\n")
    print(f"`python benchmarks/speculation.py`: torch {torch.__version__}, {torch.get_num_threads()} threads,")
    print(f"{platform.machine()}, load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores, others' work included.")
    kind = "of CPU time" if arguments.cpu_time else "passed"
    print(f"Greedy; all ways in turn on each prompt; ratios are of tokens/s within a turn, seconds {kind}.\n")
    model = pruned_example() if arguments.model is None else load_model(arguments.model, "float32")
    print(f"## {arguments.model or 'examples/novel16, pruned at 30 %, unrecovered'}, float32\n")
    say(model)
    prompts = prompts_of(arguments.model or str(EXAMPLE), arguments.prompts)
    compare(model, prompts, arguments.tokens, arguments.repeats, clock)
    if arguments.layers:
        print(f"## {arguments.layers} blocks of TinyLlama-1.1B's widths, random, {arguments.dtype}\n")
        model = large(arguments.layers, getattr(torch, arguments.dtype))
        say(model)
        ids = torch.randint(3, 32000, (1, 16), generator=torch.Generator().manual_seed(1))
        compare(model, [ids], arguments.large_tokens, arguments.large_repeats, clock)


if __name__ == "__main__":
    main()
