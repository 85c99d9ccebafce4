"""Python processes that begin with torch and transformers imported, forked off a server that has imported them once.

Importing them takes some seconds of processor time, which hundreds of short processes would spend. A process that is
forked here differs from ``python ...`` in nothing else that a script can see but what is imported, and that threads
must not have been started before: so a test of how programs are started uses :func:`tests.support.launching.start`.

    python tests/support/forking.py SOCKET OWNER MODULE...    the server, which ends with process OWNER
"""

import atexit
import contextlib
import fcntl
import gc
import hashlib
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SESSION = "HF_CWD_TESTS"  # environment variable: directory of the session's servers, and the process that they end with
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
TRANSFORMERS = (
    *("torch.distributed.tensor", "torch.distributed.fsdp", "transformers.trainer", "accelerate", "datasets"),
    *("evaluate", "transformers.hf_argparser", "transformers.models.llama.modeling_llama"),
)
DEEPSPEED = (*TRANSFORMERS, "deepspeed")


class Forked:
    """A forked process, with what the tests use of subprocess.Popen."""

    def __init__(self, args: list[str], request: dict, modules: tuple[str, ...]) -> None:
        self.args = args
        self.returncode: int | None = None
        self._files = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]  # noqa: SIM115  it is read later
        self._connection = _connected(modules)
        descriptors = [file.fileno() for file in self._files]
        socket.send_fds(self._connection, [json.dumps(request).encode() + b"\n"], descriptors)
        self.pid = self._answer(None)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._answer(timeout)
        return self.returncode

    def _answer(self, timeout: float | None) -> int:
        """The server's next number, of four bytes."""
        ready, _, _ = select.select([self._connection], [], [], timeout)
        if not ready:
            raise subprocess.TimeoutExpired(self.args, timeout)
        answer = self._connection.recv(4, socket.MSG_WAITALL)
        if len(answer) < 4:
            raise RuntimeError(f"the server that forks {self.args} has ended")
        return int.from_bytes(answer, signed=True)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        for file in self._files:
            file.seek(0)
        return tuple(file.read() for file in self._files)

    def kill(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def fork(*command, cwd, modules: tuple[str, ...] = TRANSFORMERS, **environment) -> Forked:
    """Starts ``python command...``, where the command is ``-m MODULE ARGUMENT...`` or ``SCRIPT ARGUMENT...``.

    Args:
        modules: are imported already.
        environment: variables, beside this process's.
    """
    command = [str(part) for part in command]
    return Forked(
        command, {"command": command, "cwd": str(cwd), "environment": os.environ | ENVIRONMENT | environment}, modules
    )


def fork_ranks(world: int, *command, cwd, **options) -> list[Forked]:
    """Starts the processes that ``torchrun --nproc_per_node WORLD command...`` would."""
    network = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    network |= {"LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0"}
    return [
        fork(*command, cwd=cwd, RANK=str(rank), LOCAL_RANK=str(rank), **network, **options) for rank in range(world)
    ]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def begin_session() -> None:
    """Makes the directory of the servers; they end with this process, and with all that they have started."""
    if SESSION not in os.environ:
        folder = tempfile.mkdtemp(prefix="hf_cwd_tests_")
        os.environ[SESSION] = f"{folder}:{os.getpid()}"


def end_session() -> float:
    """Ends the servers, and tells the processor seconds that they and what they forked have taken.

    A session of pytest that a test started uses the servers of this one, and leaves them running.
    """
    folder, owner = os.environ[SESSION].split(":")
    seconds = 0.0
    if int(owner) != os.getpid():
        return seconds
    for file in Path(folder).glob("*.pid"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path("/proc", file.read_text(), "stat").read_text().rpartition(")")[2].split()
            seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
            os.kill(int(file.read_text()), signal.SIGTERM)
    shutil.rmtree(folder, ignore_errors=True)
    return seconds


def _connected(modules: tuple[str, ...]) -> socket.socket:
    """A connection to the server that has these modules, which is started if it is not there."""
    folder, owner = os.environ[SESSION].split(":")
    path = Path(folder, hashlib.sha256(" ".join(modules).encode()).hexdigest()[:16])
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            command = [sys.executable, __file__, str(path), owner, *modules]
            # datasets and evaluate read HF_HOME when they are imported: what is forked has its caches in there.
            environment = os.environ | ENVIRONMENT | {"DS_ACCELERATOR": "cpu", "HF_HOME": f"{path}.home"}
            with open(f"{path}.log", "w") as log:  # it must not keep the pipe by which a worker of pytest-xdist ends
                options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "process_group": 0}
                server = subprocess.Popen(command, cwd=folder, env=environment, **options)
            Path(f"{path}.pid").write_text(str(server.pid))
            while not path.exists():
                time.sleep(0.05)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def serve(path: str, owner: int, modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # see tests/support/garbage.py
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}.new")
    listening.listen(64)
    listening.setblocking(False)
    os.rename(f"{path}.new", path)
    awake, wake = socket.socketpair()
    for end in (awake, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # and the processes that run are killed on the way
    try:
        _serve(listening, awake, wake, running, owner)
    finally:
        for pid in running:
            _kill(pid)


def _serve(
    listening: socket.socket,
    awake: socket.socket,
    wake: socket.socket,
    running: dict[int, socket.socket],
    owner: int,
) -> None:
    while Path(f"/proc/{owner}").exists():
        ready, _, _ = select.select([listening, awake, *running.values()], [], [], 1)
        if listening in ready:
            connection, _ = listening.accept()
            running[_fork(connection, [listening, awake, wake, *running.values()])] = connection
        if awake in ready:
            awake.recv(4096)
        _answer_ended(running)
        for pid, connection in list(running.items()):
            if connection in ready and not connection.recv(1):  # who asked for it has ended
                _kill(pid)


def _answer_ended(running: dict[int, socket.socket]) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with running.pop(pid) as connection:
                _say(connection, os.waitstatus_to_exitcode(status))


def _say(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(number.to_bytes(4, signed=True))


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _fork(connection: socket.socket, others: list[socket.socket]) -> int:
    """Starts what was asked for."""
    connection.setblocking(True)
    text, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for end in (connection, *others):
            end.close()
        for number, descriptor in enumerate(descriptors, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        _become(**json.loads(text))
    for descriptor in descriptors:
        os.close(descriptor)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)
    _say(connection, pid)
    return pid


def _become(command: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Runs the command as ``python command...`` does, and ends."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    warnings._processoptions([option for option in environment.get("PYTHONWARNINGS", "").split(",") if option])
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    status = 0
    try:
        if command[0] == "-m":
            sys.path[:0] = [cwd, *added]
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[:0] = [os.path.dirname(os.path.abspath(command[0])), *added]
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.path.pop(0)  # this directory
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
