"""Plain ssh: the machines are named, the system's own ssh reaches them, with its keys and its settings.

kolotune is installed on each. Chats, options and a base model's folder are sent as tars, and stand there under the hash
of their content. The job is started apart from the connection, so that it goes on when that ends.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import shlex
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar

from kolotune.foundation.errors import ConfigError, Interrupted, LaunchError
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder
from kolotune.runners import local
from kolotune.runners.container.paths import Paths
from kolotune.runners.container.transfer import bring_out
from kolotune.version import VERSION

from .launcher import LATER, MEETING_PORT, Launched, Order, Plan, Quiet, as_typed, paths_of, require_word
from .node import MODULE, Node
from .output import Listener
from .remote import Execute, Place, Rehearsal, arrived, really, sent_config

_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9_.:-]*")
_NO_CONNECTION = 255  # ssh's own exit code
_TRIES = 20
_AGAIN_SECONDS = 15.0
# Nobody can be asked for a password in the middle of a job, and a dead connection must be noticed.
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=20", "ServerAliveInterval=15", "ServerAliveCountMax=4")


@dataclass(frozen=True)
class _Machine:
    """One of a job's machines, and what it does."""

    host: str
    number: int
    place: Place
    node: Node


@dataclass(frozen=True)
class Ssh:
    """Machines that ssh reaches.

    Attributes:
        hosts: as ssh is given them; the first is where they meet, and makes the results.
        folder: on each, for everything of ours; relative to the home there, until a job has made it whole: what differs
            in it alone counts as equal.
        python: the interpreter on each that has kolotune.
        ssh_config: settings for ssh in place of the user's.
    """

    hosts: tuple[str, ...]
    folder: str = dataclasses.field(default="kolotune-runs", compare=False)
    python: str = "python3"
    ssh_config: str | None = None

    NAME: ClassVar[str] = "ssh"

    def plan(self, order: Order) -> Plan:
        """See `contract.Launcher`."""
        about = json.dumps({"version": VERSION, "root": f"HOME/{self.folder}".replace("HOME//", "/")})
        rehearsal = Rehearsal({"about": about.encode(), "have": b"[false]"})
        written: list[tuple[str, str]] = []
        _, nodes = self._launch(order, Quiet(), "JOB", rehearsal, written)
        there = [f"({node.host}:) {as_typed(argv)}" for node in nodes for argv in node.node.commands(node.number)]
        note = ["(HOME is what the first command answers)"] if not self.folder.startswith("/") else []
        return Plan((*note, *rehearsal.steps, *there), tuple(dict(written).items()))

    def submit(self, order: Order, reporter: Reporter) -> Launched:
        """See `contract.Launcher`."""
        paths, begun = self._launch(order, reporter, secrets.token_hex(8), really, [])
        first = begun[0]
        options = dataclasses.asdict(self) | {"folder": str(first.place.root)}
        return Launched(self.NAME, options, order.name, len(self.hosts), first.node.run, paths.pairs)

    def _launch(
        self, order: Order, reporter: Reporter, job: str, execute: Execute, written: list[tuple[str, str]]
    ) -> tuple[Paths, list[_Machine]]:
        """Sends what the run needs to all machines, then starts it on each.

        Args:
            order: what is launched.
            reporter: is told.
            job: distinguishes this launch from others of the same name.
            execute: what starts programs here.
            written: learns the files that are handed over.

        Returns:
            Which path there stands for which here, and the machines.
        """
        self._check(order)
        paths, ready = Paths(), []
        for number, host in enumerate(self.hosts):
            reporter.doing(f"sending what the run needs to {host}")
            place = arrived(self._place(host, PurePosixPath(self.folder), execute))
            run = place.root / order.name
            config, text = sent_config(order.config, place, run, paths, reporter, in_place=order.in_place)
            written.append((str(config), text))
            paths.add(run, order.config.output_dir)
            ready.append(_Machine(host, number, place, self._node(order, config, run, job)))
        for each in ready:
            start = ["start", f"--state={self._state(each.place.root, order.name)}", *each.node.arguments(each.number)]
            try:
                each.place.told(each.place.module(MODULE, *start))
            except LaunchError:
                for other in ready[: each.number]:
                    self._stop(other.place, order.name, other.number)
                raise
            reporter.success(f"started on {each.host}")
        return paths, ready

    def follow(self, launched: Launched, reporter: Reporter) -> int:
        """See `contract.Launcher`."""
        paths = paths_of(launched)
        first = Listener(reporter, paths)
        others = [Listener(None, paths) for _ in self.hosts[1:]]
        watches = [_Watch(self, launched, number, each) for number, each in enumerate([first, *others])]
        for watch in watches:
            watch.start()
        try:
            while watches[0].is_alive():
                watches[0].join(1.0)
                for number, each in enumerate(others, start=1):
                    # The first would wait for it: for good, unless it was only interrupted, and may come back.
                    if each.code not in (None, 0, Interrupted.exit_code):
                        self.cancel(launched, reporter)
                        said = each.cause or each.last_words() or f"ended with {each.code}"
                        raise LaunchError(f"{self.hosts[number]}: {said}", "The job was stopped on all machines.")
        finally:
            first.close()
        if first.code is None:
            said = watches[0].why or first.last_words() or "it said nothing"
            raise LaunchError(f"{self.hosts[0]}: the job is gone: {said}")
        if others and first.code not in (0, Interrupted.exit_code):
            self.cancel(launched, reporter)  # they would wait for the first, which does not come
        return first.code

    def fetch(self, launched: Launched, folder: RunFolder, reporter: Reporter) -> list[str]:
        """See `contract.Launcher`."""
        place = self._place(self.hosts[0], PurePosixPath(self.folder))
        return bring_out(place, PurePosixPath(launched.run), folder, paths_of(launched))

    def cancel(self, launched: Launched, reporter: Reporter) -> None:
        """See `contract.Launcher`."""
        for number, host in enumerate(self.hosts):
            self._stop(self._place(host, PurePosixPath(self.folder)), launched.job, number)

    def watching(self, launched: Launched, number: int, begin: int) -> list[str]:
        """The command here that gives what machine `number` prints, from byte `begin` on."""
        place = self._place(self.hosts[number], PurePosixPath(self.folder))
        state = self._state(place.root, launched.job)
        return place.reach(place.module(MODULE, "watch", f"--state={state}", f"--number={number}", f"--begin={begin}"))

    def _check(self, order: Order) -> None:
        if not self.hosts:
            raise ConfigError("host: ssh needs machines", "Give each with --host, as --host me@gpu1 --host me@gpu2.")
        for host in self.hosts:
            if not _HOST.fullmatch(host):
                raise ConfigError(f"host: {host!r} is no name or address of a machine", "As gpu1 or me@10.0.0.7.")
        if len(set(self.hosts)) != len(self.hosts):
            raise ConfigError("host: a machine is named twice", "Processes of one machine are given by --nproc.")
        if order.config.nnodes != len(self.hosts):
            raise ConfigError(
                f"nnodes: {order.config.nnodes} machines are wanted, and {len(self.hosts)} are named",
                "Give --host for each; then --nnodes is not needed.",
            )
        require_word("remote-folder", self.folder)
        require_word("python", self.python)

    def _place(self, host: str, root: PurePosixPath, execute: Execute = really) -> Place:
        settings = ["-F", self.ssh_config] if self.ssh_config else []
        options = [word for each in _OPTIONS for word in ("-o", each)]

        def reach(argv: Sequence[str]) -> list[str]:
            # The machine's shell reads the command: quoted, each word stays what it is.
            return ["ssh", *settings, *options, "-T", "--", host, shlex.join(argv)]

        return Place(host, reach, self.python, root, execute)

    def _node(self, order: Order, config: PurePosixPath, run: PurePosixPath, job: str) -> Node:
        meeting = (
            order.config.rdzv
            if order.config.rdzv not in (None, LATER)
            else f"{self.hosts[0].rpartition('@')[2]}:{MEETING_PORT}"
        )
        return Node(
            config=str(config),
            run=str(run),
            machines=len(self.hosts),
            rdzv=meeting if len(self.hosts) > 1 else "",
            job=job,
            token_file=order.token_file or "",
            python=self.python,
            only_train=order.only_train,
        )

    @staticmethod
    def _state(root: PurePosixPath, name: str) -> PurePosixPath:
        return root / ".launched" / name

    def _stop(self, place: Place, name: str, number: int) -> None:
        place.told(place.module(MODULE, "stop", f"--state={self._state(place.root, name)}", f"--number={number}"))


class _Watch(threading.Thread):
    """Listens to one machine; where the connection breaks, again from the byte where it broke.

    Attributes:
        why: the connection was given up.
    """

    def __init__(self, ssh: Ssh, launched: Launched, number: int, listener: Listener) -> None:
        super().__init__(name=f"watch-{number}", daemon=True)
        self._ssh, self._launched, self._number, self._listener = ssh, launched, number, listener
        self.why = ""

    def run(self) -> None:
        begin, tries = 0, 0
        while tries < _TRIES:
            try:
                for piece in local.stream(self._ssh.watching(self._launched, self._number, begin)):
                    begin, tries = begin + len(piece), 0
                    self._listener.feed(piece)
                return
            except (local.ProgramError, OSError) as error:
                self.why = str(error).strip().rpartition("\n")[2]
                if not isinstance(error, local.ProgramError) or error.code != _NO_CONNECTION:
                    return
            tries += 1
            time.sleep(_AGAIN_SECONDS)
