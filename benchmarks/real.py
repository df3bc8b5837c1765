"""The race on a real model at equal stored bytes: ours, plain removal of blocks, uniform widths, and other methods.

examples/smollm2/get.sh && python examples/smollm2/texts.py out/smollm2-texts && python benchmarks/real.py

Plain removal of 8 of 30 blocks sets the size, then of 4 and of 12; every other row stores as much, to 0.2 %. All are
calibrated on the same windows of the same mixed text, and measured on held-out text of both kinds. With --tokens both
are recovered, distilled from the source, each at the best of its learning rates; with --tasks they answer questions.
What each row gave is kept in benchmarks/results/real.json and not measured again; the table lies beside it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peers import PEERS
from transformers import AutoModelForCausalLM

from flexigpt import Plan, PruneOptions
from flexigpt.evaluation import perplexity
from flexigpt.model import SublayerReplica
from flexigpt.pruning.source import CheckedSource
from flexigpt.runtime import device_name, find_device
from flexigpt.text import calibration_windows, tokenize_text
from flexigpt.weights import load_model, load_tokenizer, open_empty

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
REMOVED = (8, 4, 12)
KINDS = ("novels", "technical")
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande")
LENGTH = 256
RATES = {"ours": (1e-3, 2e-3, 4e-3, 8e-3), "rival": (1e-3, 2e-3, 4e-3, 8e-3)}
Found = dict[str, Any]


class Bench:
    """Runs rows, and remembers what they gave."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.work = arguments, Path(arguments.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.model, self.texts = str(Path(arguments.model).resolve()), Path(arguments.texts).resolve()
        self.device = find_device("auto")
        self.file = RESULTS / "real.json"
        self.known: dict[str, Found] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def flexigpt(self, *words: object) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": str(self.arguments.threads)}
        command = [sys.executable, "-m", "flexigpt", *map(str, words)]
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{ran.stderr[-2000:]}")
        return ran.stdout

    def pruned(self, name: str, *words: object, seed: int = 0) -> Path:
        """The folder that `flexigpt prune` writes with these words, made where it is not there yet."""
        out = self.work / f"{name}-{seed}"
        if not (out / "config.json").exists():
            given = ("--calibration", self.texts / "calibration.jsonl", "--window-length", LENGTH, "--seed", seed)
            self.flexigpt("prune", self.model, out, *words, *given, "--dtype", "float32")
        return out

    def rival(self, count: int, seed: int = 0) -> Path:
        return self.pruned(f"removal-{count}", "--remove", "--ratio", (count + 0.5) / self.depth, seed=seed)

    def ours(self, count: int, seed: int = 0) -> Path:
        return self.pruned(f"ours-{count}", "--target-size", f"{stored(self.rival(count)) / 1e6:.4f}M", seed=seed)

    def uniform(self, count: int, seed: int = 0) -> Path:
        """Every MLP as wide, its own best units, refitted: what LLM pruners by width do."""
        empty = open_empty(self.model)
        spare = empty.num_parameters() - stored(self.rival(count))
        size, units = empty.config.hidden_size, empty.config.intermediate_size
        left = units - round(spare / (3 * size * self.depth))
        rows = tuple(SublayerReplica(block=i, sublayer="mlp", form="units", units=left) for i in range(self.depth))
        file = self.work / f"uniform-{count}.json"
        file.write_text(json.dumps(Plan(num_blocks=self.depth, sublayers=rows).to_dict()))
        return self.pruned(f"uniform-{count}", "--plan", file, seed=seed)

    def paper(self, count: int, seed: int = 0) -> Path:
        """The paper's replicas in the place of one block more than plain removal takes, as large as its bytes allow."""
        checked = CheckedSource.check(self.model, PruneOptions.paper(ratio=0.5), PruneOptions.paper(ratio=0.5))
        spare = stored(self.rival(count)) - checked.shape.removed_parameters(count + 1)
        rank = spare // ((count + 1) * checked.shape.adapter_parameters(1))
        words = ("--preset", "paper", "--ratio", (count + 1.5) / self.depth, "--rank", rank)
        return self.pruned(f"paper-{count}", *words, seed=seed)

    @property
    def depth(self) -> int:
        return int(open_empty(self.model).config.num_hidden_layers)

    def measured(self, key: str, make: Callable[[], Any]) -> Found:
        """Perplexity on both texts and stored parameters, of a folder or a model; remembered under that key."""
        if key not in self.known:
            made = make()
            model = load_model(str(made), "float32") if isinstance(made, Path | str) else made
            model.to(self.device)
            tokenizer = load_tokenizer(self.model)
            found: Found = {"parameters": sum(p.numel() for p in model.parameters())}
            found["machine"] = f"{device_name(self.device)}, torch {torch.__version__}"
            for kind in KINDS:
                text = tokenize_text(str(self.texts / f"{kind}.jsonl"), tokenizer, window_length=LENGTH)
                found[kind] = perplexity(model.eval(), text, window_length=LENGTH)["perplexity"]
            self.remember(key, found)
        return self.known[key]

    def remember(self, key: str, found: Found) -> None:
        self.known[key] = found
        print(key, found, flush=True)
        self.file.write_text(json.dumps(self.known, indent=1, sort_keys=True) + "\n")
        self.write()

    def peer(self, name: str, count: int) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        tokenizer = load_tokenizer(self.model)
        text = str(self.texts / "calibration.jsonl")
        windows = calibration_windows(text, tokenizer, windows=64, window_length=LENGTH, seed=0)
        with self.device:
            PEERS[name](model.to(self.device), windows.to(self.device), count)
        return model

    def recovered(self, name: str, start: Path, lr: float, tokens: int, seed: int) -> Path:
        out = self.work / f"recovered-{name}-{lr:g}-{tokens}-{seed}"
        if not (out / "config.json").exists():
            shutil.rmtree(out, ignore_errors=True)
            self.flexigpt(
                *("recover", start, out, "--data", self.texts / "recovery.jsonl", "--tokens", tokens, "--seed", seed),
                *("--teacher", self.model, "--batch-tokens", 2048, "--window-length", LENGTH, "--lr", lr),
                *("--precision", "fp32", "--epochs", 4),
                *(("--resume",) if out.with_name(f"{out.name}.recovery").exists() else ()),
            )
        return out

    def recover(self, name: str, start: Path) -> None:
        """Each side at the best of its rates after a tenth of the tokens, by the mean of the logarithms of both."""
        tokens = self.arguments.tokens
        tried = {}
        for lr in RATES[name]:
            key = f"{name} 8 recovered {tokens // 10} {lr:g}"
            found = self.measured(key, lambda lr=lr: self.recovered(name, start, lr, tokens // 10, 0))
            tried[lr] = found["novels"] * found["technical"]
        best = min(tried, key=tried.__getitem__)
        for seed in range(self.arguments.orders):
            out = self.recovered(name, start, best, tokens, seed)
            found = self.measured(f"{name} 8 recovered {tokens} best {seed}", lambda out=out: out)
            found["lr"] = best
            if self.arguments.tasks:
                self.answer(f"{name} 8 recovered {tokens} best {seed}", out)

    def answer(self, key: str, model: Path | str) -> None:
        """The five tasks, zero-shot: acc_norm where the harness has it, acc for WinoGrande."""
        if "tasks" in self.known[key]:
            return
        names = ",".join(f"{task}_sample" for task in TASKS)
        words = (
            "eval",
            model,
            "--tasks",
            names,
            "--include-path",
            self.arguments.tasks,
            "--dtype",
            "float32",
            "--json",
        )
        tasks = json.loads(self.flexigpt(*words))["models"][0]["tasks"]
        self.remember(key, self.known[key] | {"tasks": tasks})

    def run(self) -> None:
        asked = self.arguments
        self.measured("source", lambda: self.model)
        for count in asked.removed:
            for seed in range(asked.seeds if count == REMOVED[0] else 1):
                self.measured(f"rival {count} {seed}", lambda c=count, s=seed: self.rival(c, s))
                self.measured(f"ours {count} {seed}", lambda c=count, s=seed: self.ours(c, s))
        if asked.peers:
            self.measured("uniform 8", lambda: self.uniform(8))
            self.measured("paper 8", lambda: self.paper(8))
            self.measured("removal 8", lambda: self.pruned("plain-8", "--preset", "paper", "--remove", "--ratio", 0.28))
            for name in PEERS:
                self.measured(f"{name} 8", lambda name=name: self.peer(name, 8))
        if asked.tasks:
            for key, model in (("source", self.model), ("rival 8 0", self.rival(8)), ("ours 8 0", self.ours(8))):
                self.answer(key, model)
        if asked.tokens:
            self.recover("rival", self.rival(8))
            self.recover("ours", self.ours(8))

    def write(self) -> None:
        (RESULTS / "real.md").write_text(table(self.known, self.arguments.seeds), encoding="utf-8")


def stored(folder: Path) -> int:
    """Stored parameters of a checkpoint."""
    return int(open_empty(str(folder)).num_parameters())


def table(known: dict[str, Found], seeds: int) -> str:
    """All rows in Markdown."""
    source = known["source"]
    lines = [
        "# The race on SmolLM2-135M at equal stored bytes",
        "",
        "`python benchmarks/real.py --peers --tokens 204800 --orders 3 --tasks FOLDER`, float32. 64 windows of 256",
        "tokens to calibrate, novels and technical text mixed; perplexity on held-out text of both kinds. Excess:",
        "perplexity minus the source's, as a share of that of plain removal with kept blocks refitted, the honest",
        "rival.",
        f"Measured on {' and '.join(sorted({found['machine'] for found in known.values()}))}.",
        "",
        "| model | M parameters | novels | technical | excess, novels | excess, technical |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        row("source", source, None, None),
    ]
    names = {"rival": "plain removal of {} blocks, refitted", "ours": "**flexigpt**"}
    for count in REMOVED:
        for side in ("rival", "ours"):
            found = [known[key] for seed in range(seeds) if (key := f"{side} {count} {seed}") in known]
            rival = [known[key] for seed in range(seeds) if (key := f"rival {count} {seed}") in known]
            if found:
                more = f", mean of {len(found)} seeds" if len(found) > 1 else ""
                lines.append(row(names[side].format(count) + more, averaged(found), source, averaged(rival)))
    others = ["uniform 8", "paper 8", "removal 8", *(f"{name} 8" for name in PEERS)]
    labels = {
        "uniform 8": "every MLP as narrow, own best units, refitted",
        "paper 8": "the paper's replicas (`--preset paper`), 9 blocks",
        "removal 8": "plain removal of 8 blocks (ShortGPT)",
    }
    for key in others:
        if key in known and "rival 8 0" in known:
            lines.append(row(labels.get(key, key.removesuffix(" 8")), known[key], source, known["rival 8 0"]))
    for key in known:
        if key.startswith("rival 8 recovered") and " best 0" in key:
            tokens = key.split()[3]
            sides = {
                side: [f for k, f in known.items() if k.startswith(f"{side} 8 recovered {tokens} best")]
                for side in ("rival", "ours")
            }
            for side, found in sides.items():
                if found:
                    label = f"{names[side].format(8)}, {int(tokens):,} tokens distilled, lr {found[0]['lr']:g}"
                    label += f", mean of {len(found)} orders" if len(found) > 1 else ""
                    lines.append(row(label, averaged(found), source, averaged(sides["rival"])))
    return "\n".join(lines + answers(known)) + "\n"


def answers(known: dict[str, Found]) -> list[str]:
    """The tasks' rows in Markdown; orders of the text are averaged."""
    groups: dict[str, list[Found]] = {}
    for key, found in known.items():
        if "tasks" in found:
            groups.setdefault(key if key == "source" else key.rpartition(" ")[0], []).append(found["tasks"])
    if not groups:
        return []
    counts = {task["samples"] for found in groups.values() for tasks in found for task in tasks.values()}
    lines = [
        "",
        "Zero-shot, %, acc_norm where the harness has it, acc for WinoGrande; the last column is the mean of",
        f"the five by acc. {min(counts)} to {max(counts)} questions each: a standard error of 2 a task, 0.9 a mean.",
        "",
        "| model | " + " | ".join(TASKS) + " | mean | mean acc |",
        "| --- |" + " ---: |" * (len(TASKS) + 2),
    ]
    sides = {"source": "source", "rival": "plain removal of 8 blocks, refitted", "ours": "**flexigpt**"}
    for key, found in groups.items():
        scores = [100 * mean(score(tasks[f"{task}_sample"]) for tasks in found) for task in TASKS]
        plain = 100 * mean(tasks[f"{task}_sample"]["metrics"]["acc"] for tasks in found for task in TASKS)
        words = key.split()
        label = sides[words[0]] + (f", {int(words[3]):,} tokens distilled" if "recovered" in key else "")
        label += f", mean of {len(found)} orders" if len(found) > 1 else ""
        lines.append(f"| {label} | " + " | ".join(f"{s:.1f}" for s in (*scores, mean(scores), plain)) + " |")
    return lines


def score(task: dict[str, Any]) -> float:
    return float(task["value"])


def averaged(found: list[Found]) -> Found:
    return {key: mean(one[key] for one in found) for key in ("parameters", *KINDS)}


def row(label: str, found: Found, source: Found | None, rival: Found | None) -> str:
    cells = [f"{found['parameters'] / 1e6:.2f}", *(f"{found[kind]:.2f}" for kind in KINDS)]
    for kind in KINDS:
        if source is None or rival is None:
            cells.append("")
        else:
            cells.append(f"{(found[kind] - source[kind]) / (rival[kind] - source[kind]):.2f}")
    return f"| {label} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/smollm2-135m")
    parser.add_argument("--texts", default="out/smollm2-texts")
    parser.add_argument("--work", default="out/real")
    parser.add_argument("--removed", type=int, nargs="*", default=REMOVED, help="blocks that plain removal takes")
    parser.add_argument("--seeds", type=int, default=3, help="of the calibration windows, at the first size")
    parser.add_argument("--peers", action="store_true", help="other methods, too")
    parser.add_argument("--tokens", type=int, default=0, help="of recovery; 0: none")
    parser.add_argument("--orders", type=int, default=1, help="of the text in recovery")
    parser.add_argument("--tasks", default="", help="folder of task files, as examples/benchmarks")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    Bench(arguments).run()
    print((RESULTS / "real.md").read_text())


if __name__ == "__main__":
    main()
