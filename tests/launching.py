"""Commands of `accelerate launch` for tests that train in two processes on the CPU."""

from __future__ import annotations

import os
import socket
import sys


def two_processes(*command: str) -> list[str]:
    """The command that runs a script, or `-m` and a module, with its arguments in two processes."""
    # `accelerate launch --cpu --num_processes 2` starts one process, silently; this form starts two.
    launch = "accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
    processes = ["--num_processes", "2", "--main_process_port", str(_free_port())]
    return [sys.executable, "-m", *launch.split(), *processes, *command]


def on_cpu() -> dict[str, str]:
    """The environment of such a command."""
    return {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
