"""Which process of a group failed first: all are told, and none is left waiting.

Collectives alone do not tell. With gloo a death breaks the collectives of the others, with a
network address for a reason; with nccl they wait until a watchdog aborts them; one that throws in
between two collectives, or sleeps, looks like one that died. So beside the collectives each
process has one TCP connection to rank 0, whose `_Hub` hears of a death by the connection's end,
at once and whoever closed it: the operating system does, also after SIGKILL, and its keep-alive
probes notice a machine that is gone. The hub decides who was first and tells all. Then each
process leaves, by `os._exit`: a group in which others wait cannot be taken apart in order. (Ours.)

Nothing here needs torch, and nothing of it takes part in a step.
"""

import atexit
import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

# Seconds.
_CONNECT = 60.0  # for a process to reach rank 0 at the start
_DEATH_COMES = 1.0  # after a broken collective, until its reason is looked for elsewhere
_ROLL_CALL = 4.0  # for all to say where they are
_ALL_LEAVE = 5.0  # for all to leave for the same reason as the first of them
_ANSWER = 3.0  # for the hub's answer
_GRACE = 10.0  # for the main thread to come out by itself, perhaps with a checkpoint to write
_DRAIN = 2.0  # for rank 0, which is last to leave, so that the others hear its reason
_LONGEST = 2000  # characters of a sentence
_DONE = "done"
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


@dataclass(frozen=True)
class _Member:
    """One process of the group."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


def _send(connection: socket.socket, **message: object) -> None:
    """One line of JSON; lost without a word where nobody listens any more."""
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return


class _Lines:
    """The messages that come over one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._rest = connection, b""

    def receive(self) -> list[dict] | None:
        """Those that are there, of which there may be none; None at the connection's end."""
        try:
            data = self._connection.recv(65536)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        # Whoever sends anything else is none of ours.
        is_ours = len(self._rest) < 10 * _LONGEST and all(isinstance(m, dict) for m in messages)
        return messages if data and is_ours else None


def _keep_alive(connection: socket.socket) -> None:
    """Have a peer noticed whose machine is gone without a farewell: after about 90 s."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@dataclass
class _Seen:
    """What the hub knows of one process."""

    connection: socket.socket | None = None
    gone: str = ""  # the reason with which it leaves in order
    ended: bool = False  # its connection did
    broken: str = ""  # how its collective broke
    place: str = ""  # where its main thread is, by the roll call
    in_collective: bool = False  # and whether that is a collective

    @property
    def waited(self) -> bool:
        """Whether it came to where all were to meet."""
        return bool(self.broken) or self.in_collective


class _Hub(threading.Thread):
    """In rank 0's process: hears all processes, rank 0 too, and tells them who failed first."""

    def __init__(self, listener: socket.socket, token: str, members: list[_Member]) -> None:
        super().__init__(daemon=True, name="failure hub")
        self.sockets = [listener]
        self.all_ended = threading.Event()
        self._listener, self._token, self._members = listener, token, members
        self._seen = [_Seen() for _ in members]
        self._verdict: dict[str, object] = {}
        # Moments, by the clock of the first of each kind.
        self._gone_at = self._broken_at = self._asked_at = 0.0
        self._first_gone = 0

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self.all_ended.is_set():
                is_deciding = not self._verdict and (self._gone_at or self._broken_at)
                for key, _ in selector.select(0.1 if is_deciding else None):
                    if key.data is None:
                        connection, _ = self._listener.accept()
                        _keep_alive(connection)
                        connection.settimeout(_DRAIN)
                        self.sockets.append(connection)
                        caller = _Caller(connection)
                        selector.register(connection, selectors.EVENT_READ, caller)
                    elif not self._hear_all(key.data):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
                        self._ended(key.data.rank)
                if is_deciding:
                    self._decide(time.monotonic())

    def _hear_all(self, caller: "_Caller") -> bool:
        """Take in what came over a connection; False at its end."""
        messages = caller.lines.receive()
        for message in messages or ():
            if caller.rank is not None:
                self._hear(caller.rank, message)
            elif message.get("token") == self._token:
                caller.rank = message["rank"]
                self._seen[caller.rank].connection = caller.connection
                _send(caller.connection, welcome=True, **self._verdict)
            else:
                return False
        return messages is not None

    def _hear(self, rank: int, message: dict) -> None:
        seen, now = self._seen[rank], time.monotonic()
        if "failed" in message:
            self._judge(f"{self._members[rank]} failed first: {message['failed']}", [rank])
        elif "gone" in message:
            seen.gone = message["gone"]
            if not self._gone_at:
                self._first_gone, self._gone_at = rank, now
            # Work is done by all together, so nobody need wait to hear the same of the others.
            if seen.gone == _DONE or all(other.gone for other in self._seen):
                self._tell(all_gone=True)
        elif "broken" in message:
            seen.broken = message["broken"]
            self._broken_at = self._broken_at or now
        elif "place" in message:
            seen.place, seen.in_collective = message["place"], message["in_collective"]

    def _ended(self, rank: int | None) -> None:
        if rank is None:
            return
        self._seen[rank].ended = True
        if not self._seen[rank].gone:
            self._judge(_death(self._members[rank]), [rank])
        if all(seen.ended for seen in self._seen):
            self.all_ended.set()

    def _decide(self, now: float) -> None:
        """Where somebody waits for a reason, or not all leave: find it."""
        if self._verdict:
            return
        if self._broken_at and not self._asked_at and now - self._broken_at > _DEATH_COMES:
            self._asked_at = now
            self._tell(where=True)
        if self._asked_at:
            answered = all(seen.place or seen.broken or seen.gone for seen in self._seen)
            if answered or now - self._asked_at > _ROLL_CALL:
                self._judge(*self._missing())
        elif self._gone_at and now - self._gone_at > _ALL_LEAVE:
            first, reason = self._members[self._first_gone], self._seen[self._first_gone].gone
            if reason != _DONE and not all(seen.gone for seen in self._seen):
                self._judge(f"{first} left first, without the others: {reason}", [first.rank])

    def _missing(self) -> tuple[str, list[int]]:
        """After a roll call: the sentence on the ranks that did not come to a collective."""
        texts = []
        missing = [m for m in self._members if not self._seen[m.rank].waited]
        for member in missing:
            seen = self._seen[member.rank]
            if seen.gone:
                texts.append(f"{member} had left: {seen.gone}")
            elif seen.place:
                texts.append(f"{member} did not come to where the others waited: it is in ")
                texts[-1] += seen.place
            else:
                texts.append(f"{member} gives no sign of life")
        if not missing:
            broken = next(seen.broken for seen in self._seen if seen.broken)
            texts = [f"no process died and all came, it is their exchange that failed: {broken}"]
        return "; ".join(texts), [member.rank for member in missing]

    def _judge(self, sentence: str, first: list[int]) -> None:
        if not self._verdict:
            silent = [rank for rank, seen in enumerate(self._seen) if seen.ended]
            self._verdict = {"verdict": sentence, "first": first, "silent": silent}
            self._tell(**self._verdict)

    def _tell(self, **message: object) -> None:
        for seen in self._seen:
            if seen.connection is not None and not seen.ended:
                _send(seen.connection, **message)


