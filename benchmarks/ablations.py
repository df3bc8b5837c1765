"""Perplexity right after pruning: the source, plain removal, the method, and each of its ablations (table 4, figure 4).

python benchmarks/ablations.py > benchmarks/results/ablations.md
"""

import argparse
import platform
from pathlib import Path

import torch

from flexigpt import PruneOptions, prune
from flexigpt.evaluation import perplexity
from flexigpt.model import stored_bytes
from flexigpt.text import tokenize_text
from flexigpt.weights import StreamedModel, load_model, load_tokenizer, without_blocks

EXAMPLE = Path(__file__).parents[1] / "examples" / "novel16"
VARIANTS = {
    "the method": {},
    "without high-rank elimination (b)": {"base_distance": "full-rank"},
    "plain distance of the weights (c)": {"base_distance": "frobenius"},
    "without output norm": {"output_norm": "none"},
    "without SVD adapter initialisation": {"adapter_init": "zero"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=str(EXAMPLE))
    parser.add_argument("--calibration", default=str(EXAMPLE / "calibration.jsonl"))
    parser.add_argument("--validation", default=str(EXAMPLE / "validation.jsonl"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.4])
    parser.add_argument("--window-length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()

    source = load_model(arguments.source, arguments.dtype)
    tokenizer = load_tokenizer(arguments.source)
    text = tokenize_text(arguments.validation, tokenizer, window_length=arguments.window_length)

    def measure(model: torch.nn.Module) -> float:
        return perplexity(model, text, window_length=arguments.window_length).perplexity

    before = measure(source)
    print(f"# Perplexity right after pruning {Path(arguments.source).name}\n")
    ratios = " ".join(map(str, arguments.ratios))
    print(f"`python benchmarks/ablations.py --ratios {ratios}`: {len(text.ids) - 1:,} tokens")
    print(f"of {Path(arguments.validation).name}, windows of {arguments.window_length} without overlap,")
    print(f"{arguments.dtype}, torch {torch.__version__}, {platform.machine()}. No recovery training.\n")
    print("| ratio | model | pruned <- base | stored parameters | stored MB (bf16) | perplexity |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    row("-", "source", "", source, before)
    for ratio in arguments.ratios:
        pruned: list[int] = []
        for name, settings in VARIANTS.items():
            options = PruneOptions.paper(
                ratio=ratio,
                calibration=arguments.calibration,
                window_length=arguments.window_length,
                dtype=arguments.dtype,
                **settings,
            )
            model, plan, _ = prune(arguments.source, options)
            if not pruned:
                pruned = plan.pruned
                shorter = without_blocks(StreamedModel(source), pruned).in_memory()
                row(ratio, "plain removal", ", ".join(map(str, pruned)), shorter, measure(shorter))
            bases = ", ".join(f"{replica.block}<-{replica.base}" for replica in plan.replicas)
            row(ratio, name, bases, model, measure(model))


def row(ratio: object, name: str, blocks: str, model: torch.nn.Module, measured: float) -> None:
    megabytes = stored_bytes(model) / next(model.parameters()).element_size() * 2 / 1e6
    print(
        f"| {ratio} | {name} | {blocks} | {model.num_parameters():,} | {megabytes:.2f} | {measured:.2f} |", flush=True
    )


if __name__ == "__main__":
    main()
