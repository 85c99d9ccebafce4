"""Each mutant is read, and applies to the tree as it is; scripts/dev/mutants tries them, which takes longer."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "dev" / "mutants"
PATCH = """\
What: the mask is that of the opposite sign
Caught by: tests/test_decay.py::test_truth_table
--- a/hf_cwd/decay.py
+++ b/hf_cwd/decay.py
@@ -1,3 +1,3 @@
 a line that stands nowhere
-MASKS = ("le", "lt")
+MASKS = ("ge", "gt")
"""


def mutants(*arguments):
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_all_apply():
    status, out, err = mutants("--check")
    assert (status, err) == (0, ""), out + err
    number = len(list((ROOT / "tests" / "mutants").glob("*.patch")))
    assert out == f"{number} of {number} mutants apply\n"
    assert number >= 60


def test_one_that_does_not_apply_is_named(tmp_path):
    (tmp_path / "stale.patch").write_text(PATCH)
    status, out, _ = mutants("--check", tmp_path / "stale.patch")
    assert status == 1
    assert out.startswith("stale: DOES NOT APPLY: error: patch failed: hf_cwd/decay.py")
    (tmp_path / "stale.patch").write_text(PATCH.replace("test_decay.py", "test_nothing.py"))
    assert "there is no tests/test_nothing.py" in mutants("--check", tmp_path / "stale.patch")[1]


def test_a_header_that_lacks_something_is_refused(tmp_path):
    (tmp_path / "wrong.patch").write_text(PATCH.replace("Caught by", "Seen by"))
    status, _, err = mutants("--check", tmp_path / "wrong.patch")
    assert (status, err.strip().endswith("wrong.patch has no line 'Caught by'")) == (2, True)
    status, _, err = mutants("nothing_of_the_kind")
    assert (status, "there is no mutant 'nothing_of_the_kind'" in err) == (2, True)
