"""Speculative decoding against the source, plain decoding and transformers' assisted decoding, in one run.

python benchmarks/speculation.py > benchmarks/results/speculation.md

The shipped model pruned at 30 % (or a compact checkpoint of yours, --model), unrecovered, where a pass costs mostly
Python; and random ones of a known model's widths (--shape, --layers, --ratios), where it costs reading weights. The
latter's head is their embedding, so that one token stands out, and --gammas says how much their replicas do: with next
to nothing the draft always agrees with the target.
"""

import argparse
import copy
import itertools
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
from flexigpt.model import empty_compact, layout_of
from flexigpt.replicas import ReplicaOptions, replica_tensors
from flexigpt.weights import Assembly, StreamedModel, load_model, load_tokenizer

EXAMPLE = Path(os.path.relpath(Path(__file__).parents[1] / "examples" / "novel16"))
OPTIONS = PruneOptions.paper(
    ratio=0.3, calibration=str(EXAMPLE / "calibration.jsonl"), window_length=256, dtype="float32", windows=32
)
SHAPES = {
    "TinyLlama-1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 4},
    "LLaMA-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_key_value_heads": 32},
}
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


def ways_of(model: Any, source: Any, tokens: int) -> dict[str, Callable[[torch.Tensor, SpeculateStatistics], Any]]:
    """Name -> what decodes so many tokens after some ids."""
    assistant = draft_view(model)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    ways: dict[str, Callable[[torch.Tensor, SpeculateStatistics], Any]] = {
        "source": lambda ids, _: source.generate(ids, max_new_tokens=tokens, **GREEDY),
        "plain": lambda ids, _: model.generate(ids, max_new_tokens=tokens, **GREEDY),
        "assisted, 4": lambda ids, _: model.generate(ids, max_new_tokens=tokens, assistant_model=assistant, **GREEDY),
    }
    for length in DRAFT_LENGTHS:
        ways[f"speculative, {length or 'adaptive'}"] = lambda ids, seen, length=length: model.generate(
            ids,
            max_new_tokens=tokens,
            custom_generate=speculative_generate,
            speculate=SpeculateOptions(draft_length=length),
            statistics=seen,
            **GREEDY,
        )
    return ways


def compare(
    model: Any, source: Any, prompts: list[torch.Tensor], tokens: int, repeats: int, clock: Callable[[], float]
) -> None:
    """All ways in turn on one prompt after the other; medians of rates, and of ratios within a turn."""
    ways = ways_of(model, source, tokens)
    for decode in ways.values():
        decode(prompts[0][:, :4], SpeculateStatistics())
    rates, of_source, of_plain, predicted = ({name: [] for name in ways} for _ in range(4))
    seen: dict[str, list[SpeculateStatistics]] = {name: [] for name in ways}
    same = dict.fromkeys(ways, True)
    for number in range(repeats):
        ids, turn, plain_ids = prompts[number % len(prompts)], {}, None
        for name, decode in ways.items():
            statistics = SpeculateStatistics()
            started = clock()
            out = decode(ids, statistics)
            turn[name] = tokens / (clock() - started)
            plain_ids = out if name == "plain" else plain_ids
            same[name] &= plain_ids is None or torch.equal(out, plain_ids)
            seen[name].append(statistics)
            predicted[name].append(allowed(model, statistics))
        for name, rate in turn.items():
            rates[name].append(rate)
            of_source[name].append(rate / turn["source"])
            of_plain[name].append(rate / turn["plain"])
    columns = "tokens/s | of source | of plain | min | max | cost model | block calls a token | acceptance | same ids |"
    print(f"| decoding, draft length | {columns}\n| --- |{' ---: |' * 8} --- |")
    for name in ways:
        drafted, accepted = (sum(getattr(one, what) for one in seen[name]) for what in ("drafted", "accepted"))
        speculative = name.startswith("speculative")
        calls = [one.block_evaluations_per_token for one in seen[name]]
        if not speculative:  # counted apart, so that no hook slows what is timed
            blocks = source.get_decoder().layers if name == "source" else model.block_list
            calls = [block_calls(blocks, prompts[0], ways[name]) / (tokens - 1)]
        print(
            f"| {name} | {median(rates[name]):.1f} | {median(of_source[name]):.2f} | {median(of_plain[name]):.2f} | "
            f"{min(of_plain[name]):.2f} | {max(of_plain[name]):.2f} | "
            f"{f'{median(predicted[name]):.2f}' if speculative else ''} | {median(calls):.1f} | "
            f"{f'{accepted / drafted:.2f}' if drafted else ''} | "
            f"{'' if name == 'source' else 'yes' if same[name] else 'no'} |",
            flush=True,
        )
    print()


def allowed(model: Any, seen: SpeculateStatistics) -> float:
    """What memory-bound decoding would give by the passes made: of plain decoding, blocks and the head counted."""
    if not seen.target_passes:
        return 1.0
    target, draft = costs(model)
    return (seen.tokens - 1) * target / (seen.drafted * draft + seen.target_passes * target)


