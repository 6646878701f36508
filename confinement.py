"""What a process that runs model-written Python may not do, and how the Linux kernel is told. Used inside grader_box.py alone.

    enter_namespaces()          # once, for the zygote: users, processes, mounts, network, IPC of its own
    make_root([stdlib])         # once: the only files there are
    confine(limits, ...)        # in every child, before the response runs

References: namespaces(7), user_namespaces(7), pivot_root(2), seccomp(2), capabilities(7), getrlimit(2).
"""

import ctypes
import errno
import os
import resource
import signal
import struct
import tempfile

SCRATCH = "/scratch"  # where the isolated box's root has its scratch folder
NOBODY = 65534
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
PDEATHSIG, NO_NEW_PRIVS, SECCOMP = 1, 38, 22  # options of prctl
PROCESSORS = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, seccomp's name of the architecture
# The system calls refused with EPERM: those that start, signal or read processes, reach the network, make objects that outlive
# their process or are not counted as its memory, or change what it sees.
REFUSED = {
    "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "socket": (41, 198),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "memfd_create": (319, 279), "io_uring_setup": (425, 425),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "fsopen": (430, 430),
    "open_tree": (428, 428), "move_mount": (429, 429),
}  # fmt: skip


libc = ctypes.CDLL(None, use_errno=True)


def libc_call(name: str, *arguments) -> None:
    """A C function that returns 0, or an OSError that names it."""
    if getattr(libc, name)(*(a.encode() if isinstance(a, str) else a for a in arguments)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def mount(source, target, kind=None, flags=0, options=None) -> None:
    libc_call("mount", source, target, kind, ctypes.c_ulong(flags), options)


class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def die_with_parent() -> None:
    """Has the kernel kill this process when the one that forked it ends."""
    libc_call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def system_call_filter(machine: str) -> Filter | None:
    """The seccomp program that refuses REFUSED and foreign architectures; None for an unknown processor."""
    if machine not in PROCESSORS:
        return None
    column, architecture = PROCESSORS[machine]
    numbers = [row[column] for row in REFUSED.values() if row[column] is not None]
    n, load, equal, at_least, give = len(numbers), 0x20, 0x15, 0x35, 0x06
    code = [(load, 0, 0, 4), (equal, 0, n + 3, architecture), (load, 0, 0, 0), (at_least, n + 1, 0, 0x40000000)]
    code += [(equal, n - i, 0, number) for i, number in enumerate(numbers)]  # (what, instructions to skip if so, if not, with)
    code += [(give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050000 | errno.EPERM)]  # allow; fail with EPERM
    return Filter(len(code), b"".join(struct.pack("HBBI", *instruction) for instruction in code))


def enter_namespaces() -> None:
    """Moves this process into a user namespace and its own mounts, network and IPC; its children into a PID namespace.

    In there user 1 is the user that started the grader, or nobody where root did. A helper that stays outside says so, because
    only from there may two users be mapped.
    """
    me = os.getpid()
    user, group = f"1 {os.geteuid()} 1", f"1 {os.getegid()} 1"
    if os.geteuid() == 0:
        user = group = f"0 0 1\n1 {NOBODY} 1"
    wait, go = os.pipe()
    helper = os.fork()
    if helper == 0:
        try:
            os.close(go)
            for name, text in {"setgroups": "deny", "uid_map": user, "gid_map": group}.items() if os.read(wait, 1) else ():
                with open(f"/proc/{me}/{name}", "w") as file:
                    file.write(text)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno)
    try:
        libc_call("unshare", NEWNS | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET)
        os.write(go, b"!")
    finally:
        os.close(go)
        os.close(wait)
        _, status = os.waitpid(helper, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise OSError(code, f"mapping users: {os.strerror(code)}")


def make_root(libraries: list[str]) -> None:
    """A root that holds these folders, read-only, and an empty mount point for scratch. The old one is gone."""
    root = "/proc"  # covered in this mount namespace alone; nothing in it is needed any more
    mount(None, "/", None, REC | PRIVATE)
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    for folder in libraries:
        if not os.path.isdir(root + folder):
            os.makedirs(root + folder)
            mount(folder, root + folder, None, BIND)
            kept = os.statvfs(folder).f_flag & NOEXEC  # a flag of the outer mount may not be dropped
            mount(None, root + folder, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV | kept)
    os.mkdir(root + SCRATCH)
    os.chdir(root)
    libc_call("pivot_root", ".", ".")
    libc_call("umount2", ".", 2)  # MNT_DETACH
    os.chdir("/")
    mount(None, "/", None, REMOUNT | BIND | RDONLY | NOSUID | NODEV | NOEXEC)


def confine(limits: dict, isolated: bool, scratch: str, system_calls: Filter | None) -> None:
    """Takes from this process, for good, what a response may not have. Nothing that happens later gives it back."""
    if isolated:
        libc_call("unshare", NEWNS)
        mount("tmpfs", scratch, "tmpfs", NOSUID | NODEV | NOEXEC, f"size={limits['file_mb']}m,nr_inodes=4096,mode=1777")
    os.chdir(scratch)
    os.environ.update(HOME=scratch, TMPDIR=scratch)
    tempfile.tempdir = scratch
    mb = 1 << 20
    for name, most in [
        ("CPU", limits["cpu_s"]), ("AS", limits["memory_mb"] * mb), ("FSIZE", limits["file_mb"] * mb), ("STACK", 64 * mb),
        ("NPROC", 0), ("NOFILE", 64), ("CORE", 0), ("MSGQUEUE", 0), ("MEMLOCK", 0),
    ]:  # fmt: skip
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))
    if isolated or os.geteuid() == 0:  # process limits do not bind root
        user = 1 if isolated else NOBODY
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    die_with_parent()  # here: changing users has undone it
    libc_call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # no capability is left, in either set of 32
    libc_call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    if system_calls:
        libc_call("prctl", SECCOMP, 2, ctypes.byref(system_calls), 0, 0)
