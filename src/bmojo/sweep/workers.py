"""Several workers on one sweep: processes that torchrun, or `launch`, starts, each with a GPU or its share of cores.

They share a folder and nothing else. What torchrun tells them of each other is hidden, or training would take them for
the processes of one run and have them share its batches.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from bmojo.errors import BMojoError

TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
        "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


class Place(NamedTuple):
    """A worker among all, and among those of its machine."""

    rank: int
    local_rank: int
    local_workers: int


def started_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    return "LOCAL_RANK" in environment and "WORLD_SIZE" in environment


def leave_group(threads: int | None = None) -> Place:
    """Make this process, one of torchrun's, a worker of its own: with `threads`, or its share of the cores, and the
    GPU of its local rank. To be called before anything uses a GPU or joins the processes."""
    told = {name: os.environ.pop(name) for name in TOLD if name in os.environ}
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    place = Place(int(told["RANK"]), int(told["LOCAL_RANK"]), int(told["LOCAL_WORLD_SIZE"]))
    share_cores(place.local_workers, threads)
    if gpus := _visible_gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place.local_rank % len(gpus)]
    return place


def share_cores(workers: int, threads: int | None) -> None:
    """Give this process `threads`, or an equal share of the cores, if torch was not told of fewer (OMP_NUM_THREADS)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, min(torch.get_num_threads(), cores // workers)))


def _visible_gpus() -> list[str]:
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]


def launch(workers: int, function: Callable[..., str | None], *arguments: Any) -> None:
    """Run `function` (of a module, with arguments that can be pickled) in so many processes of torch's launcher.

    It returns None, or what the user can mend: raised as BMojoError, once all have ended. KeyboardInterrupt stops all.
    """
    from torch.distributed.elastic.agent.server import api as agent
    from torch.distributed.elastic.multiprocessing import api as processes
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for part in (agent, processes):
        part.logger.setLevel(logging.ERROR)  # they warn that they stop the workers, which is what Ctrl-C asks for
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="spawn",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        failures = elastic_launch(config, function)(*arguments)
    except processes.SignalException as error:
        raise KeyboardInterrupt from error
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        raise BMojoError(f"a worker ended early ({first.message}); run the same command again to go on") from error
    if messages := [message for message in failures.values() if message]:
        raise BMojoError(messages[0])
