"""Several processes train as one: each takes its share of every batch, gradients and figures are summed over all.

torchrun --nproc-per-node 4 -m scanlib train scouter ...

    with process_group():                                   # joins the others, where torchrun started this one
        trainer.fit(shard_loader(loader), epochs=2)           # the Trainer does the rest

A step's gradient is that of the whole batch, whatever the shares: each process weighs its own by the pictures it had. So for a
loss that is a mean over pictures one process and several walk the same way. Three things see the pictures of their own process
only: batch norms, whose statistics are averaged at each epoch's end; losses that are no such mean, as an area to a power; and
draws, as of augmentation or dropout, which repeat from process to process.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader


def is_distributed() -> bool:
    """Are there several processes?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def get_world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Is this the process that speaks and writes? True of a single one."""
    return not is_distributed() or dist.get_rank() == 0


@contextlib.contextmanager
def process_group():
    """Inside, processes started by torchrun know each other; one started by hand stays alone."""
    started = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if started:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda and dist.is_nccl_available() else "gloo")
    yield
    if started:  # not after an error: the others would be waited for, and torchrun ends them
        dist.destroy_process_group()


class _Share:
    """Of every batch of indices, each ``world``-th, from ``rank`` on."""

    def __init__(self, batches, rank: int, world: int):
        self.batches, self.rank, self.world = batches, rank, world
        self.sampler = getattr(batches, "sampler", None)  # what seeds a loader's draws

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return (batch[self.rank :: self.world] for batch in self.batches)


def _collate(items, collate):
    return collate(items) if items else None  # a last batch may have fewer pictures than there are processes


def shard_loader(loader: DataLoader) -> DataLoader:
    """The loader of this process's share: as many batches as all have, a part of each. No picture is left out or seen twice."""
    if not is_distributed():
        return loader
    from functools import partial

    return DataLoader(
        loader.dataset,
        batch_sampler=_Share(loader.batch_sampler, dist.get_rank(), dist.get_world_size()),
        num_workers=loader.num_workers,
        collate_fn=partial(_collate, collate=loader.collate_fn),
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
    )


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """Each value summed over all processes; of a single one, as they are."""
    if not is_distributed():
        return values
    total = torch.tensor(values, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    dist.all_reduce(total)
    return total.tolist()


def sum_gradients(model: nn.Module, weight: float) -> None:
    """Gradients of this process's mean loss -> those of the mean over all; weight: its share of the pictures, 0 for none."""
    if not is_distributed():
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([p.grad is not None for p in trained], dtype=torch.float32, device=trained[0].device)
    dist.all_reduce(used)
    trained = [p for p, by in zip(trained, used.tolist(), strict=True) if by]  # what nobody used keeps its None
    parts = [torch.zeros_like(p) if p.grad is None else p.grad * weight for p in trained]
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat)
    for parameter, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = part.view_as(parameter)


def average_statistics(model: nn.Module) -> None:
    """Running statistics -> their means over all processes."""
    if not is_distributed():
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def same_start(tensors: list[Tensor]) -> None:
    """Everyone's tensors become the first process's."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def wait_for_all() -> None:
    """Until all are here."""
    if is_distributed():
        dist.all_reduce(torch.zeros(1))


@contextlib.contextmanager
def main_process_first():
    """Inside, the first process goes ahead and the others follow: what it downloads, they find."""
    if not is_main_process():
        wait_for_all()
    yield
    if is_main_process():
        wait_for_all()
