"""Processes that work together in a test, over gloo on this machine."""

from __future__ import annotations

import datetime
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from patience import PATIENCE
from torch import distributed as dist

SENT = 200
"""Where ``tcpi_bytes_sent`` is in Linux's struct tcp_info; behind it are those that were sent again."""


def wire() -> int:
    """Bytes that the sockets of this process have sent so far, as the system counts them: gloo's own figure."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            found = socket.socket(fileno=os.dup(int(number)))
        except OSError:
            continue
        with found:
            try:
                told = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            except OSError:
                continue
            sent, again = struct.unpack_from("QQ", told, SENT)
            total += sent - again
    return total


def _begin(rank: int, function: Callable[..., Any], ranks: int, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    meet, patience = f"file://{folder}/meet", datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=meet, timeout=patience, rank=rank, world_size=ranks)
    try:
        found = function(rank, *arguments)
        if rank == 0:
            torch.save(found, f"{folder}/found")
    finally:
        dist.destroy_process_group()


def together(ranks: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function(rank, *arguments)`` returns in the first of so many processes."""
    torch.multiprocessing.spawn(_begin, (function, ranks, str(folder), arguments), ranks)
    return torch.load(folder / "found", weights_only=False)
