"""Imports its first argument, then each of the others in a thread of its own, and prints the optimizer names."""

import faulthandler
import importlib
import sys
import threading
import time

faulthandler.dump_traceback_later(600, exit=True)
first, *others = sys.argv[1:]
importlib.import_module(first)
failures = []


def load(name):
    try:
        importlib.import_module(name)
    except BaseException as error:
        failures.append(f"{name}: {error!r}")


threads = [threading.Thread(target=load, args=(name,)) for name in others]
for thread in threads:
    thread.start()
    time.sleep(0.05)
for thread in threads:
    thread.join()
assert not failures, failures

from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS  # noqa: E402

print([name.value for name in _OPTIMIZER_HANDLERS])
