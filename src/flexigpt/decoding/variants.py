"""A compact model, its source and what else is made of the two: the variants that a benchmark times, opened."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from flexigpt.decoding.draft import SpeculateStatistics
from flexigpt.decoding.speculate import speculative_generate
from flexigpt.model import FlexiGPTConfig, FlexiGPTForCausalLM, fast_half, materialize, sharing_copy
from flexigpt.runtime import InputError
from flexigpt.weights import load_model, read_config, remove_blocks


@dataclass(frozen=True, kw_only=True)
class Models:
    """Where the models lie.

    Attributes:
        model: folder or hub name of the compact (or another) model.
        source: folder or hub name of the source.
        removal: folder or hub name of the source with the pruned blocks removed; None: made from the source.
        dtype: auto (each checkpoint's), float32, bfloat16 or float16.
        device: auto, cpu, cuda or cuda:N.
    """

    model: str
    source: str
    removal: str | None = None
    dtype: str = "auto"
    device: str = "auto"

    def load(self, name: str) -> PreTrainedModel:
        """One of them, in eval mode.

        Raises:
            InputError: as `load_model`.
        """
        return load_model(name, self.dtype, self.device)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A variant in memory.

    Attributes:
        model: the model; variants share the tensors that are the same in both.
        load_seconds: to open it; None for one that is made of another and lies in no folder.
    """

    model: PreTrainedModel
    load_seconds: float | None


def pruned_of(model: str) -> list[int]:
    """The pruned blocks of a local or hub model; none of an ordinary one.

    Raises:
        InputError: as `read_config`.
    """
    config = read_config(model)
    return [row["block"] for row in config.replicas] if isinstance(config, FlexiGPTConfig) else []


def open_variants(variants: tuple[str, ...], models: Models) -> dict[str, Opened]:
    """All of them at once. Source and compact model are read apart; the others share the tensors of one of the two.

    Args:
        variants: of source, removal, compact (or model), materialised and speculative.
        models: where they lie.

    Raises:
        InputError: a model that cannot be opened.
    """
    source, seconds = _timed(lambda: models.load(models.source))
    opened = {"source": Opened(model=source, load_seconds=seconds)}
    model, seconds = _timed(lambda: models.load(models.model))
    own = Opened(model=model, load_seconds=seconds)
    for variant in variants:
        if variant == "removal" and models.removal is not None:
            removed, took = _timed(lambda: models.load(str(models.removal)))
            opened[variant] = Opened(model=removed, load_seconds=took)
        elif variant == "removal":
            opened[variant] = Opened(model=remove_blocks(source, pruned_of(models.model)).eval(), load_seconds=None)
        elif variant == "materialised":
            folded, took = _timed(partial(materialize, sharing_copy(cast(FlexiGPTForCausalLM, model))))
            opened[variant] = Opened(model=folded, load_seconds=seconds + took)
        elif variant != "source":
            opened[variant] = own
    return opened


def open_alone(variant: str, models: Models) -> PreTrainedModel:
    """One variant, with nothing else left in memory.

    Raises:
        InputError: a model that cannot be opened.
    """
    if variant == "source":
        return models.load(models.source)
    if variant == "removal":
        if models.removal is not None:
            return models.load(models.removal)
        return remove_blocks(models.load(models.source), pruned_of(models.model)).eval()
    model = models.load(models.model)
    return materialize(model) if variant == "materialised" else model


def _timed(work: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, float]:
    started = time.perf_counter()
    made = work()
    return made, time.perf_counter() - started


Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One generation.

    Attributes:
        ids: (batch, prompt + new) ids, on the CPU.
        new_tokens: of each sequence.
        prefill: seconds until the first new token of each sequence stands.
        total: seconds until all do.
        statistics: what speculative decoding did.
    """

    ids: torch.Tensor
    new_tokens: int
    prefill: float
    total: float
    statistics: SpeculateStatistics | None = None


class _FirstToken(StoppingCriteria):
    """Notes when the first token stood; stops nothing."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.at: float | None = None

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if self.at is None:
            _wait_for(input_ids.device)
            self.at = self._clock()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def time_generation(
    model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, *, speculative: bool = False, clock: Clock
) -> Timing:
    """Generates greedily, past any end of text, and times it.

    Args:
        model: in eval mode.
        ids: (batch, prompt) ids; one sequence where `speculative`.
        new_tokens: tokens to make of each sequence.
        speculative: whether the model's own draft proposes them.
        clock: seconds.
    """
    seen = SpeculateStatistics()
    first = _FirstToken(clock)
    settings: dict[str, Any] = {}
    if speculative:
        settings = {"custom_generate": speculative_generate, "statistics": seen}
    generate: Any = model.generate
    ids = ids.to(model.device)
    _wait_for(model.device)
    started = clock()
    with fast_half(model):
        out = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([first]),
            **settings,
        )
    _wait_for(model.device)
    ended = clock()
    assert first.at is not None
    return Timing(
        ids=out.cpu(),
        new_tokens=out.shape[1] - ids.shape[1],
        prefill=first.at - started,
        total=ended - started,
        statistics=seen if speculative else None,
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@dataclass(frozen=True, kw_only=True)
class PeakRequest:
    """What to generate with which variant, alone in a process.

    Attributes:
        variant: as `open_alone` takes it; None: nothing, for what the libraries take.
        models: where they lie.
        ids: (batch, prompt) ids.
        new_tokens: tokens to make of each sequence.
        threads: of torch.
    """

    variant: str | None
    models: Models
    ids: list[list[int]]
    new_tokens: int
    threads: int


def peak_memory(requests: Sequence[PeakRequest]) -> list[int]:
    """Bytes that a process of its own held at most for each of them: peak RSS, libraries and pages of files included.

    Raises:
        InputError: a variant that could not be run alone, mostly for want of memory.
    """
    told = json.dumps([asdict(request) for request in requests]).encode()
    command = [sys.executable, "-W", "ignore", "-c", "from flexigpt.measuring import serve; serve()"]
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **piped) as process:  # type: ignore[call-overload]
        try:
            answer, log = process.communicate(told)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # with the process that it has forked
            raise
    if process.returncode:
        last = log.decode(errors="replace").strip().splitlines()[-1:]
        raise InputError(
            f"peak memory could not be measured, the process ended with {process.returncode} ({''.join(last)}): free "
            "memory, or give smaller --batch-sizes"
        )
    return [int(line) for line in answer.decode().split()]


def serve() -> None:
    """Answers requests on stdin, each in a fork of this process, which has imported all and run nothing."""
    for data in json.load(sys.stdin):
        request = PeakRequest(**data | {"models": Models(**data["models"])})
        child = os.fork()
        if not child:
            _run_alone(request)
        _, status, used = os.wait4(child, 0)
        if status:
            sys.exit(1)
        scale = 1 if sys.platform == "darwin" else 1024
        print(used.ru_maxrss * scale, flush=True)


def _run_alone(request: PeakRequest) -> None:
    code = 1
    try:
        torch.set_num_threads(request.threads)
        if request.variant is not None:
            model = open_alone(request.variant, request.models)
            ids = torch.tensor(request.ids)
            speculative = request.variant == "speculative"
            time_generation(model, ids, request.new_tokens, speculative=speculative, clock=time.perf_counter)
        code = 0
    except Exception as error:
        print(error, file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)  # past what the parent's interpreter has left to do
