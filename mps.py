"""CUDA MPS, so that several processes compute on one GPU at the same time instead of by turns.

    with shared_gpus(print):
        ...                      # processes started here are served, where MPS is there and serves

Multi-Process Service: https://docs.nvidia.com/deploy/mps. A control daemon that runs already is used and left alone; one that
is started here is stopped at the end. It counts as serving only when a CUDA process is seen among its clients.
"""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

CONTROL = "nvidia-cuda-mps-control"
PROBE = "import torch; torch.zeros(1, device='cuda').item(); print('computed', flush=True); input()"  # a client until stdin ends


def _ask(question: str) -> str | None:
    """The control daemon's answer, or None where no daemon answers."""
    try:
        done = subprocess.run([CONTROL], input=question + "\n", capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None


def _why_not_serving() -> str:
    """'' when a fresh CUDA process is a client of an MPS server; else the reason."""
    with subprocess.Popen([sys.executable, "-c", PROBE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as probe:  # fmt: skip
        if probe.stdout.readline() != "computed\n":
            errors = probe.communicate()[1].strip().splitlines()
            return f"a CUDA process fails under it ({errors[-1] if errors else 'no message'})"
        servers = (_ask("get_server_list") or "").split()
        clients = [pid for server in servers for pid in (_ask(f"get_client_list {server}") or "").split()]
        probe.communicate("\n")
        return "" if str(probe.pid) in clients else f"a CUDA process is not among its clients ({len(servers)} servers)"


@contextmanager
def shared_gpus(say):
    """Starts MPS for what runs inside, and says in one line whether it serves.

    Without it processes on one GPU take turns: slower, with the same results.
    """
    if shutil.which(CONTROL) is None:
        say(f"CUDA MPS: absent (no {CONTROL} on this machine); runs on one GPU take turns")
        yield
        return
    started = False
    if _ask("get_server_list") is None:
        # numbered by all GPUs: a daemon that saw only some would count those from 0, and so would its clients
        environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        done = subprocess.run([CONTROL, "-d"], env=environment, capture_output=True, text=True, check=False)
        started = done.returncode == 0
        if not started:
            reason = " ".join((done.stderr or done.stdout).split()) or f"exit status {done.returncode}"
            say(f"CUDA MPS: does not start ({reason}); runs on one GPU take turns")
            yield
            return
    try:
        reason = _why_not_serving()
        if reason and started:  # its clients would fail, or wait for a server that never comes
            _ask("quit")
            started = False
        say(f"CUDA MPS: does not serve: {reason}; runs on one GPU take turns" if reason else "CUDA MPS: serves")
        yield
    finally:
        if started:
            _ask("quit")
