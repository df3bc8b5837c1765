"""Where pruning pays on top of quantisation: perplexity against stored bytes on a real model.

examples/smollm2/get.sh && python examples/smollm2/texts.py out/smollm2-texts && python benchmarks/quantization.py

Every row is a file that `from_pretrained` opens: the source and its prunings by 10, 20 and 30 %, each as it is, in 8
and in 4 bits. Perplexity and agreement with the source are measured on the first tokens of held-out texts. Three
rows are simulated, by rounding the weights in memory: they are what `quantize` might do instead. What each row gave is
kept in benchmarks/results/quantization.json and not measured again; the table lies beside it.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flexigpt import PruneOptions, QuantizeOptions, prune, quantize, write_checkpoint
from flexigpt.evaluation import logits_over
from flexigpt.model import stored_bytes
from flexigpt.text import TokenizedText, tokenize_text
from flexigpt.weights import load_model, load_tokenizer

RESULTS = Path(__file__).parent / "results"
RATIOS = (0.0, 0.1, 0.2, 0.3)
BITS = (16, 8, 4)
LENGTH = 256
Found = dict[str, Any]


class Bench:
    """Runs rows, and remembers what they gave."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.work = arguments, Path(arguments.work)
        self.model = str(Path(arguments.model).resolve())
        self.file = RESULTS / f"{arguments.out}.json"
        self.known: dict[str, Found] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.kinds: list[str] = arguments.kinds
        tokenizer = load_tokenizer(self.model)
        self.texts = {
            kind: self.first_tokens(Path(arguments.texts) / f"{kind}.jsonl", tokenizer) for kind in self.kinds
        }
        self.likeliest: dict[str, list[torch.Tensor]] = {}

    def first_tokens(self, path: Path, tokenizer: Any) -> TokenizedText:
        text = tokenize_text(str(path), tokenizer, window_length=LENGTH)
        return TokenizedText(ids=text.ids[: self.arguments.tokens + 1], num_bytes=text.num_bytes)

    def folder(self, ratio: float, bits: int) -> str:
        """The model, made where it is not there yet."""
        if ratio == 0 and bits == 16:
            return self.model
        out = self.work / (f"{ratio:g}" if bits == 16 else f"{ratio:g}-{bits}")
        if not (out / "config.json").exists():
            if bits == 16:
                asked = {"calibration": str(Path(self.arguments.texts) / "calibration.jsonl"), "windows": 64}
                made, _, record = prune(self.model, PruneOptions(ratio=ratio, window_length=LENGTH, **asked))
                write_checkpoint(out, made, record, source=self.model)
            else:
                source = self.folder(ratio, 16)
                write_checkpoint(out, *quantize(source, QuantizeOptions(bits=bits)), source=source)
        return str(out)

    def measured(self, model: PreTrainedModel) -> Found:
        """Perplexity on both texts, and how often the source ranks the same token first."""
        found: Found = {}
        for kind, text in self.texts.items():
            loss, same, first = 0.0, 0, []
            for seen in logits_over(model, text, LENGTH):
                loss += seen.loss
                first.append(seen.logits[0].argmax(-1).flatten())
            if kind not in self.likeliest:
                self.likeliest[kind] = first  # the source comes first
            same = sum(int((a == b).sum()) for a, b in zip(first, self.likeliest[kind], strict=True))
            tokens = len(text.ids) - 1
            found |= {kind: math.exp(loss / tokens), f"{kind}, same": same / tokens}
        return found

    def row(self, name: str, make: Callable[[], PreTrainedModel], size: int | None = None) -> None:
        tokens = self.arguments.tokens
        if self.likeliest and self.known.get(name, {}).get("tokens") == tokens:
            return
        model = make()
        self.known[name] = self.measured(model) | {"bytes": size or stored_bytes(model), "tokens": tokens}
        print(name, self.known[name], flush=True)
        self.file.write_text(json.dumps(self.known, indent=1, sort_keys=True) + "\n")
        self.write()

    def simulated(self) -> None:
        """What `quantize` might do instead, by rounding."""
        eight, four = (self.known[f"0, {bits}"]["bytes"] for bits in (8, 4))
        table = load_model(self.model).get_input_embeddings().weight
        spare = table.numel() - 4 * len(table)  # of two bytes a number; a scale in float32 for each token
        for bits, size in ((8, eight), (4, four)):
            folder = self.folder(0.0, bits)
            self.row(f"embeddings, {bits}", lambda folder=folder: by_row(load_model(folder)), size - spare)
        linears = sum(
            p.numel() for name, p in load_model(self.model).named_parameters() if p.ndim == 2 and "layers" in name
        )
        groups = self.known["0, 16"]["bytes"] - 2 * linears + linears // 2 + 4 * linears // 32
        self.row("groups, 4", lambda: by_groups(load_model(self.model)), groups)

    def write(self) -> None:
        source = self.known["0, 16"]
        headings = [*self.kinds, *(f"{kind}, same" for kind in self.kinds)]
        lines = [
            f"# Pruning on top of quantisation: {Path(self.model).name}\n",
            f"`python benchmarks/quantization.py`, {platform.machine()}, torch {torch.__version__}. Perplexity on the",
            f"first {self.arguments.tokens:,} tokens of held-out text, windows of {LENGTH}; same: how often the",
            "likeliest token is the bfloat16 source's. Pruned by `prune --ratio`, calibrated on 64 windows of other",
            "text, nothing recovered.\n",
            f"| {' | '.join(['pruned', 'stored as', 'MB', 'of the source', *headings])} |",
            f"| ---: | --- | {' | '.join(['---:'] * (2 + len(headings)))} |",
        ]
        kinds = {16: "bfloat16", 8: "8 bits", 4: "4 bits"}
        rows = [(f"{ratio:g}, {bits}", f"{ratio:.0%}", kinds[bits]) for ratio in RATIOS for bits in BITS]
        rows += [
            ("embeddings, 8", "0%", "8 bits, embeddings too (simulated)"),
            ("embeddings, 4", "0%", "4 bits, embeddings in 8 (simulated)"),
            ("groups, 4", "0%", "4 bits, evenly spaced, groups of 32 (simulated)"),
        ]
        for name, ratio, stored in rows:
            if (found := self.known.get(name)) is not None:
                cells = [f"{found['bytes'] / 1e6:.1f}", f"{found['bytes'] / source['bytes']:.1%}"]
                cells += [f"{found[text]:.2f}" for text in self.kinds] + [
                    f"{found[f'{text}, same']:.1%}" for text in self.kinds
                ]
                lines.append(f"| {' | '.join([ratio, stored, *cells])} |")
        self.file.with_suffix(".md").write_text("\n".join(lines) + "\n")


