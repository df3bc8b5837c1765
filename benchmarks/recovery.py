"""Perplexity after recovery: plain removal, the paper's recipe, its ablations, and extension; the same batches.

python benchmarks/recovery.py --ratios 0.3 0.4 --workers 2

Every run is a `flexigpt` command. What each gave is kept in benchmarks/results/recovery.json and not run again; the
table goes to benchmarks/results/recovery.md, or, after other than 1M tokens, to recovery-600k.md and the like. The
learning rate of each row is the best of three, by perplexity on another text after a tenth of the tokens.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoConfig, PreTrainedModel

from flexigpt.model import REPLICA_PARTS, layout_of, linear_size
from flexigpt.recovery.trainable import lora_rank_for
from flexigpt.text.windows import Documents
from flexigpt.weights import open_empty

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "novel16"
RESULTS = Path(__file__).parent / "results"
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
# The replicas' own parameters alone want more: 3e-2 won at the edge of the values above.
REPLICA_LEARNING_RATES = (1e-2, 3e-2, 1e-1)
FITTED_LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TOKENS = 1_000_000
DEVELOPMENT_CHAPTERS = 4
SEARCH_SHARE = 10
# What was fitted in closed form hardly moves in a tenth of the tokens: a search there would say nothing. It is judged
# on chapters that the fits have not read.
FITTED_SEARCH_SHARE = 3
UNREAD_CHAPTERS = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table.

    Attributes:
        label: what it is called.
        start: what makes the model to train: `extend` or `prune` and its arguments, with RATIO or FEWER in the place of
            a ratio; none: the source itself is trained.
        train: further arguments of `flexigpt recover`, with RANK in the place of the rank of LoRA that trains as many
            parameters as the recovery of the compact model of that ratio does.
        rate_of: the row, trained alike, whose search for a learning rate serves this one too; None: its own.
    """

    label: str
    start: tuple[str, ...]
    train: tuple[str, ...] = ()
    rate_of: str | None = None

    @property
    def fitted(self) -> bool:
        """Whether it starts from weights fitted to calibration text."""
        return "--refit-kept" in self.start

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates to choose from."""
        if self.fitted:
            return FITTED_LEARNING_RATES
        return REPLICA_LEARNING_RATES if "replicas" in self.train else LEARNING_RATES


PRUNE = ("prune", "--preset", "paper", "--ratio", "RATIO")
REMOVE = (*PRUNE, "--remove")
REMOVE_FEWER = tuple("FEWER" if word == "RATIO" else word for word in REMOVE)
REFITTED = ("--refit-kept", "--windows", "256", "--block-score", "removal-perplexity")
MATCH = ("--lora-rank", "RANK")
TEACH = ("--teacher", str(EXAMPLE))
ONLY = ("--train", "replicas")

EXTEND = ("extend", "--blocks", "4:12", "--pattern")
# What stands in the place of a ratio where blocks are repeated.
EXTENSION = "extension"

PRUNING = {
    "removal": Row(label="plain removal + LoRA", start=REMOVE, train=MATCH),
    "kept": Row(label="the paper's start + LoRA on kept blocks", start=PRUNE),
    "paper": Row(label="the paper's recipe: replicas only", start=PRUNE, train=ONLY),
    "fewer": Row(label="plain removal of one block fewer + LoRA", start=REMOVE_FEWER, train=MATCH, rate_of="removal"),
    "distilled": Row(
        label="the paper's start + LoRA on kept blocks + distillation", start=PRUNE, train=TEACH, rate_of="kept"
    ),
    "removal-distilled": Row(
        label="plain removal + LoRA + distillation", start=REMOVE, train=MATCH + TEACH, rate_of="removal"
    ),
    "fewer-distilled": Row(
        label="plain removal of one block fewer + LoRA + distillation",
        start=REMOVE_FEWER,
        train=MATCH + TEACH,
        rate_of="removal",
    ),
    "removal-refitted-distilled": Row(
        label="plain removal by perplexity, refitted, + LoRA + distillation",
        start=REMOVE + REFITTED,
        train=MATCH + TEACH,
    ),
    "fewer-refitted-distilled": Row(
        label="plain removal of one block fewer by perplexity, refitted, + LoRA + distillation",
        start=REMOVE_FEWER + REFITTED,
        train=MATCH + TEACH,
    ),
    # Its own search: at the rate that suits replicas with output norms it diverges.
    "no-norm": Row(label="replicas only, without output norm", start=(*PRUNE, "--output-norm", "none"), train=ONLY),
    "zero-init": Row(
        label="replicas only, without SVD adapter initialisation",
        start=(*PRUNE, "--adapter-init", "zero"),
        train=ONLY,
        rate_of="paper",
    ),
    "no-elimination": Row(
        label="replicas only, without high-rank elimination",
        start=(*PRUNE, "--base-distance", "full-rank"),
        train=ONLY,
        rate_of="paper",
    ),
}
EXTENDING = {
    "source": Row(label="the source + LoRA", start=(), train=MATCH),
    "block": Row(label="block pattern, + LoRA on kept blocks", start=(*EXTEND, "block")),
    "sequential": Row(
        label="sequential pattern, + LoRA on kept blocks", start=(*EXTEND, "sequential"), rate_of="block"
    ),
    "block-only": Row(label="block pattern, replicas only", start=(*EXTEND, "block"), train=ONLY),
    "sequential-only": Row(
        label="sequential pattern, replicas only", start=(*EXTEND, "sequential"), train=ONLY, rate_of="block-only"
    ),
}
ROWS = PRUNING | EXTENDING


class Bench:
    """Runs commands, a few at a time, and remembers what they gave."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work = Path(arguments.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.file = RESULTS / "recovery.json"
        name = "recovery" if arguments.tokens == TOKENS else f"recovery-{arguments.tokens // 1000}k"
        self.table = RESULTS / f"{name}.md"
        self.known: dict[str, dict] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.lock, self.starting = threading.Lock(), threading.Lock()
        self.running: dict[str, threading.Lock] = {}
        self.depth = AutoConfig.from_pretrained(EXAMPLE).num_hidden_layers
        self.development = self.work / "development.jsonl"
        rows = (EXAMPLE / "calibration.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        self.development.write_text("".join(rows[:DEVELOPMENT_CHAPTERS]), encoding="utf-8")
        self.unread = self.work / "unread.jsonl"
        texts = list(Documents(str(EXAMPLE / "calibration.jsonl"), seed=0))[-UNREAD_CHAPTERS:]
        self.unread.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

    def flexigpt(self, *command: str) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": str(self.arguments.threads)}
        words = [sys.executable, "-m", "flexigpt", *command]
        ran = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"flexigpt {' '.join(command)}\n{ran.stderr[-2000:]}")
        return ran.stdout

    def perplexity(self, model: Path, text: Path) -> float:
        given = ("--perplexity", str(text), "--window-length", "256", "--dtype", "float32", "--json")
        return json.loads(self.flexigpt("eval", str(model), *given))["models"][0]["perplexity"]["perplexity"]

    def start(self, start: tuple[str, ...], ratio: str) -> Path:
        """The folder of a model to train, made where it is not there yet."""
        if not start:
            return EXAMPLE
        fewer = "" if ratio == EXTENSION else str((int(float(ratio) * self.depth + 1e-9) - 1) / self.depth)
        words = [word.replace("RATIO", ratio).replace("FEWER", fewer) for word in start]
        out = self.work / "-".join(word.strip("-").replace("/", "_").replace(":", "_") for word in words)
        with self.starting:
            if not (out / "record.json").exists():
                shutil.rmtree(out, ignore_errors=True)
                scored = ("--calibration", str(EXAMPLE / "calibration.jsonl"), "--window-length", "256")
                self.flexigpt(*(words[0], str(EXAMPLE), str(out), *words[1:], *(scored if words[0] == "prune" else ())))
        return out

    def train(self, name: str, ratio: str, lr: float, tokens: int, held_out: Path, seed: int = 0) -> dict:
        """What `flexigpt recover` measured; from the file where it has run before."""
        key = key_of(name, ratio, tokens, lr, seed)
        with self.lock:
            running = self.running.setdefault(key, threading.Lock())
        with running:  # rows that share a run wait for it
            if key not in self.known:
                self.remember(key, self.recover(key, held_out))
                print(key, self.known[key]["after"], flush=True)
        return self.known[key]

    def recover(self, key: str, held_out: Path) -> dict:
        """Runs the command, going on where it was killed."""
        name, ratio, tokens, lr, *seed = key.split(" ")
        row, out = ROWS[name], self.work / f"recovered-{key.replace(' ', '-')}"
        model = self.start(row.start, ratio)
        compact = self.start((*EXTEND, "block") if ratio == EXTENSION else PRUNE, ratio)
        rank = str(matching_lora_rank(str(model), str(compact))) if row.train[:2] == MATCH else ""
        if not (out / "record.json").exists():  # a killed benchmark may have left one behind
            self.flexigpt(
                *("recover", str(model), str(out)),
                *(rank if word == "RANK" else word for word in row.train),
                *("--data", str(EXAMPLE / "recovery.parquet"), "--epochs", "3", "--tokens", tokens),
                *("--batch-tokens", "4096", "--window-length", "256", "--lr", lr, "--precision", "fp32"),
                *("--seed", seed[0].removeprefix("seed") if seed else "0"),
                *(("--resume",) if out.with_name(f"{out.name}.recovery").exists() else ()),
            )
        record = json.loads((out / "record.json").read_text())
        before, after = (self.perplexity(folder, held_out) for folder in (model, out))
        shutil.rmtree(out)
        return {
            "before": before,
            "after": after,
            "parameters": record["after"]["parameters"],
            "bytes": record["after"]["bytes"],
            "trained_parameters": record["recovery"]["trained_parameters"],
            "tokens_per_second": round(record["recovery"]["tokens_per_second"]),
        }

    def search(self, name: str) -> tuple[str, int, Path]:
        """The row that searches for this one, the tokens of each try, and the text that judges."""
        name, tokens = ROWS[name].rate_of or name, self.arguments.tokens
        if ROWS[name].fitted:
            return name, tokens // FITTED_SEARCH_SHARE, self.unread
        return name, tokens // SEARCH_SHARE, self.development

    def best_rate(self, name: str, ratio: str) -> float:
        """The best of three for a row, or for the one whose search serves it."""
        name, tokens, text = self.search(name)
        tried = {lr: self.train(name, ratio, lr, tokens, text)["after"] for lr in ROWS[name].rates}
        return min(tried, key=tried.__getitem__)

    def twin(self, name: str, ratio: str) -> str:
        """The row that is trained alike from the very same weights: itself, but for ablations that change nothing."""
        if ratio == EXTENSION or ROWS[name].train != ROWS["paper"].train:
            return name
        weights = [self.start(ROWS[row].start, ratio) / "model.safetensors" for row in (name, "paper")]
        return "paper" if weights[0].read_bytes() == weights[1].read_bytes() else name

    def run(self, name: str, ratio: str) -> None:
        lr, tokens = self.best_rate(name, ratio), self.arguments.tokens
        for seed in range(self.arguments.seeds):
            found = self.train(self.twin(name, ratio), ratio, lr, tokens, EXAMPLE / "validation.jsonl", seed)
            self.remember(key_of(name, ratio, tokens, lr, seed), found)
            self.write_table()

    def remember(self, key: str, found: dict) -> None:
        with self.lock:
            self.known[key] = found
            self.file.write_text(json.dumps(self.known, indent=1, sort_keys=True) + "\n")

    def finished(self, name: str, ratio: str) -> tuple[float, list[dict]] | None:
        """The learning rate and what was measured with each seed, where the row is done."""
        searched, tokens, _ = self.search(name)
        tried = {lr: self.known.get(key_of(searched, ratio, tokens, lr)) for lr in ROWS[searched].rates}
        if not all(tried.values()):
            return None
        lr = min(tried, key=lambda lr: tried[lr]["after"])
        keys = (key_of(name, ratio, self.arguments.tokens, lr, seed) for seed in range(self.arguments.seeds))
        found = [self.known[key] for key in keys if key in self.known]
        return (lr, found) if found else None

    def write_table(self) -> None:
        lines = [
            "# Perplexity after recovery of novel16",
            "",
            f"`python benchmarks/recovery.py --ratios {' '.join(self.arguments.ratios)} "
            f"--tokens {self.arguments.tokens} --seeds {self.arguments.seeds}`: {self.arguments.tokens:,} tokens of "
            "recovery.parquet, 4,096 a step,",
            f"fp32, {platform.machine()}, torch {torch.__version__}; perplexity on all of validation.jsonl, windows of "
            "256.",
            f"The learning rate is the best of {shown(LEARNING_RATES)}, for replicas only of "
            f"{shown(REPLICA_LEARNING_RATES)}, by perplexity on {DEVELOPMENT_CHAPTERS} other chapters",
            f"after 1/{SEARCH_SHARE} of the tokens; rows that train alike, as an ablation does, share it. What was "
            f"fitted takes the best of {shown(FITTED_LEARNING_RATES)}",
            f"on {UNREAD_CHAPTERS} chapters that the fits have not read, after 1/{FITTED_SEARCH_SHARE} of the tokens.",
            "",
            "| ratio | model | stored MB | trained parameters | lr | before | after |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for ratio in (*self.arguments.ratios, EXTENSION):
            for name, row in ROWS.items():
                done = self.finished(name, ratio)
                if done:
                    lines.append(table_line(ratio, row.label, *done))
            if ratio != EXTENSION:
                lines += self.rivals(ratio)
        self.table.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def rivals(self, ratio: str) -> list[str]:
        """Plain removal at the compact model's stored bytes, interpolated between two numbers of blocks."""
        lines = []
        for ours, more, fewer in (
            ("kept", "removal", "fewer"),
            ("distilled", "removal-distilled", "fewer-distilled"),
        ):
            done = [self.finished(name, ratio) for name in (ours, more, fewer)]
            if not all(done):
                continue
            measured = [found for _, found in done]
            stored, removed, larger = (found[0]["bytes"] for found in measured)
            share = (stored - removed) / (larger - removed)
            # Seed by seed: what the order of the text does to both sides is no difference between them.
            between = [
                {key: less[key] + share * (fewer[key] - less[key]) for key in ("before", "after")}
                for less, fewer in zip(*measured[1:], strict=False)
            ]
            label = f"**{ROWS[more].label} at the bytes of `{ROWS[ours].label}`**"
            lines.append(
                f"| {ratio} | {label} | {stored / 1e6:.2f} | | | {between[0]['before']:.2f} | {after_of(between)} |"
            )
        return lines


def matching_lora_rank(model: str, compact: str) -> int:
    """The rank at which LoRA on all blocks of a model without replicas trains most nearly what recovery trains of
    `compact` by default: its replicas' own, and LoRA of their rank on the kept blocks."""
    empty, other = open_empty(model), open_empty(compact)
    own = sum(p.numel() for name, p in other.named_parameters() if name.endswith(tuple(REPLICA_PARTS)))
    lora = lora_rank_for(other, None) * len(layout_of(other).kept) * sides(other)
    return max(1, round((own + lora) / (len(layout_of(empty).kept) * sides(empty))))


def sides(model: PreTrainedModel) -> int:
    """Parameters that one rank of LoRA on a block's linears has."""
    layout = layout_of(model)
    block = layout.blocks[layout.kept[0]]
    return sum(sum(linear_size(block.get_submodule(path))) for path in layout.linears)


def shown(rates: tuple[float, ...]) -> str:
    return ", ".join(f"{lr:g}" for lr in rates)


def key_of(name: str, ratio: str, tokens: int, lr: float, seed: int = 0) -> str:
    """What a run is kept under."""
    return f"{name} {ratio} {tokens} {lr}" + (f" seed{seed}" if seed else "")


def after_of(found: list[dict]) -> str:
    """The mean over the seeds, and the least and the most of several."""
    after = [one["after"] for one in found]
    spread = f" ({min(after):.2f} to {max(after):.2f}, {len(after)} seeds)" if len(after) > 1 else ""
    return f"{mean(after):.2f}{spread}"


def table_line(ratio: str, label: str, lr: float, found: list[dict]) -> str:
    one = found[0]
    return (
        f"| {ratio} | {label} | {one['bytes'] / 1e6:.2f} | {one['trained_parameters']:,} | {lr:g} | "
        f"{one['before']:.2f} | {after_of(found)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", nargs="*", default=["0.3", "0.4"])
    parser.add_argument("--extension", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--seeds", type=int, default=1, help="orders of the text, for each row")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--work", default=str(ROOT / "out" / "benchmark-recovery"))
    arguments = parser.parse_args()

    bench = Bench(arguments)
    with ThreadPoolExecutor(arguments.workers) as pool:
        jobs = [(name, ratio) for ratio in arguments.ratios for name in PRUNING]
        jobs += [(name, EXTENSION) for name in EXTENDING if arguments.extension]
        runs = [pool.submit(bench.run, name, ratio) for name, ratio in jobs if name in arguments.rows]
        for run in runs:
            run.result()
    bench.write_table()
    print(bench.table.read_text())


if __name__ == "__main__":
    main()
