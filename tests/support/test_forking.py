"""The servers that tests fork processes off."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.forking import ROOT, SESSION, fork


def test_a_session_that_a_test_starts_leaves_the_servers_of_this_one():
    code = "from tests.support import forking; forking.begin_session(); print(forking.end_session())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "0.0\n"
    assert Path(os.environ[SESSION].split(":")[0]).is_dir()


def test_a_forked_process_is_like_one_that_was_started(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print(sys.argv, sys.path[0], os.getcwd(), os.environ['OWN'], __name__)\n"
        "print('wrong', file=sys.stderr)\n"
        "sys.exit(3)\n"
    )
    forked = fork(script, "--flag", cwd=tmp_path, OWN="value")
    printed = f"['{script}', '--flag'] {tmp_path} {tmp_path} value __main__\n"
    assert forked.communicate(timeout=120) == (printed, "wrong\n")
    assert forked.returncode == 3


def test_collections_of_garbage_pass_over_what_was_imported(tmp_path):
    """They would take longer than the steps of tiny models, see garbage.py."""
    script = tmp_path / "script.py"
    script.write_text("import gc; print(10 * len(gc.get_objects()) < gc.get_freeze_count())")
    assert fork(script, cwd=tmp_path).communicate(timeout=120)[0] == "True\n"
