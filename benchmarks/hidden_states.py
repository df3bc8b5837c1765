"""Distillation with the hidden states of teacher and student compared beside the logits: does it pay?

python benchmarks/hidden_states.py out/novel16-30 examples/novel16 --data examples/novel16/recovery.parquet \
    --held-out examples/novel16/validation.jsonl --tokens 131072 --lr 2e-3 --weights 0 0.3 1 3

Each weight trains the same model on the same batches; what is measured is perplexity on text held out. The term is
weight x mean over blocks and tokens of how far the student's residual stream after a block is from the teacher's.
Results lie in benchmarks/results/hidden_states.md.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from flexigpt.evaluation import perplexity
from flexigpt.model import layout_of
from flexigpt.recovery import RecoverOptions
from flexigpt.recovery.teacher import Teacher
from flexigpt.recovery.trainable import lora_rank_for, prepare_training
from flexigpt.recovery.training import Training, resolve_settings
from flexigpt.runtime import ALONE
from flexigpt.text import MixedStream, iterate, tokenize_text
from flexigpt.weights import load_model, load_tokenizer

# (student's, teacher's), each (tokens, hidden) -> (tokens,). Divided by the variance, a few tokens of huge norm, such
# as the first of a window, decide alone; divided by each token's own energy, or by the cosine, none does.
APART: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "relative": lambda own, wanted: (own - wanted).square().sum(-1) / wanted.square().sum(-1),
    "variance": lambda own, wanted: (own - wanted).square().mean(-1) / (wanted - wanted.mean(0)).square().mean(),
    "cosine": lambda own, wanted: 1 - F.cosine_similarity(own, wanted, dim=-1),
}


class Matched(Training):
    """Training whose loss compares the stream after blocks too; a block's match is the one of its number."""

    def match(self, weight: float, apart: str, last: int) -> None:
        """Compares from now on, after all blocks, or after the `last` ones only."""
        self.weight, self.apart, self.term = weight, APART[apart], 0.0
        self.own, self.wanted = list[torch.Tensor](), list[torch.Tensor]()
        assert self.teacher is not None
        for model, seen in ((self.model, self.own), (self.teacher.model, self.wanted)):
            blocks = layout_of(model).blocks
            for block in list(blocks)[-last:] if last else blocks:
                block.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))

    def _loss(self, forward: Any, ids: Any, targets: Any, scale: float, taught: Any) -> tuple[Any, Any]:
        loss, sums = super()._loss(forward, ids, targets, scale, taught)
        terms = []
        for pair in zip(self.own, self.wanted, strict=True):
            own, wanted = ((out[0] if isinstance(out, tuple) else out).flatten(0, 1).float() for out in pair)
            terms.append(self.apart(own, wanted).sum())
        self.own.clear()
        self.wanted.clear()
        term = torch.stack(terms).mean()
        self.term += term.item()
        return loss + self.weight * scale * term, sums


def train(arguments: argparse.Namespace, weight: float) -> dict[str, Any]:
    """What one weight of the term gives."""
    options = RecoverOptions(
        data=arguments.data if len(arguments.data) > 1 else arguments.data[0],
        tokens=str(arguments.tokens),
        epochs=arguments.epochs,
        window_length=arguments.window_length,
        batch_tokens=arguments.batch_tokens,
        teacher=arguments.teacher,
        lr=arguments.lr,
        precision="fp32",
        device="cpu",
        seed=arguments.seed,
    )
    model, tokenizer, device = load_model(arguments.model, device="cpu"), load_tokenizer(arguments.model), "cpu"
    given = {"replicas": bool(layout_of(model).bases), "fitted": True}
    settings = resolve_settings(options, arguments.window_length, ALONE, torch.device(device), **given)
    teacher = Teacher(arguments.teacher, model, torch.float32)
    prepare_training(model, options.train, lora_rank_for(model, None), options.seed)
    training = Matched(model, settings, ALONE, torch.device(device), teacher)
    training.match(weight, arguments.apart, arguments.last)
    of_text = {"window_length": arguments.window_length, "seed": options.seed, "epochs": options.epochs}
    stream, began = MixedStream(options.data, tokenizer, **of_text), time.perf_counter()
    terms: list[float] = []
    for step, (windows, _) in enumerate(iterate(stream, settings.batch_windows, settings.steps)):
        training.term = 0.0
        values = training.step(step, windows)
        terms.append(training.term / settings.batch_tokens)
    seconds = time.perf_counter() - began
    model.eval()
    found = {}
    with torch.no_grad():
        for text in arguments.held_out:
            held_out = tokenize_text(text, tokenizer, window_length=arguments.window_length)
            found[text] = perplexity(model, held_out, window_length=arguments.window_length)["perplexity"]
    about = {"weight": weight, "apart": arguments.apart, "last": arguments.last, "lr": arguments.lr}
    measured = {"term": [terms[0], terms[-1]], "loss": values["loss"], "seconds": round(seconds)}
    return about | {"seed": arguments.seed, "tokens": arguments.tokens, **measured, "perplexity": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("teacher")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--weights", nargs="+", type=float, default=[0.0, 0.3, 1.0, 3.0])
    parser.add_argument("--apart", choices=APART, default="relative")
    parser.add_argument("--last", type=int, default=0, help="blocks to compare, from the end; 0: all")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--window-length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for weight in arguments.weights:
        print(json.dumps(train(arguments, weight)), flush=True)


if __name__ == "__main__":
    main()
