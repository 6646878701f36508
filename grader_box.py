"""The box in which grader.py runs model-written Python. It imports the standard library alone and knows no answer.

    trainer (grader.py) == pipes ==> launcher -- fork --> zygote -- one fork per job --> the response

The zygote is a clean Python with the usual modules loaded; nothing of a response ever runs in it, so that every child starts
alike. It is handed a job (code and calls, never expected values), forks a child, and sends back the bytes which that child wrote
to its own pipe, unread.

Isolated, the zygote is process 1 of its own user, PID, mount, network and IPC namespaces. Its root holds Python's standard
library and assets/box, read-only, and nothing else: no /proc, no /dev, no file of the user's. Each child has a scratch folder in
a mount namespace of its own, which ends with it. In both boxes a child has no privilege, one process, limits on CPU time, wall
time, memory and file size, and a filter that refuses the system calls named in confinement.py.
"""

import contextlib
import errno
import gc
import importlib
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from functools import cache

from confinement import NOBODY, SCRATCH, confine, die_with_parent, enter_namespaces, make_root, system_call_filter

PRELOADED = """bisect cmath collections.abc copy dataclasses datetime enum fractions functools heapq itertools json math operator
    random re string sortedcontainers types typing"""  # what responses import; each costs every fork a little
TRIAL_LIMITS = {"cpu_s": 9, "wall_s": 9, "memory_mb": 999, "file_mb": 1, "output_mb": 1}
TRIAL = {"code": "", "preamble": "", "entry": "None", "calls": [], "limits": TRIAL_LIMITS}  # whether a child can be confined
MORE = """abc array asyncio base64 calendar contextlib decimal difflib graphlib hashlib inspect io logging numbers pprint queue
    secrets statistics struct textwrap threading time traceback unittest uuid warnings"""  # nobody may be unable to read these


# ---------------------------------------------------------------- values as text, the same on both sides of the pipe


class ListNode:
    """LeetCode's linked list, for arguments and expected values."""

    def __init__(self, val=0, next=None):
        self.val, self.next = val, next


class TreeNode:
    """LeetCode's binary tree."""

    def __init__(self, val=0, left=None, right=None):
        self.val, self.left, self.right = val, left, right


PLAIN = (bool, int, float, str, bytes, list, tuple, set, frozenset, dict)


def canonical(value, exact: bool = True) -> str:
    """One text per value: two values are equal exactly where their texts are, so that no hostile object is ever compared.

    exact: types must agree (1, 1.0 and True have three texts, a subclass has none). Otherwise equality is Python's: numbers by
    value, subclasses of the plain types by their content. Linked lists and trees are compared by their nodes' values.
    Raises TypeError for any other type and ValueError for a list or tree that has a cycle or more than 100,000 nodes.
    """
    return json.dumps(_tagged(value, exact), separators=(",", ":"))


def _tagged(value, exact: bool):
    if value is None:
        return None
    kind = type(value) if exact else next((t for t in PLAIN if isinstance(value, t)), type(value))
    if kind is bool:
        return value if exact else int(value)
    if kind is float:
        return int(value) if not exact and value.is_integer() else value + 0.0  # -0.0 is 0.0
    if kind in (int, str):
        return value
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is list:
        return [_tagged(x, exact) for x in value]
    if kind is tuple:
        return {"tuple": [_tagged(x, exact) for x in value]}
    if kind in (set, frozenset):
        return {kind.__name__ if exact else "set": sorted((_tagged(x, exact) for x in value), key=json.dumps)}
    if kind is dict:
        return {"dict": sorted(([_tagged(k, exact), _tagged(v, exact)] for k, v in value.items()), key=json.dumps)}
    if hasattr(value, "val") and hasattr(value, "next"):
        values = []
        while value is not None and len(values) <= 100_000:
            values.append(_tagged(value.val, exact))
            value = value.next
        return {"list_node": _bounded(values)}
    if hasattr(value, "val") and hasattr(value, "left") and hasattr(value, "right"):
        values, nodes = [], [value]
        for node in nodes:
            values.append(None if node is None else _tagged(node.val, exact))
            if node is not None and len(nodes) <= 200_000:
                nodes += [node.left, node.right]
        while values[-1] is None:
            values.pop()
        return {"tree_node": _bounded(values)}
    raise TypeError(f"a {type(value).__name__} is not plain data")


