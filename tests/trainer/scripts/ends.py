"""Ends in the way that its argument names."""

import atexit
import os
import signal
import sys
import traceback


def shows_frames(kind, value, frames):
    for shown in (frames, value.__traceback__, sys.last_traceback):
        print(kind.__name__, value, "".join(traceback.format_tb(shown)))


def fail():
    try:
        int("three")
    except ValueError as error:
        raise RuntimeError("in a function") from error


class Noisy:
    def __del__(self):
        print("deleted")


def stop():
    noisy = Noisy()
    atexit.register(print, "at exit")
    sys.exit(type(noisy) is Noisy and 3)


match sys.argv[1]:
    case "error":
        fail()
    case "hook":
        sys.excepthook = shows_frames
        fail()
    case "hook exits":
        sys.excepthook = lambda *_: sys.exit(7)
        fail()
    case "message":
        sys.exit("a message")
    case "status":
        stop()
    case "interrupt":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
