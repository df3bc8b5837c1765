"""Trains a LLaMA from scratch, as a testbed: of novel16's shape or a deeper one, on a text of yours.

python benchmarks/pretrain.py OUT --data train.parquet --validation validation.jsonl --shape deep --compile

OUT is an ordinary checkpoint, in float32, of the epoch that was best so far by perplexity on the validation text;
training.json in it says what was measured. Until the run ends OUT.recovery holds what --resume goes on from.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from flexigpt.cli.options import descriptions
from flexigpt.recovery import RecoverOptions
from flexigpt.recovery.checkpoints import RunFolder
from flexigpt.recovery.measuring import HeldOut
from flexigpt.recovery.training import NotFiniteError, Settings, Training, resolve_settings
from flexigpt.runtime import (
    ALONE,
    InputError,
    check_space,
    device_name,
    find_device,
    flag,
    parse_tokens,
    peak_bytes,
    replace_file,
    replaced_folder,
)
from flexigpt.text import check_window_length, text_fingerprint, tokenize_text
from flexigpt.text.windows import Documents, tokenize, too_short
from flexigpt.weights import load_tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "novel16"
MEASURED = "training.json"
# What differs from the config of examples/novel16: `deep` has 29.3M parameters.
SHAPES = {"novel16": {}, "deep": {"hidden_size": 320, "num_hidden_layers": 24, "intermediate_size": 896}}
SIZES = {"hidden_size": "hidden_size", "blocks": "num_hidden_layers", "intermediate_size": "intermediate_size"}
# Options that mean what they mean to `flexigpt recover`, with defaults of their own.
TRAINING = {"epochs": 10, "window_length": 256, "batch_tokens": 16_384, "lr": 2e-3, "warmup": 0.03, "device": "auto"}
LINES_AN_EPOCH = 20
# Three times (while a checkpoint is written two others are there) a parameter and AdamW's two averages; and OUT.
BYTES_PER_PARAMETER = 3 * 12 + 4


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--data", required=True, help="text to train on, as `flexigpt recover --data` takes it")
    parser.add_argument("--validation", required=True, help="text to measure perplexity on after each epoch")
    parser.add_argument("--tokens", help="an epoch is the first so many of the text, as 100K; default: all")
    parser.add_argument("--shape", choices=SHAPES, default="novel16")
    for name in SIZES:
        parser.add_argument(flag(name), type=int, help="instead of the shape's")
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    for name, default in TRAINING.items():
        shown = descriptions(RecoverOptions)[name].partition("; default")[0].rstrip(".")
        parser.add_argument(flag(name), type=type(default), default=default, help=f"{shown}; default: {default}")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="AdamW's, of matrices; default: 0.1")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the windows and dropout; default: 0")
    parser.add_argument("--compile", action="store_true", help="by torch.compile: a slow start, then faster")
    parser.add_argument("--resume", action="store_true", help="goes on after the last complete epoch")
    parser.add_argument("--overwrite", action="store_true", help="replaces what this script wrote to OUT")
    return parser.parse_args(words)


def shape_of(arguments: argparse.Namespace) -> PreTrainedConfig:
    """The config of the example model, with what the shape and further flags change."""
    asked = {SIZES[name]: getattr(arguments, name) for name in SIZES}
    changes = SHAPES[arguments.shape] | {name: size for name, size in asked.items() if size is not None}
    if min(changes.values(), default=1) < 1 or not 0 <= arguments.attention_dropout < 1:
        raise InputError("sizes of a shape are at least 1, --attention-dropout is at least 0 and below 1: give such")
    config = AutoConfig.from_pretrained(EXAMPLE, attention_dropout=arguments.attention_dropout, **changes)
    unit = 2 * config.head_dim  # as in the example, two query heads share a key/value head
    if config.hidden_size % unit:
        raise InputError(f"--hidden-size {config.hidden_size} does not divide into heads: give a multiple of {unit}")
    config.num_attention_heads = config.hidden_size // config.head_dim
    config.num_key_value_heads = config.num_attention_heads // 2
    return config


def batches(ids: torch.Tensor, settings: Settings, steps: int, epoch: int) -> Iterator[torch.Tensor]:
    """An epoch: `steps` times (batch_windows, window_length + 1) int64 of the text's (tokens,) ids.

    Windows are cut anew in each epoch; all depends on the seed and the epoch only, so that resuming is exact.
    """
    length, windows = settings.window_length, steps * settings.batch_windows
    generator = torch.Generator().manual_seed(settings.seed * 2**16 + epoch)
    spare = min(len(ids) - 1 - windows * length, length - 1)
    first = int(torch.randint(spare + 1, (), generator=generator))
    # Shuffled one by one, unlike recovery's: neighbours in a batch would all be of one chapter.
    order = torch.randperm((len(ids) - 1 - first) // length, generator=generator)[:windows]
    for starts in (first + order * length).split(settings.batch_windows):
        yield ids[starts[:, None] + torch.arange(length + 1)].long()


class Pretraining:
    """One run. Raises InputError for what a user can put right, before texts are read where that can be told then."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.out = arguments, arguments.out
        given = {name: getattr(arguments, name) for name in (*TRAINING, "seed")}
        data, validation = arguments.data, arguments.validation
        # Without --tokens there is one step at least; how many there are, only the text tells.
        tokens = arguments.tokens or str(max(1, arguments.batch_tokens))
        self.options = RecoverOptions(data=data, perplexity=validation, tokens=tokens, train="all", **given)
        self.config, self.tokenizer = shape_of(arguments), load_tokenizer(str(EXAMPLE))
        self.window_length = check_window_length(arguments.window_length, self.config)
        self.device = find_device(arguments.device)
        self.settings = resolve_settings(
            self.options, self.window_length, ALONE, self.device, replicas=False, fitted=False
        )
        asked = {
            name: getattr(arguments, name)
            for name in ("shape", *SIZES, "attention_dropout", "weight_decay", "tokens", "compile")
        }
        self.identity = asked | given | {"data": text_fingerprint(data), "validation": text_fingerprint(validation)}
        self.identity |= {"precision": str(self.settings.dtype).removeprefix("torch."), "device": self.device.type}
        self.folder = RunFolder(self.out, ALONE)
        self.history: list[dict[str, float]] = []

    def run(self) -> None:
        """Trains, from the last complete epoch on, and writes OUT."""
        self._check_folders()
        text = tokenize_text(self.options.perplexity, self.tokenizer, window_length=self.window_length)
        held_out = HeldOut(text=text, window_length=self.window_length, draft=False)
        ids, epochs = self._read(), self.options.epochs
        steps = (len(ids) - 1) // self.settings.batch_tokens
        training = self._prepare(steps * epochs)
        self._restore(training)
        for epoch in range(len(self.history), epochs):
            values = self._train(training, ids, steps, epoch)
            started = time.perf_counter()
            values["perplexity"] = held_out.perplexity_of_training(training)
            values["validation_seconds"] = time.perf_counter() - started
            self.history.append(values)
            if values is self._best():
                self._write(training)
            # After OUT: a run that is killed between the two does the epoch again, and comes to the same.
            self.folder.save(epoch + 1, training.tensors(), {"history": self.history, "training": training.state()})
            found = f"loss {values['loss']:.4f}  validation perplexity {values['perplexity']:.3f}"
            print(f"epoch {epoch + 1}/{epochs}  {found}", flush=True)
        replace_file(self.out / MEASURED, self._measured(training))
        self.folder.remove()
        print(f"{self.out}: epoch {self._best()['epoch']}, validation perplexity {self._best()['perplexity']:.3f}")

    def _check_folders(self) -> None:
        if self.arguments.resume:
            self.folder.check(self.identity)
            return
        for path, mark in ((self.out, MEASURED), (self.folder.path, "run.json")):
            if path.exists() and not (self.arguments.overwrite and (path / mark).is_file()):
                raise InputError(f"{path} is there: give another OUT, --resume, or --overwrite if this script wrote it")

    def _read(self) -> torch.Tensor:
        """The text to train on, (tokens,) int32: of --tokens so many, and the one before what is predicted."""
        data, tokens = self.arguments.data, self.arguments.tokens and parse_tokens(self.arguments.tokens)
        documents = (tokenize(document, self.tokenizer) for document in Documents(data))
        ids = np.fromiter(islice(chain.from_iterable(documents), tokens and tokens + 1), np.int32)
        if len(ids) <= self.window_length:
            raise too_short(data, len(ids), self.window_length)
        needed, less = (tokens, "--tokens") if tokens else (self.settings.batch_tokens, "--batch-tokens")
        if len(ids) <= needed:
            raise InputError(f"{data} has {len(ids):,} tokens, not {needed + 1:,}: give more text or fewer {less}")
        return torch.from_numpy(ids)

    def _prepare(self, steps: int) -> Training:
        """A model with random weights, and its optimizer."""
        torch.manual_seed(self.settings.seed)
        model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        check_space(self.out, BYTES_PER_PARAMETER * model.num_parameters())
        settings = replace(self.settings, steps=steps, warmup_steps=round(self.options.warmup * steps))
        training = Training(model, settings, ALONE, self.device, teacher=None)
        matrices: dict[str, Any] = {"params": [p for p in model.parameters() if p.ndim > 1], "share": 1.0}
        norms = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0, "share": 1.0}
        given = {"lr": settings.lr, "weight_decay": self.arguments.weight_decay, "betas": (0.9, 0.95)}
        training.optimizer = torch.optim.AdamW([matrices, norms], **given)
        if self.arguments.compile:
            training.wrapped = torch.compile(model)
        return training

    def _restore(self, training: Training) -> None:
        done = self.folder.steps() if self.arguments.resume else []
        if not done:
            self.folder.start(self.identity)
            return
        tensors = training.tensors()
        state = self.folder.load(done[-1], tensors)
        training.restore(tensors, state["training"])
        self.history = state["history"]

    def _train(self, training: Training, ids: torch.Tensor, steps: int, epoch: int) -> dict[str, float]:
        """One epoch: its mean loss (nats a token) and speed; twenty lines of it are printed."""
        losses: list[float] = []
        started, tokens = time.perf_counter(), training.settings.batch_tokens
        for step, windows in enumerate(batches(ids, training.settings, steps, epoch), start=1):
            values = training.step(epoch * steps + step - 1, windows)
            losses.append(values["loss"])
            if step * LINES_AN_EPOCH // steps > (step - 1) * LINES_AN_EPOCH // steps:
                a_step = (time.perf_counter() - started) / step
                seconds = a_step * (training.settings.steps - epoch * steps - step)
                if self.history:
                    seconds += self.history[-1]["validation_seconds"] * (self.options.epochs - epoch)
                left = timedelta(seconds=round(seconds))
                print(
                    f"epoch {epoch + 1}  step {step}/{steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
                    f"{tokens / a_step:,.0f} tokens/s  {left} left",
                    flush=True,
                )
        seconds, loss = time.perf_counter() - started, sum(losses) / steps
        return {"epoch": epoch + 1, "loss": loss, "seconds": seconds, "tokens_per_second": steps * tokens / seconds}

    def _best(self) -> dict[str, float]:
        return min(self.history, key=lambda values: values["perplexity"])

    def _write(self, training: Training) -> None:
        with replaced_folder(self.out) as folder:
            training.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            for file in folder.glob("*.safetensors"):
                shutil.copymode(folder / "config.json", file)  # safetensors lets only the owner read what it writes
            (folder / MEASURED).write_text(self._measured(training), encoding="utf-8")

    def _measured(self, training: Training) -> str:
        measured = {"run": self.identity, "parameters": training.trained_parameters, "steps": training.settings.steps}
        measured |= {"best": self._best(), "history": self.history}
        measured |= {"device": device_name(self.device), "peak_bytes": peak_bytes(self.device)}
        measured["versions"] = {name: version(name) for name in ("flexigpt", "torch", "transformers")}
        return json.dumps(measured, indent=2) + "\n"


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    try:
        Pretraining(arguments).run()
        return
    except InputError as error:
        reason = str(error)
    except NotFiniteError as error:
        reason = f"{error}: start anew with a lower --lr; what {arguments.out} holds is the best epoch before"
    except KeyboardInterrupt:
        reason = "interrupted: --resume goes on after the last complete epoch"
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
