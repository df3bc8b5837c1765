"""Processes that train together: joining them, wrapping a model for them, and what they exchange."""

import contextlib
import gc
import inspect
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from flexigpt.runtime.errors import InputError
from flexigpt.runtime.launch import launched


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes what is written once."""
        return self.rank == 0

    @property
    def joined(self) -> bool:
        """Whether there is a process group, as under torchrun, if only of one process."""
        return dist.is_initialized()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The values summed over all processes, in place."""
        if self.joined:
            dist.all_reduce(values)
        return values

    def lead(self, action: Callable[[], None]) -> None:
        """Runs it in the first process, while the others wait for its end.

        Raises:
            InputError: that of the action, in every process: none is left waiting.
        """
        refusal: list[str | None] = [None]
        if self.leads:
            try:
                action()
            except InputError as error:
                refusal = [str(error)]
        if self.joined:
            dist.broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise InputError(refusal[0])


ALONE = World()


@contextlib.contextmanager
def joined_world(device: torch.device) -> Iterator[World]:
    """Joins the processes that torchrun started (NCCL on GPUs, gloo on CPUs), and parts from them at the end.

    Without torchrun there is one process and no group.
    """
    if not launched():
        yield ALONE
        return
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size())
    except BaseException as error:
        _free_frames(error)
        raise
    finally:
        part()


def part() -> None:
    """Leaves the process group, where there is one: what follows keeps no other process waiting."""
    if dist.is_initialized():
        # A DDP must not outlive its group: freed last, it joins gloo's threads, and these may be waiting for the GIL.
        gc.collect()
        dist.destroy_process_group()


def _free_frames(error: BaseException | None) -> None:
    """Lets go of what the frames that an error came through still hold, such as a model behind DDP."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def local_device(device: str) -> str:
    """The device name of this process: under torchrun the GPU of its local rank, where a GPU is meant.

    Raises:
        InputError: a GPU named for all processes, or more processes than GPUs.
    """
    if not launched() or device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return device
    if device not in ("auto", "cuda"):
        raise InputError(f"--device {device} would put every process on one GPU: leave it out under torchrun")
    local_rank, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    started = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if started > found:
        raise InputError(f"torchrun started {started} processes on this machine, which has {found} GPUs: start fewer")
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def shard(
    model: nn.Module, groups: Sequence[Sequence[nn.Module]], device: torch.device, world: World, dtype: torch.dtype
) -> None:
    """FSDP2 in place: one group for each base and its replicas, one for what is outside the blocks.

    A replica computes with its base's weights, so both have to be gathered together: torch refuses a parameter that two
    groups manage.

    Args:
        model: its parameters on the CPU or on `device`.
        groups: blocks that are gathered together; every block in exactly one.
        device: of this process.
        world: all processes, which share every parameter.
        dtype: to compute in; gradients are reduced in float32.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for group in groups:
        fully_shard(list(group), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def replicate(model: nn.Module, world: World) -> nn.Module:
    """The model behind DDP; itself where there is no process group."""
    if not world.joined:
        return model
    # Buffers (rotary frequencies) never change. By its old name before torch 2.13, which warns of that.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **buffers)


@contextlib.contextmanager
def reduced(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """Within it gradients stay local unless it is the `last` backward pass of a step."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        with wrapped.no_sync():
            yield
        return
    sync: Any = getattr(wrapped, "set_requires_gradient_sync", None)
    if sync is not None:
        sync(last)
    yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in full where FSDP holds a part of it; every process must call it."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, without gradient and on the same memory: all of it, or FSDP's part."""
    local: Any = getattr(tensor, "to_local", None)
    return tensor.detach() if local is None else local().detach()
