"""What generation, speculative decoding, sampling and the benchmark can be asked for. No torch."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from flexigpt.runtime import InputError, RunOptions, check_options, option, parse_numbers, parse_tokens

_WHAT = "What to generate"

# Logits divided by less overflow, and by more are all alike.
_TEMPERATURES = (1e-4, 1e4)


@dataclass(frozen=True, kw_only=True)
class SpeculateOptions:
    """How to draft.

    Attributes:
        draft_length: tokens to draft each time; default: as many as pay at the acceptance seen.
    """

    draft_length: int | None = option(None, command=False, least=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions, SpeculateOptions):
    """What to generate, and how.

    Attributes:
        prompt: text to continue.
        max_new_tokens: tokens to generate at most.
        temperature: 0 takes the likeliest token each time; above, tokens are sampled at that temperature.
        top_p: with a temperature: samples from the likeliest tokens that hold this share of the probability.
        seed: with a temperature: makes samples repeatable.
        speculative: drafts with the replicas skipped and verifies with the whole model: the same text (or, with a
            temperature, samples of the same distribution) in fewer passes.
        materialize: folds the replicas' adapters into weights of their own first: the memory and, but for the output
            norms, the speed of the source.
    """

    prompt: str = option(group=_WHAT, everyday=True)
    max_new_tokens: int = option(128, group=_WHAT, everyday=True, least=1)
    temperature: float = option(0.0, group=_WHAT, everyday=True)
    top_p: float = option(1.0, group=_WHAT)
    seed: int = option(0, group=_WHAT)
    speculative: bool = option(False, everyday=True)
    materialize: bool = option(False, command=False)

    def __post_init__(self) -> None:
        check_options(self)
        # Surrogates are how Python hands on bytes of the command line that are not UTF-8.
        if not self.prompt or any("\ud800" <= character <= "\udfff" for character in self.prompt):
            raise InputError("--prompt is empty or not valid UTF-8: give some text to continue")
        least, most = _TEMPERATURES
        if self.temperature != 0 and not least <= self.temperature <= most:
            raise InputError(f"--temperature {self.temperature} is out of range: give 0, or {least} to {most}")
        _check_top_p(self.top_p)


def _check_top_p(top_p: float) -> None:
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p} is out of range: give more than 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class SampleOptions(RunOptions):
    """How much text a model is to write, and of which kind.

    Attributes:
        tokens: tokens to write, about: 1M, 100K or a number; whole windows of them, beginnings and prompts among them.
        prompts: text whose documents, one after the other, begin those that are written, or, in conversations, are the
            user's messages: FILE[#COLUMN], or a data set on the hub; default: the model begins itself.
        kind: conversations (the model writes a user's message, and then the answer) or documents; default:
            conversations where the tokenizer has a chat template.
        top_p: samples from the likeliest tokens that hold this share of the probability.
        window_length: tokens that a document may have, what is given among them; default: the model's context, at most
            512.
        batch_size: documents that are written at once; default: 32 on a CPU, 256 on a GPU.
        seed: makes it repeatable.
    """

    tokens: str = option("100K", group=_WHAT, everyday=True, metavar="1M|100K")
    prompts: str | None = option(None, group=_WHAT, everyday=True, metavar="FILE")
    kind: Literal["conversations", "documents"] | None = option(None, group=_WHAT, everyday=True)
    top_p: float = option(1.0, group=_WHAT)
    window_length: int | None = option(None, group=_WHAT)
    batch_size: int | None = option(None, least=1, most=2**16)
    seed: int = option(0, group=_WHAT)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_tokens(self.tokens)
        _check_top_p(self.top_p)


_SIZES = partial(parse_numbers, name="--batch-sizes", example="1,8")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(RunOptions):
    """What to measure, and what to hold it against.

    Attributes:
        against: the source that the model was made from, measured beside it.
        batch_sizes: how many sequences are generated at once; with 1 among them, speculative decoding is
            measured, too; default: 1,8.
    """

    against: str | None = option(None, group="What to measure", everyday=True, metavar="SOURCE")
    batch_sizes: tuple[int, ...] = option(
        (1, 8),
        group="What to measure",
        everyday=True,
        metavar="1,8,...",
        parse=_SIZES,
        most=2**16,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = tuple(self.batch_sizes)
        if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
            given = ",".join(map(str, sizes)) or "none"
            raise InputError(f"--batch-sizes {given} cannot be used: give different numbers from 1, as 1,8")