def _bounded(values: list) -> list:
    if len(values) > 100_000:
        raise ValueError("a cycle, or more than 100,000 nodes")
    return values


def restored(data, scope: dict):
    """The value of a canonical text that json has read. Nodes are of the scope's own classes: those the code was written for."""
    if isinstance(data, list):
        return [restored(x, scope) for x in data]
    if not isinstance(data, dict):
        return data
    ((tag, inner),) = data.items()
    if tag == "bytes":
        return bytes.fromhex(inner)
    if tag == "dict":
        return {restored(k, scope): restored(v, scope) for k, v in inner}
    values = restored(inner, scope)
    if tag == "list_node":
        node, cls = None, scope.get("ListNode", ListNode)
        for value in reversed(values):
            node = cls(value, node)
        return node
    if tag == "tree_node":
        cls, rest = scope.get("TreeNode", TreeNode), iter(values)
        nodes = [cls(next(rest))]
        for node in nodes:
            for side in ("left", "right"):
                if (value := next(rest, None)) is not None:
                    setattr(node, side, cls(value))
                    nodes.append(getattr(node, side))
        return nodes[0]
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag](values)


# ---------------------------------------------------------------- the pipes


def receive(fd: int) -> tuple[dict, bytes] | None:
    """One frame: a JSON message and the raw bytes behind it. None where the other side has closed."""
    length = int.from_bytes(_read(fd, 4), "big")
    data = _read(fd, length)
    message, _, raw = data.partition(b"\n")
    return (json.loads(message), raw) if data and len(data) == length else None


def send(fd: int, message: dict, raw: bytes = b"") -> None:
    """Writes one frame: its length, the message in JSON, a line break, raw bytes."""
    data = json.dumps(message).encode() + b"\n" + raw
    _write(fd, len(data).to_bytes(4, "big") + data)


def _read(fd: int, n: int) -> bytes:
    parts = []
    while n and (part := os.read(fd, min(n, 1 << 20))):
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# ---------------------------------------------------------------- the response's own process


@cache
def compiled(source: str):
    return compile(source, "<preamble>", "exec")


def respond(job: dict, fd: int) -> None:
    """Runs one response and writes to its pipe, a line each: `compiled`; then `=` and the value's canonical text, call by call;
    at last, where something was raised, `!` and its name."""
    write, text, build = _write, canonical, restored  # what a response replaces in this module is not what is used here
    try:
        code = compile(job["code"], "<response>", "exec", dont_inherit=True)
        write(fd, b"compiled\n")
        scope = {"__name__": "response"}
        exec(compiled(job["preamble"]), scope)
        exec(code, scope)
        target = eval(job["entry"], scope)
        for i, call in enumerate(job["calls"]):
            if job["stubs"][i] is not None:
                put_stub(scope, job["function"], build(json.loads(job["stubs"][i]), scope))
            args, kwargs = build(json.loads(call), scope)
            value = target(*args, **kwargs)
            write(fd, b"=%s\n" % (text(value, job["exact"]).encode() if job["values"] else b""))
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: what ends a program ends no call with a value
        write(fd, b"!%s\n" % type(error).__name__.encode())


def put_stub(scope: dict, entry: str, value) -> None:
    """Has the response's own function, `f` or `Solution().f`, return one value whatever it is asked."""
    owner, _, name = entry.rpartition("().")
    if owner:
        setattr(scope[owner], name, lambda *args, **kwargs: value)
    else:
        scope[name] = lambda *args, **kwargs: value


