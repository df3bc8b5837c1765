"""Workspaces on models in memory, and what a flow announces."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flexigpt import PruneOptions
from flexigpt.model import model_shape
from flexigpt.pruning import Estimate
from flexigpt.pruning.source import Workspace
from flexigpt.runtime import Cache, Timed, silent
from flexigpt.weights import StreamedModel


def workspace_of(
    source: PreTrainedModel | StreamedModel, cache: Path, windows: torch.Tensor, memory: int = 2**40, **settings: Any
) -> Workspace[PruneOptions]:
    """What a flow would have opened; `settings` are options, by default one block of rank 4 by the paper's preset."""
    streamed = source if isinstance(source, StreamedModel) else StreamedModel(source)
    options = PruneOptions.paper(**{"blocks": [0], "rank": 4, "window_length": windows.shape[1]} | settings)
    return Workspace(
        name="",
        options=options,
        empty=streamed.model,
        shape=model_shape(streamed.model, options.has_norms),
        memory=memory,
        tokenizer=None,
        source=streamed,
        text=None,
        windows=windows,
        cache=Cache(cache),
        track=Timed(silent),
    )


class _Told(Exception):
    """Stops a flow before its work."""


def announced(flow: Callable[..., Any], source: Path, options: Any) -> Estimate:
    """What a flow says that it will take, without the work."""
    told: list[Estimate] = []

    def stop(estimate: Estimate) -> None:
        told.append(estimate)
        raise _Told

    with contextlib.suppress(_Told), flow(str(source), options, announce=stop):
        pass
    return told[0]