class _Caller:
    """A connection to the hub; rank: whose it is, once it has said so."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.lines = connection, _Lines(connection)
        self.rank: int | None = None


def _death(member: _Member) -> str:
    return (
        f"{member} died first, without a word: it was killed (by a person, the scheduler, or for "
        f"want of memory) or crashed"
    )


class _Line(threading.Thread):
    """This process's connection to the hub, and its way out where the main thread has none."""

    def __init__(self, connection: socket.socket, members: list[_Member], rank: int) -> None:
        super().__init__(daemon=True, name="failure line")
        self.connection, self._lines = connection, _Lines(connection)
        self._members, self._rank = members, rank
        self.verdict, self._first, self._silent = "", [], []
        self._told, self._main_leaves = threading.Event(), threading.Event()
        self._one_leaves = threading.Lock()  # held while deciding which thread ends the process
        self._over = False

    def greet(self, token: str) -> bool:
        """Say who this is; False where it is not the hub that answers."""
        _send(self.connection, token=token, rank=self._rank)
        messages = self._lines.receive()
        self.connection.settimeout(None)
        self._take_in(messages or [])
        return bool(messages)

    def run(self) -> None:
        while (messages := self._lines.receive()) is not None:
            self._take_in(messages)
        # The hub ends no connection of its own accord: rank 0 is gone.
        self._learn(_death(self._members[0]), [0], [0])
        self._told.set()

    def _take_in(self, messages: list[dict]) -> None:
        for message in messages:
            if "verdict" in message:
                self._learn(message["verdict"], message["first"], message["silent"])
            elif "where" in message:
                _send(self.connection, **_whereabouts())
            elif "all_gone" in message and not self.verdict:
                self._over = True
                self._told.set()

    def _learn(self, verdict: str, first: list[int], silent: list[int]) -> None:
        if not self.verdict and not self._over:
            self.verdict, self._first, self._silent = verdict, first, silent
            self._told.set()
            threading.Thread(target=self._end_soon, daemon=True).start()

    def _end_soon(self) -> None:
        """End the process where its main thread does not come out of what it waits for."""
        self._main_leaves.wait(_GRACE)
        with self._one_leaves:
            if not self._main_leaves.is_set() and not self._over:
                if self.speaks():
                    print(f"error: {self.verdict}", file=sys.stderr, flush=True)
                os._exit(1)

    def leave(self, seconds: float, **reason: str) -> str:
        """Tell the hub why this process leaves; the verdict, unless it names this process.

        Whatever comes now, the main thread ends the process.
        """
        with self._one_leaves:
            self._main_leaves.set()
        _send(self.connection, **{name: text[:_LONGEST] for name, text in reason.items()})
        self._told.wait(seconds)
        return "" if self._rank in self._first else self.verdict

    def speaks(self) -> bool:
        """Whether it is this process that tells the verdict on its machine: its lowest alive."""
        host, unable = self._members[self._rank].host, {*self._first, *self._silent}
        able = (m.rank for m in self._members if m.host == host and m.rank not in unable)
        return next(able, None) == self._rank

    def close(self) -> None:
        """End the connection in order, without waiting."""
        with self._one_leaves:
            self._over = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _whereabouts() -> dict[str, object]:
    """Where the main thread is: its innermost line that is no library's, and what called there."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    in_collective = False
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        in_collective |= f"torch{os.sep}distributed" in frame.f_code.co_filename
        frame = frame.f_back
    if frame is None:
        return {"place": "a library", "in_collective": in_collective}
    name = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
    return {"place": f"{name}, {frame.f_code.co_name}()", "in_collective": in_collective}


_line: _Line | None = None
_hub: _Hub | None = None


def watch(rank: int, exchange: Callable[[object], list]) -> None:
    """Begin; all processes of the group together, once it stands, each from its main thread.

    exchange: a collective that gives each process's value (plain data), by rank, to all. Where
    rank 0 cannot be reached, that is a line on stderr, and collectives alone will tell.
    """
    global _line, _hub
    listener, token = None, ""
    if rank == 0:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=1024)
        token = secrets.token_hex(16)
    host, port = socket.gethostname(), listener.getsockname()[1] if listener else 0
    everyone = exchange((host, os.getpid(), port, token))
    members = [_Member(rank, host, pid) for rank, (host, pid, _, _) in enumerate(everyone)]
    _, _, port, token = everyone[0]
    if listener:
        _hub = _Hub(listener, token, members)
        _hub.start()
    address = os.environ.get("MASTER_ADDR", "localhost") if rank else "127.0.0.1"
    try:
        line = _Line(socket.create_connection((address, port), _CONNECT), members, rank)
        if not line.greet(token):
            raise OSError("no answer")
    except OSError as error:
        print(
            f"warning: {members[rank]} cannot reach rank 0 at {address}, port {port} ({error}): "
            f"if a process fails, the others may learn of it late",
            file=sys.stderr,
            flush=True,
        )
        return
    _keep_alive(line.connection)
    _line = line
    _line.start()
    os.register_at_fork(after_in_child=_forget)
    atexit.register(end)


def _forget() -> None:
    """In a forked process: let go of what would keep the parent's connections open."""
    global _line, _hub
    for held in ([_line.connection] if _line else []) + (_hub.sockets if _hub else []):
        held.close()
    _line = _hub = None


