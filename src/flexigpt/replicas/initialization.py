"""Adapters and output norms of a new replica."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexigpt.calibration import SourceStates
from flexigpt.model import INNER, OUTPUT_NORM, NormedOutput, Plan, Replica, SharedLinear, plan_of
from flexigpt.replicas.elimination import readers_of_units
from flexigpt.replicas.fitting import refit_kept
from flexigpt.replicas.options import ReplicaOptions
from flexigpt.replicas.svd import truncated_svd
from flexigpt.runtime import CachedStage, Track, in_parallel, silent, workers_of
from flexigpt.weights import Assembly, StreamedModel

# Between the seeds of two replicas: any large odd number.
_SEED_STEP = 0x9E3779B97F4A7C15

# ranks 1, 2, 4 ... r, and the share of |W_i - W_j|_F^2 that so many of an adapter's directions mend.
Spectrum = dict[str, list[Any]]

AdapterStart = Callable[[torch.Tensor, torch.Tensor, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def svd_adapter(
    pruned: torch.Tensor, base: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-r approximation of W_i - W_j (eq. 7-8): A = V_r^T, B = U_r S_r."""
    difference = truncated_svd(pruned.double() - base.double(), rank)
    return difference.right.T, difference.left * difference.values


def zero_adapter(
    pruned: torch.Tensor, base: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """B = 0 and A random with variance 1 / inputs, as LoRA starts: the replica computes what its base does."""
    outputs, inputs = base.shape
    adapter = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
    return adapter, torch.zeros(outputs, rank)


ADAPTER_INITS: dict[str, AdapterStart] = {
    # The method (eq. 7-8).
    "svd": svd_adapter,
    # Table 4, without SVD initialisation; and where blocks are repeated.
    "zero": zero_adapter,
}


@torch.no_grad()
def replica_tensors(
    block: nn.Module,
    source: StreamedModel,
    replica: Replica,
    options: ReplicaOptions,
    source_blocks: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """What is one replica's own, by paths within its block: adapters, output norms and bias differences.

    Args:
        block: the replica in the compact model; its parameters may be on the meta device.
        source: the model that the blocks come from.
        replica: its row of the plan.
        options: how they start.
        source_blocks: the source's block behind each logical block; None: the same numbering.
    """
    own, base = (i if source_blocks is None else source_blocks[i] for i in (replica.block, replica.base))
    generator = torch.Generator().manual_seed((options.seed + replica.block * _SEED_STEP) % 2**63)
    init = ADAPTER_INITS[options.adapter_init]
    like = next(source.model.get_input_embeddings().parameters())

    def filled(path: str, shared: SharedLinear, seed: int) -> dict[str, torch.Tensor]:
        linear = path.removesuffix(INNER)
        pruned, kept = (source.weight_matrix(i, linear) for i in (own, base))
        left, right = init(pruned, kept, replica.rank_of(linear), torch.Generator().manual_seed(seed))
        found = {f"{path}.adapter_A": _like(left, like), f"{path}.adapter_B": _like(right, like)}
        if shared.bias_difference is not None:
            own_bias, base_bias = (source.parameter(i, f"{linear}.bias") for i in (own, base))
            found[f"{path}.bias_difference"] = own_bias - base_bias
        return found

    tensors: dict[str, torch.Tensor] = {}
    shared = [(path, module) for path, module in block.named_modules() if isinstance(module, SharedLinear)]
    seeds = torch.randint(2**62, (len(shared),), generator=generator).tolist()
    tasks = [partial(filled, path, module, seed) for (path, module), seed in zip(shared, seeds, strict=True)]
    for found in in_parallel(tasks, workers_of(source.device)):
        tensors |= found
    for path, module in block.named_modules():
        if isinstance(module, NormedOutput):
            shape = module.output_norm.normalized_shape
            tensors[f"{path}{OUTPUT_NORM}"] = _like(torch.full(shape, float(options.output_norm)), like)
    return tensors


@torch.no_grad()
def adapter_spectra(model: StreamedModel, source: StreamedModel, plan: Plan) -> dict[int, dict[str, Spectrum]]:
    """What part of the difference of two weights each adapter mends, by block and path of the linear.

    Args:
        model: the compact model.
        source: the source model.
        plan: the model's plan; blocks are numbered as the source's.
    """
    spectra: dict[int, dict[str, Spectrum]] = {replica.block: {} for replica in plan.replicas}
    for replica in plan.replicas:
        for full, module in model.blocks[replica.block].named_modules():
            if isinstance(module, SharedLinear):
                down, up = (model.parameter(replica.block, f"{full}.adapter_{name}").float() for name in "AB")
                path = full.removesuffix(INNER)
                own, base = (source.weight_matrix(i, path) for i in (replica.block, replica.base))
                difference = (own - base).float()
                energy, rank = difference.square().sum().item(), len(down)
                ranks = [*(2**power for power in range(rank.bit_length()) if 2**power < rank), rank]
                left = [(difference - up[:, :r] @ down[:r]).square().sum().item() for r in ranks]
                mended = [round(1 - rest / energy, 5) if energy else 1.0 for rest in left]
                spectra[replica.block][path] = {"ranks": ranks, "mended": mended}
    return spectra


def _like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(device=like.device, dtype=like.dtype).contiguous()


def init_of(options: ReplicaOptions) -> dict[str, Any]:
    """What decides the replicas' own tensors, besides plan, source and text."""
    names = ("adapter_init", "output_norm", "refit_kept", "seed")
    return {name: getattr(options, name) for name in names}


def fill(
    assembly: Assembly,
    source: StreamedModel,
    windows: torch.Tensor,
    options: ReplicaOptions,
    *,
    units: Mapping[int, torch.Tensor],
    stage: CachedStage,
    spill: Path | None = None,
    states: SourceStates | None = None,
    track: Track = silent,
) -> None:
    """Fills what is the replicas' own, block by block, then refits what is left if that is asked for.

    Args:
        assembly: the compact model.
        source: whose blocks they replace.
        windows: calibration windows, (windows, tokens) ids; none where nothing is refitted.
        options: how replicas are made.
        units: by block, the hidden units that its MLP keeps, where not all.
        stage: keeps what is done, which a run that was killed finds again.
        spill: folder for files that hold the fits' hidden states; None: memory does.
        states: as `refit_kept` takes them.
        track: reports each replica, and each block behind the first of them.
    """
    plan, layout = plan_of(assembly.model.config), assembly.model.config.sublayer_paths
    replicas = plan.replicas
    for replica in track(replicas, "initialising replicas", len(replicas)) if replicas else ():
        make = partial(replica_tensors, assembly.blocks[replica.block], source, replica, options)
        name = f"replica-{replica.block}"
        assembly.own(replica.block, stage.readers(name, stage.tensors(name, make)))
    for block, kept in units.items():
        assembly.own(block, readers_of_units(source, block, layout["mlp"], kept))
    if options.refit_kept:
        given = (source, assembly, range(len(assembly)), windows)
        changed = [one.block for one in plan.sublayers]
        refit_kept(*given, units=units, changed=changed, spill=spill, states=states, stage=stage, track=track)