def run(job: dict, isolated: bool, null: int, system_calls) -> tuple[dict, bytes]:
    """One job in one child: how it ended, and what it wrote to its pipe. No process of the job is left when this returns."""
    limits, leave = job["limits"], os._exit
    compiled(job["preamble"])  # here, so that children find it done
    reader, writer = os.pipe()
    scratch = SCRATCH if isolated else tempfile.mkdtemp(prefix="grader-")
    if not isolated and os.geteuid() == 0:
        os.chown(scratch, NOBODY, NOBODY)
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.dup2(writer, 3)
            os.closerange(4, 64)  # the zygote's own pipes are 0 and 1
            random.seed(0)  # the same response gets the same verdict
            confine(limits, isolated, scratch, system_calls)
            respond(job, 3)
        except OSError as error:  # respond raises nothing: this process could not be confined
            _write(3, f"#{error.strerror}".encode())
        finally:
            leave(0)
    os.close(writer)
    output, ended = collect(reader, start + limits["wall_s"], limits["output_mb"] << 20)
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(-1, signal.SIGKILL) if isolated else os.killpg(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    cpu = usage.ru_utime + usage.ru_stime
    if ended == "by itself" and os.WIFSIGNALED(status):
        ended = "CPU limit" if cpu > limits["cpu_s"] - 0.5 else f"signal {os.WTERMSIG(status)}"
    if not isolated:
        remove(scratch)
    if output.startswith(b"#"):  # nothing that a response writes can stand first
        raise OSError(errno.EPERM, output[1:].decode())
    return {"ended": ended, "cpu_s": cpu, "wall_s": time.monotonic() - start}, output


def collect(reader: int, deadline: float, most: int) -> tuple[bytes, str]:
    """What the child writes until its end of the pipe closes, its time is up, or it has written too much."""
    parts, size, poller = [], 0, select.poll()
    poller.register(reader, select.POLLIN)
    while size <= most:
        if not poller.poll(max(0, deadline - time.monotonic()) * 1000):
            return b"".join(parts), "wall limit"
        if not (part := os.read(reader, 1 << 16)):
            return b"".join(parts), "by itself"
        parts.append(part)
        size += len(part)
    return b"".join(parts).rpartition(b"\n")[0], "output limit"  # the lines that are whole


def remove(folder: str) -> None:
    """Deletes a folder that a response could write to, however deep: inner folders are moved out before they are emptied."""
    with contextlib.suppress(OSError):
        return os.rmdir(folder)  # mostly it is empty
    if not os.path.isdir(folder) or os.path.islink(folder):
        return  # it is gone, or it is a way to something else
    heap = tempfile.mkdtemp(prefix="grader-")
    os.rename(folder, f"{heap}/0")
    folders = [f"{heap}/0"]
    for path in folders:
        os.chmod(path, 0o700)
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, 0o700)
                os.rename(entry.path, f"{heap}/{len(folders)}")
                folders.append(f"{heap}/{len(folders)}")
            else:
                os.unlink(entry.path)
        os.rmdir(path)
    os.rmdir(heap)


# ---------------------------------------------------------------- the zygote


def main(box: str) -> None:
    isolated = box == "isolated"
    here = sys.path.pop(0)  # this file's folder, from which no response may import, but for:
    sys.path.append(os.path.join(here, "assets", "box"))
    for name in (PRELOADED if isolated else f"{PRELOADED} {MORE}").split():
        importlib.import_module(name)
    null = os.open("/dev/null", os.O_RDWR)
    tempfile.gettempdir()  # remembered from here on: the environment is emptied, and what the root holds changes
    system_calls = system_call_filter(os.uname().machine)
    stage = "namespaces of its own"
    try:
        if isolated:
            enter_namespaces()
            if zygote := os.fork():
                sys.exit(os.waitstatus_to_exitcode(os.waitpid(zygote, 0)[1]))
            die_with_parent()
            make_root([folder for folder in sys.path if os.path.isdir(folder)])
        stage = "a confined process"
        if isolated and system_calls is None:
            raise OSError(errno.ENOSYS, f"the filter of system calls knows no {os.uname().machine} processor")
        os.environ.clear()
        run(TRIAL, isolated, null, system_calls)
    except OSError as error:
        return send(1, {"missing": f"{stage} ({error.strerror})"})
    send(1, {"ready": True})
    gc.freeze()  # children share these pages
    while (request := receive(0)) is not None:
        send(1, *run(request[0], isolated, null, system_calls))


if __name__ == "__main__":
    main(sys.argv[1])