@torch.no_grad()
def by_row(model: PreTrainedModel) -> PreTrainedModel:
    """The embeddings, and a head that is tied to them, rounded to 8 bits with a scale for each token."""
    weight = model.get_input_embeddings().weight
    step = weight.float().abs().amax(1, keepdim=True) / 127
    weight.copy_((weight.float() / step).round() * step)
    return model


@torch.no_grad()
def by_groups(model: PreTrainedModel, group: int = 32) -> PreTrainedModel:
    """The blocks' linears rounded to 16 evenly spaced values between the ends of each group of 32."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "layers" in name:
            rows = weight.float().view(-1, group)
            low = rows.amin(1, keepdim=True)
            step = (rows.amax(1, keepdim=True) - low) / 15
            weight.copy_((((rows - low) / step).round() * step + low).view_as(weight))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/smollm2-135m")
    parser.add_argument("--texts", default="out/smollm2-texts")
    parser.add_argument("--kinds", nargs="*", default=["novels", "technical"], help="held-out texts, KIND.jsonl each")
    parser.add_argument("--out", default="quantization", help="name of the results")
    parser.add_argument("--work", default="out/quantization")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    for ratio in sorted({0.0, *arguments.ratios}):
        for bits in BITS:
            bench.row(f"{ratio:g}, {bits}", lambda r=ratio, b=bits: load_model(bench.folder(r, b)))
    bench.simulated()


if __name__ == "__main__":
    main()
