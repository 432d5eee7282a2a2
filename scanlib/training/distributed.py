"""Glue between ``Trainer`` and torch.distributed; gradients are averaged by torch's DistributedDataParallel (DDP).

    with process_group():                               # joins the processes that torchrun started
        trainer.fit(shard_loader(loader), epochs=2)     # each process trains on its share of every batch

For a loss that is a mean over images, training equals that of one process. Two things differ: batch norms normalize the share of
their own process, and random draws, such as dropout, are the same in every process.
"""

import contextlib
import os
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader


def is_distributed() -> bool:
    """Return whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def get_world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Return whether this process prints and writes files. A single process does."""
    return not is_distributed() or dist.get_rank() == 0


@contextlib.contextmanager
def process_group():
    """Join the processes that torchrun started. Without torchrun, do nothing."""
    started = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if started:
        if cuda := torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda and dist.is_nccl_available() else "gloo")
    yield
    if started:  # not after an error: this would wait for the other processes, which torchrun ends
        dist.destroy_process_group()


class _ShardedBatchSampler(BatchSampler):
    """Every ``world_size``-th index of each batch. torch's DistributedSampler would repeat images to make shares equal."""

    def __iter__(self):
        return (batch[dist.get_rank() :: dist.get_world_size()] for batch in super().__iter__())


def _collate_share(collate, items):
    return collate(items) if items else None  # the last batch may have fewer images than there are processes


def shard_loader(loader: DataLoader) -> DataLoader:
    """Return a loader of this process's share of every batch of ``batch_size``: each image once, None for an empty share."""
    if not is_distributed():
        return loader
    batches = _ShardedBatchSampler(loader.sampler, loader.batch_size, loader.drop_last)  # type: ignore[arg-type]
    options = {name: getattr(loader, name) for name in ("num_workers", "pin_memory", "worker_init_fn", "generator")}
    return DataLoader(loader.dataset, batch_sampler=batches, collate_fn=partial(_collate_share, loader.collate_fn), **options)


def all_reduce_sum(values: list[float]) -> list[float]:
    """Return the sum of each value over all processes (float64), or the values themselves if there is one process."""
    if not is_distributed():
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


@contextlib.contextmanager
def main_process_first():
    """Run the block in the main process, then in the others, so that they find the files it wrote."""
    if not is_main_process():
        all_reduce_sum([0.0])
    yield
    if is_main_process():
        all_reduce_sum([0.0])