def is_watched() -> bool:
    """Whether this process is in a group whose processes hear of each other's end."""
    return _line is not None


def failed(sentence: str) -> str:
    """This process failed by itself: tell the others. The verdict, if another failed before."""
    return _line.leave(_ANSWER, failed=sentence) if _line else ""


def broken(sentence: str) -> str:
    """A collective broke: the verdict on who failed; empty where that cannot be known."""
    return _line.leave(_DEATH_COMES + _ROLL_CALL + _ANSWER, broken=sentence) if _line else ""


def gone(sentence: str) -> str:
    """This process leaves, as all are to for the same reason: the verdict, if another failed."""
    return _line.leave(_ALL_LEAVE + _ANSWER, gone=sentence) if _line else ""


def speaks() -> bool:
    """Whether this process is the one to tell the verdict on its machine."""
    return _line is not None and _line.speaks()


def end() -> None:
    """The work is done, by all processes: no more is heard or told."""
    global _line
    if _line is None:
        return
    line, _line = _line, None
    _send(line.connection, gone=_DONE)
    line.close()


def drain() -> None:
    """Before rank 0 ends, which takes the hub along: until the others have left, or some time."""
    if _hub is not None and _line is not None:
        _line.close()
        _hub.all_ended.wait(_DRAIN)
