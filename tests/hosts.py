"""Hosts on one machine: Linux namespaces joined by virtual cables, each with its own network, name and processes.

    switch   10.77.0.254, the far end of every cable (a bridge); what is no host, such as a bucket's server, runs here
    node0    10.77.0.1    known to all by that name
    node1    10.77.0.2    …

Nothing of it outlives the process that made it: the namespaces end with their first processes, and those with it.
"""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

SWITCH = "10.77.0.254"
_NAMESPACES = ("--net", "--uts", "--mount", "--pid")
_TIMEOUT_S = 20


class Host:
    """A place to run processes in, by `nsenter` into the namespaces of its first process."""

    def __init__(self, name: str, address: str, within: "Host | None" = None) -> None:
        self.name = name
        self.address = address
        # The switch ends with this process, and all hosts with the switch they were made in.
        entry = within.wrap([]) if within else ["setpriv", "--pdeathsig", "KILL"]
        user = [] if within or os.geteuid() == 0 else ["--user", "--map-root-user"]
        script = f"hostname {name} && ip link set lo up && echo ready && exec sleep infinity"
        # The kernel ends everything in a PID namespace with its first process, and --kill-child ends that with this.
        self._holder = subprocess.Popen(
            [*entry, "unshare", *user, *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise OSError(self._holder.communicate(timeout=_TIMEOUT_S)[1].strip() or "unshare ended")
        self.first = _find_first(self._holder.pid)
        self._user = ["--user", "--preserve-credentials"] if os.geteuid() else []

    def wrap(self, command: Sequence[object], namespaces: Sequence[str] = _NAMESPACES) -> list[str]:
        """The command line that runs `command` on this host."""
        return ["nsenter", f"--target={self.first}", *self._user, *namespaces, "--", *map(str, command)]

    def run(self, *command: object) -> str:
        """Run a short command to its end; returns what it printed."""
        return _run(self.wrap(command))

    def start(
        self, command: Sequence[object], *, cwd: Path, env: Mapping[str, str], **options: Any
    ) -> "subprocess.Popen[str]":
        """Start a command here; gloo and NCCL are told of the one interface that leads to the others."""
        told = {**env, "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
        # Not Popen's cwd: entering the namespace of mounts leads to its root.
        return subprocess.Popen(self.wrap(["env", f"--chdir={cwd}", *command]), env=told, text=True, **options)

    def unplug(self) -> None:
        """Take the cable out: nothing arrives or leaves any more, and nobody is told."""
        self.run("ip", "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        """Put it back."""
        self.run("ip", "link", "set", "eth0", "up")

    def kill(self) -> None:
        """Switch the host off, with everything on it."""
        os.kill(self.first, signal.SIGKILL)
        self._holder.communicate(timeout=_TIMEOUT_S)

    def close(self) -> None:
        """The same for a host that may be off already."""
        if self._holder.poll() is None:
            self.kill()


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _find_first(pid: int) -> int:
    """The shell that a chain of nsenter and unshare, each with one child, has started; `sleep` takes its place."""
    while Path(f"/proc/{pid}/comm").read_text().strip() not in ("sh", "sleep"):
        pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
    return pid


@contextmanager
def join_hosts(count: int) -> Iterator[list[Host]]:
    """`count` hosts that reach each other by name, and after them the switch.

    Raises:
        OSError: namespaces are not permitted here, or a tool is missing; it says what the system said.
    """
    opened: list[Host] = []
    try:
        opened.append(switch := Host("switch", SWITCH))
        switch.run("ip", "link", "add", "br0", "type", "bridge")
        switch.run("ip", "addr", "add", f"{SWITCH}/24", "dev", "br0")
        switch.run("ip", "link", "set", "br0", "up")
        for number in range(count):
            opened.append(host := Host(f"node{number}", f"10.77.0.{number + 1}", within=switch))
            _lay_cable(host, switch, port=f"port{number}")
        names = "".join(f"{host.address} {host.name}\\n" for host in opened)
        for host in opened:
            # Mounts are the host's own: the machine's file stays what it is.
            host.run("mount", "-t", "tmpfs", "tmpfs", "/mnt")
            host.run("sh", "-c", f"printf '127.0.0.1 localhost\\n{names}' > /mnt/hosts")
            host.run("mount", "--bind", "/mnt/hosts", "/etc/hosts")
        yield [*opened[1:], switch]
    except FileNotFoundError as error:
        raise OSError(f"{error.filename} is not installed") from error
    finally:
        for host in reversed(opened):
            host.close()


def _lay_cable(host: Host, switch: Host, *, port: str) -> None:
    # Not in the switch's PID namespace, where the host's first process has another number.
    _run(
        switch.wrap(
            ["ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.first],
            namespaces=["--net"],
        )
    )
    switch.run("ip", "link", "set", port, "master", "br0", "up")
    host.run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
    host.plug_in()


@cache
def find_obstacle() -> str:
    """Why this machine cannot have hosts; empty if it can."""
    try:
        with join_hosts(1):
            return ""
    except OSError as error:
        return f"network namespaces are not permitted here: {error}"
