"""A compact model, its source and what else is made of the two: the variants that a benchmark times, opened."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

from transformers import PreTrainedModel

from flexigpt.baselines import remove_blocks
from flexigpt.checkpoint import load_model, read_config
from flexigpt.configuration_flexigpt import FlexiGPTConfig
from flexigpt.materialization import materialize, sharing_copy
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM


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