def costs(model: Any) -> tuple[float, float]:
    """What a pass of the target costs, and one of the draft, in those of a kept block; the head by its weights."""
    layout = layout_of(model)
    block = sum(parameter.numel() for parameter in layout.blocks[layout.kept[0]].parameters())
    head = model.get_output_embeddings().weight.numel() / block
    return len(layout.blocks) + head, len(layout.kept) + head


def block_calls(blocks: Any, ids: torch.Tensor, decode: Callable[[torch.Tensor, Any], Any]) -> int:
    """Times that blocks run on one token or a few, the pass over the prompt left out."""
    counted = [0]

    def count(block: nn.Module, args: tuple[Any, ...]) -> None:
        counted[0] += args[0].shape[1] < ids.shape[1]

    hooks = [block.register_forward_pre_hook(count) for block in blocks]
    decode(ids, None)
    for hook in hooks:
        hook.remove()
    return counted[0]


def prompts_of(model: str, count: int) -> list[torch.Tensor]:
    """The first tokens of validation documents."""
    tokenizer = load_tokenizer(model)
    rows = (EXAMPLE / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [tokenizer(json.loads(row)["text"][:600], return_tensors="pt").input_ids[:, :PROMPT] for row in rows]


def large(arguments: argparse.Namespace, ratio: float, gamma: float) -> tuple[Any, Any]:
    """A random source of a known model's widths, and its compact model: the last blocks but one are replicas."""
    layers, dtype = arguments.layers, getattr(torch, arguments.dtype)
    config = LlamaConfig(
        **SHAPES[arguments.shape],
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    torch.manual_seed(0)
    source = LlamaForCausalLM(config).to(dtype).eval()
    pruned = range(layers - 1 - int(ratio * layers), layers - 1)
    plan = Plan(
        num_blocks=layers, replicas=tuple(Replica(block=b, base=0, rank=config.hidden_size // 16) for b in pruned)
    )
    streamed = StreamedModel(source)
    empty, taken = empty_compact(source, plan)
    assembly = Assembly(empty, streamed, taken)
    start = ReplicaOptions(adapter_init="zero", output_norm=gamma)
    for replica in plan.replicas:
        assembly.own(replica.block, replica_tensors(assembly.blocks[replica.block], streamed, replica, start))
    return source, assembly.in_memory()


def add_large(parser: argparse.ArgumentParser) -> None:
    """The options of the random models."""
    parser.add_argument("--shape", choices=SHAPES, default="TinyLlama-1.1B", help="widths of the random models")
    parser.add_argument("--layers", type=int, default=22, help="their blocks; 0 leaves them out")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.4], help="of them pruned")
    parser.add_argument("--dtype", default="bfloat16", help="of the random models")


def heading(arguments: argparse.Namespace, ratio: float, gamma: float) -> str:
    """What a random model is."""
    name = f"{arguments.layers} blocks of {arguments.shape}'s widths, random, {arguments.dtype}"
    return f"{name}, {ratio:.0%} pruned, gamma {gamma:g}"


def say(model: Any) -> None:
    """What is skipped, and what the cost model expects of full acceptance."""
    layout, (target, draft) = layout_of(model), costs(model)
    best = [f"{k}: {(k + 1) * target / (k * draft + target):.2f}" for k in (1, 2, 4, 8)]
    print(f"{len(layout.blocks)} blocks, replicas {', '.join(map(str, sorted(layout.bases)))}.", end=" ")
    print(f"Were all accepted, the cost model says for draft lengths {', '.join(best)} of plain.\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a compact checkpoint; default: the shipped model, pruned at 30 %%")
    parser.add_argument("--source", default=str(EXAMPLE), help="the model it was made from")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    add_large(parser)
    parser.add_argument("--gammas", type=float, nargs="+", default=[1e-3], help="of the random models' replicas")
    parser.add_argument("--large-repeats", type=int, default=3)
    parser.add_argument("--large-tokens", type=int, default=65)
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
    model = load_model(arguments.model, "float32") if arguments.model else prune(str(EXAMPLE), OPTIONS)[0].eval()
    source = load_model(arguments.source, "float32")
    print(f"## {arguments.model or 'examples/novel16, pruned at 30 %, unrecovered'}, float32\n")
    say(model)
    prompts = prompts_of(arguments.source, arguments.prompts)
    compare(model, source, prompts, arguments.tokens, arguments.repeats, clock)
    for ratio, gamma in itertools.product(arguments.ratios if arguments.layers else (), arguments.gammas):
        print(f"## {heading(arguments, ratio, gamma)}\n")
        source, model = large(arguments, ratio, gamma)
        say(model)
        ids = torch.randint(3, 32000, (1, 16), generator=torch.Generator().manual_seed(1))
        compare(model, source, [ids], arguments.large_tokens, arguments.large_repeats, clock)


if __name__ == "__main__":
    main()
