"""Writes what a script can see of how it was started to $REPORT; with "processes" as an argument it starts some."""

import atexit
import json
import multiprocessing
import os
import pickle
import sys

import at_start  # kept the __main__ module of before the script
import beside  # noqa: F401  is found in the script's directory

import __main__

report = {"globals": sorted(globals()), "torch": "torch" in sys.modules, "warnings": len(sys.warnoptions)}
OFFSET = 100


class Defined:
    """Pickled by name: whoever loads it finds it in __main__."""


def length(row):
    return {"length": len(row["text"]) + OFFSET}


def child(connection):
    connection.send([__name__, OFFSET, Defined.__module__, sys.argv])


def start_processes():
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    report["map"] = list(Dataset.from_dict({"text": ["a", "bb", "ccc"]}).map(length, num_proc=2)["length"])
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    report["spawned"] = ours.recv()
    process.join()


def write():
    report["at exit"] = [OFFSET, __name__, sys.argv]
    with open(os.environ["REPORT"], "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    atexit.register(write)
    report |= {"argv": sys.argv, "path": sys.path, "flags": sys.flags, "cwd": os.getcwd()}
    report |= {"file": __file__, "code": write.__code__.co_filename, "cached": __cached__, "doc": __doc__}
    report |= {"package": __package__, "loader": type(__loader__).__name__, "annotations": __annotations__}
    report["spec"] = __spec__ and [__spec__.name, __spec__.origin, __spec__.parent, type(__spec__.loader).__name__]
    report["main"] = [__main__ is sys.modules["__main__"] is at_start.MAIN, vars(__main__) is globals()]
    report["builtins"] = type(__builtins__).__name__
    report["pickle"] = type(pickle.loads(pickle.dumps(Defined()))) is Defined
    report["hook"] = sys.excepthook is sys.__excepthook__
    if "processes" in sys.argv:
        start_processes()
