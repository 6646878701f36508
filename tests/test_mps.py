"""CUDA MPS against a control program of our own: what is started, what is believed, what is said."""

import os
import stat

import pytest

import mps

CONTROL = """#!/bin/sh
# a daemon is a file; its one server, 77, has as client whatever process wrote its number to the file "client"
cd "$(dirname "$0")"
if [ "$1" = "-d" ]; then echo "start [$CUDA_VISIBLE_DEVICES]" >> log; %(start)s; exit; fi
[ -f daemon ] || exit 1
read question
case "$question" in
  get_server_list) echo 77;;
  "get_client_list 77") %(clients)s;;
  quit) rm daemon; echo quit >> log;;
esac
"""
PROBE = "import os; open(os.environ['FAKE'] + '/client', 'w').write(str(os.getpid())); print('computed', flush=True); input()"


@pytest.fixture
def control(tmp_path, monkeypatch):
    def install(start="touch daemon", clients="cat client"):
        path = tmp_path / mps.CONTROL
        path.write_text(CONTROL % {"start": start, "clients": clients})
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE", str(tmp_path))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
        monkeypatch.setattr(mps, "PROBE", PROBE)
        return tmp_path

    return install


def said_by_sharing(folder) -> tuple[str, bool]:
    """(the one line, whether a daemon runs inside)."""
    said = []
    with mps.shared_gpus(said.append):
        inside = (folder / "daemon").exists()
    assert len(said) == 1
    return said[0], inside


def test_a_server_is_started_seen_to_serve_and_stopped(control):
    folder = control()
    assert said_by_sharing(folder) == ("CUDA MPS: serves", True)
    assert (folder / "log").read_text() == "start []\nquit\n"  # all GPUs are its own, so that ids mean the same to its clients


def test_a_daemon_that_runs_already_is_used_and_left_alone(control):
    folder = control()
    (folder / "daemon").touch()
    assert said_by_sharing(folder) == ("CUDA MPS: serves", True)
    assert (folder / "daemon").exists() and not (folder / "log").exists()


@pytest.mark.parametrize("how, probe, said", [
    ({"start": "echo no permission >&2; false"}, PROBE, "does not start (no permission); runs on one GPU take turns"),
    ({"clients": "echo 1"}, PROBE, "does not serve: a CUDA process is not among its clients (1 servers); runs on one GPU take"),
    ({}, "raise SystemExit('CUDA error 805')", "does not serve: a CUDA process fails under it (CUDA error 805); runs on one GPU"),
])  # fmt: skip
def test_what_does_not_serve_is_said_and_stopped(control, monkeypatch, how, probe, said):
    folder = control(**how)
    monkeypatch.setattr(mps, "PROBE", probe)
    line, inside = said_by_sharing(folder)
    assert said in line and not inside and not (folder / "daemon").exists()


def test_where_it_is_absent_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert said_by_sharing(tmp_path) == (
        "CUDA MPS: absent (no nvidia-cuda-mps-control on this machine); runs on one GPU take turns",
        False,
    )


def test_a_stop_inside_stops_the_daemon_too(control):
    folder = control()
    with pytest.raises(KeyboardInterrupt), mps.shared_gpus(lambda line: None):
        raise KeyboardInterrupt
    assert not (folder / "daemon").exists()
