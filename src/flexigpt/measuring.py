"""How long generation takes, and how much memory."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from flexigpt.errors import InputError
from flexigpt.half_precision import fast_half
from flexigpt.speculate import speculative_generate
from flexigpt.speculate_options import SpeculateStatistics
from flexigpt.variants import Models, open_alone

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
