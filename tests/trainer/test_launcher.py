"""``python -m hf_cwd``, and DDP through torchrun: scripts that know nothing of us, in real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_cwd.__main__ as launcher

HERE = Path(__file__).parent


def launch(*command, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_an_unmodified_script(tmp_path):
    """It parses --optim with HfArgumentParser, trains, resumes, and finds itself as if run directly."""
    script = HERE / "scripts" / "unmodified.py"
    assert "hf_cwd" not in script.read_text()
    command = ["--output_dir", tmp_path / "out", "--optim", "cwd_muon", "--optim_args", "nesterov=false", "--use_cpu"]
    result = launch("-m", "hf_cwd", script, *command, cwd=tmp_path)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["optimizer"] == "CWDMuon"
    assert report["argv"] == [str(script), *map(str, command)]
    assert report["path0"] == str(script.parent)
    assert (report["name"], report["file"]) == ("__main__", str(script))
    assert report["losses"][-1] < report["losses"][0]
    assert report["worker_batches"] > 0
    assert "[hf_cwd] cwd_muon lr=" in result.stderr


def test_a_module(tmp_path, capsys, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "tool.py").write_text("import sys; print(__name__, sys.argv[1:])")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["hf_cwd", "-m", "package.tool", "--flag"])
    launcher.main()
    assert capsys.readouterr().out == "__main__ ['--flag']\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py", "--optim", "cwd_adamw"], "there is no script 'missing.py'"),
        (["-m"], "-m needs the name of a module"),
        ([], "2"),
        (["--help"], "0"),
    ],
)
def test_wrong_use(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hf_cwd", *arguments])
    with pytest.raises(SystemExit) as stopped:
        launcher.main()
    assert message in str(stopped.value.code)


def test_two_ranks_equal_one_process_with_the_same_global_batch(tmp_path):
    """Every rule under DDP on gloo, in fp64 so that the order of a sum cannot flip a sign."""
    script = HERE / "scripts" / "ddp.py"
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    launch(*torchrun, "-m", "hf_cwd", script, tmp_path / "two", cwd=tmp_path)
    launch(script, tmp_path / "one", cwd=tmp_path)
    (one,) = [torch.load(path) for path in tmp_path.glob("one-*")]
    ranks = [torch.load(path) for path in sorted(tmp_path.glob("two-*"))]
    assert one["world_size"] == 1
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    for name, weights in one["weights"].items():
        for key, p in weights.items():
            assert torch.equal(ranks[0]["weights"][name][key], ranks[1]["weights"][name][key]), (name, key)
            # 4 steps of fp64 training; Muon's iteration amplifies rounding by up to 3.4^5.
            torch.testing.assert_close(ranks[0]["weights"][name][key], p, rtol=0, atol=1e-10, msg=f"{name} {key}")
            assert not torch.equal(p, one["start"][key])
