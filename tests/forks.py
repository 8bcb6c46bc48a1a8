"""Programs in processes of their own, which needn't import the libraries: that takes longer than what most of them do.

One process imports the libraries, and nothing of this repository, once for all tests; every program begins as its fork.
What is said of launchers and of starts from a shell needs subprocess all the same.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["accelerate", "datasets", "peft", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "pydantic"]
)


def fork(program, arguments, output, cwd=ROOT, errors=None, **environment):
    """Start a program, a Python file or code; returns its multiprocessing.Process.

    What it says is added to the files `output` and `errors`, which may be the same one.
    """
    given = str(program), list(map(str, arguments)), str(cwd), os.environ | environment
    process = _SERVER.Process(target=_become, args=(*given, str(output), str(errors or output)))
    process.start()
    return process


def _become(program, arguments, cwd, environment, output, errors):
    """Go on as the program, as Python does from a shell."""
    for path, descriptor in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    is_file = program.endswith(".py")
    folders = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [str(Path(program).resolve().parent), *folders] if is_file else folders
    sys.argv = [program if is_file else "-c", *arguments]
    if is_file:
        runpy.run_path(program, run_name="__main__")
    else:
        exec(program, {"__name__": "__main__"})


def ranks(count):
    """The environments of processes that train together, as srun gives them: nobody watches over them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | common for rank in range(count)]


def exit_codes(processes, seconds):
    """Their exit codes when all have ended; after so many seconds, which only a broken program needs, None of the rest.

    None of them is left behind.
    """
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def launch(program, arguments, processes=1, cwd=ROOT, **environment):
    """Run a program, in as many processes, until it ends. Returns what subprocess.run does, of all of them together."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "output"), Path(folder, "errors")
        each = ranks(processes) if processes > 1 else [{}]
        begun = [fork(program, arguments, said[0], cwd, said[1], **environment, **rank) for rank in each]
        codes = exit_codes(begun, 300)
        output, errors = (path.read_text() if path.exists() else "" for path in said)
    assert None not in codes, f"it did not end:\n{errors[-3000:]}"
    return subprocess.CompletedProcess(program, next(filter(None, codes), 0), output, errors)
