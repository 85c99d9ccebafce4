"""``python -m hf_cwd`` and every launcher: scripts that know nothing of us, in real processes."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import hf_cwd
from hf_cwd import launcher
from tests.support.forking import fork, fork_ranks, free_port
from tests.support.launching import ROOT, Environment, finish, finish_all, flags, launch, start, write_material

SCRIPTS = Path(__file__).parent / "scripts"
LAUNCHED = ("-m", "hf_cwd")
COMMANDS = Path(sysconfig.get_path("scripts"))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    write_material(folder)
    return folder


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    """scripts/probe.py, link.py to it, a package, a directory and a zip file with it; a place to stand in."""
    folder = tmp_path_factory.mktemp("probes")
    for name, target in {"scripts": "probe.py", "work/package": "probe.py", "directory": "__main__.py"}.items():
        (folder / name).mkdir(parents=True)
        shutil.copy(SCRIPTS / "probe.py", folder / name / target)
        (folder / name / "beside.py").touch()
    (folder / "work/package/__init__.py").write_text("import sys; ARGV = list(sys.argv)")
    (folder / "work/beside.py").touch()
    (folder / "work/link.py").symlink_to("../scripts/probe.py")
    with zipfile.ZipFile(folder / "work/archive.zip", "w") as archive:
        archive.write(SCRIPTS / "probe.py", "__main__.py")
        archive.writestr("beside.py", "")
    # Python imports sitecustomize before it runs anything, as an environment's tools may import dill.
    (folder / "home").mkdir()
    (folder / "home/sitecustomize.py").write_text("import at_start")
    (folder / "home/at_start.py").write_text("import __main__; MAIN = __main__")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["../scripts/probe.py", "processes", "--flag=1"],
        ["./link.py"],
        ["-m", "package.probe", "processes", "-m", "x"],
        ["../directory/", "--flag"],
        ["archive.zip"],
    ],
    ids=lambda command: Path(command[0]).name,
)
def test_a_script_sees_what_it_sees_when_run_directly(probes, tmp_path, command):
    ways = {"direct": (), "launched": LAUNCHED}
    if "processes" in command:
        ways["command"] = ("-c", "from hf_cwd.cli import main; main()", "run")
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(probes / "home"), os.environ.get("PYTHONPATH")]))}
    started = {
        way: start(*prefix, *command, cwd=probes / "work", REPORT=str(tmp_path / way), **environment)
        for way, prefix in ways.items()
    }
    for process in started.values():
        result = finish(process)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    direct, *others = (json.loads((tmp_path / way).read_text()) for way in ways)
    assert direct["main"] == [True, True]
    assert direct["argv"][1:] == command[2 if command[0] == "-m" else 1 :]
    assert ("map" in direct) == ("spawned" in direct) == ("processes" in command)
    for other in others:
        assert other == direct


def test_errors_and_endings_are_those_of_a_direct_run(tmp_path):
    """Same output, same tracebacks, same exit status, for a script and for a module."""
    (tmp_path / "broken.py").write_text("x = 1\nif x\n")
    shutil.copy(SCRIPTS / "ends.py", tmp_path)
    endings = ("error", "hook", "hook exits", "message", "status", "interrupt")
    commands = [["ends.py", ending] for ending in endings]
    commands += [["broken.py"], ["-m", "ends", "error"], ["-m", "nowhere"]]
    statuses = {"message": 1, "status": 3, "hook exits": 7, "interrupt": -2}
    pairs = [[start(*way, *command, cwd=tmp_path) for way in ((), LAUNCHED)] for command in commands]
    for command, pair in zip(commands, pairs, strict=True):
        direct, launched = map(finish, pair)
        assert direct.returncode == launched.returncode == statuses.get(command[-1], 1), command
        if command[0] == "-m":  # the interpreter shows its own way to the module, and we do not
            lines = [line for line in direct.stderr.splitlines(True) if "<frozen runpy>" not in line]
            direct.stderr = "".join(lines)
        assert (launched.stdout, launched.stderr) == (direct.stdout, direct.stderr)
        assert direct.stdout + direct.stderr or command[-1] == "hook exits"


def test_a_flag_before_the_script_becomes_its_first_argument(tmp_path):
    """DeepSpeed's launcher puts --local_rank there."""
    (tmp_path / "tool.py").write_text("import sys; print(sys.argv, sys.path[0])")
    script = launch(*LAUNCHED, "--local_rank=0", "--x=", "tool.py", "--y", cwd=tmp_path, PYTHONSAFEPATH="")
    assert script.stdout == f"{['tool.py', '--local_rank=0', '--x=', '--y']} {tmp_path}\n"
    (tmp_path / "elsewhere").mkdir()
    command = ("-P", *LAUNCHED, "--local_rank=0", "-m", "tool", "--y")  # -P: nothing goes before PYTHONPATH
    module = launch(*command, cwd=tmp_path / "elsewhere", PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]))
    assert module.stdout == f"{[str(tmp_path / 'tool.py'), '--local_rank=0', '--y']} {ROOT}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["missing.py", "--optim", "cwd_adamw"],
            "there is no script 'missing.py' in {cwd}, and no such command",
        ),
        (["-m"], "-m needs the name of a module"),
        (["-c"], "-c needs the code"),
        (["-V", "script.py"], "'-V' before the script"),
        ([], "no script given"),
        (["--x=1"], "no script given"),
        (["--local_rank", "0", "script.py"], "'--local_rank' before the script: write --name=value"),
        (["-x=1", "script.py"], "'-x=1' before the script"),
    ],
)
def test_wrong_use(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONPATH", "HF_CWD_PYTHON"):  # which the launcher sets, and monkeypatch sets back
        monkeypatch.setenv(name, "")
    with pytest.raises(SystemExit) as stopped:
        launcher.main(arguments)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("usage: python -m hf_cwd")
    assert f"python -m hf_cwd: error: {message.format(cwd=tmp_path)}" in errors


def test_help_and_version(capsys):
    launcher.main(["--help"], program="hf-cwd run")
    assert capsys.readouterr().out.startswith("usage: hf-cwd run [--name=value ...] SCRIPT.py")
    launcher.main(["--version"])
    assert capsys.readouterr().out == f"hf_cwd {hf_cwd.__version__}\n"


def reports(folder):
    """What each rank of `unmodified.py` wrote; all of them must have trained with our optimizer."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("report-*.json"))]
    for report in found:
        assert (report["optimizer"], report["name"]) == ("CWDMuon", "__main__")
        assert report["losses"][-1] < report["losses"][0]
    return found


def test_one_process(material, tmp_path):
    """Scripts that parse --optim with HfArgumentParser, map their data in processes, evaluate, start workers."""
    script = SCRIPTS / "unmodified.py"
    assert "hf_cwd" not in script.read_text()
    (tmp_path / "package").mkdir()
    shutil.copy(script, tmp_path / "package/module.py")
    (tmp_path / "importing.py").write_text(f"import hf_cwd\n{script.read_text()}")
    workers = ["--dataloader_num_workers", "1", "--eval_strategy", "no"]  # each worker imports transformers anew
    ways = {
        "script": [*LAUNCHED, script, *flags(material, output_dir="script"), *workers],
        "module": [*LAUNCHED, "-m", "package.module", *flags(material, output_dir="module")],
        "import": ["importing.py", *flags(material, output_dir="import")],
    }
    home = str(tmp_path / "home")
    # A module, and a script that imports hf_cwd, meet transformers when it is imported already.
    started = {
        way: (start if way == "script" else fork)(*command, cwd=tmp_path, HF_HOME=home) for way, command in ways.items()
    }
    losses = {}
    for way, process in started.items():
        result = finish(process)
        assert result.returncode == 0, result.stderr
        assert "[hf_cwd] cwd_muon lr=" in result.stderr
        assert "nesterov=False" in result.stderr
        (report,) = reports(tmp_path / way)
        assert report["world_size"] == 1
        assert bool(report["worker_batches"]) == (way == "script")
        assert len(report["accuracies"]) == (way != "script")
        losses[way] = report["losses"]
    assert losses["script"] == losses["module"] == losses["import"]


def test_a_command_that_nobody_here_wrote(material, tmp_path):
    """TRL's own, which parses --optim, then has `accelerate launch` run its script in other processes."""
    options = ["--model_name_or_path", material / "model", "--dataset_name", material / "data", "--use_cpu"]
    options += ["--bf16", "false", "--max_steps", 2, "--weight_decay", 0.1, "--max_length", 32, "--report_to", "none"]
    path = os.pathsep.join([str(COMMANDS), os.environ["PATH"]])
    command = ("trl", "sft", "--optim", "cwd_lion", "--output_dir", "sft", *options)
    result = launch(*LAUNCHED, *command, cwd=tmp_path, PATH=path, HF_HOME=str(tmp_path / "home"))
    assert "[hf_cwd] cwd_lion lr=" in result.stderr
    saved = torch.load(tmp_path / "sft/checkpoint-2/optimizer.pt", weights_only=True)
    assert {group["algorithm"] for group in saved["param_groups"]} == {"lion"}


CHILD = """
import json, os, sys
print(json.dumps({
    "path": sys.path, "argv": sys.argv, "existing": getattr(sys, "existing", None),
    "knows": any(type(finder).__name__ == "CWDFinder" for finder in sys.meta_path),
    "loaded": sorted({"torch", "transformers"} & set(sys.modules)),
    "handed down": os.environ.get("PYTHONPATH", "").count("inherited"),
    "sitecustomize": getattr(sys.modules.get("sitecustomize"), "__file__", None),
}))
"""
PARENT = """
import json, subprocess, sys
run = [subprocess.run(command, capture_output=True, text=True) for command in json.loads(sys.argv[1])]
print(json.dumps([[*map(json.loads, done.stdout.splitlines()), done.stderr, done.returncode] for done in run]))
"""


def children(python, way, *commands, cwd, PYTHONPATH=""):  # noqa: N803
    """What children of a process say of themselves, which was started in this way."""
    command = [*way, "-c", PARENT, json.dumps([[str(part) for part in command] for command in commands])]
    return json.loads(launch(*command, python=python, cwd=cwd, PYTHONPATH=PYTHONPATH).stdout)


def test_children_know_the_names_and_find_everything_else_as_it_was(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/sitecustomize.py").write_text("import sys; sys.existing = getattr(sys, 'existing', 0) + 1")
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    reached = [[sys.executable, script, "--flag"], [sys.executable, *LAUNCHED, script, "--flag"]]
    spared = [[sys.executable, flag, script] for flag in ("-E", "-I", "-S")]
    places = {"cwd": tmp_path, "PYTHONPATH": os.pathsep.join([str(tmp_path / "home"), str(ROOT)])}
    launched = children(sys.executable, LAUNCHED, *reached, *spared, **places)
    direct = children(sys.executable, (), *reached[:1], *reached[:1], *spared, **places)
    for (ours, *end), (theirs, *_) in zip(launched, direct, strict=True):
        assert end == ["", 0]
        assert (ours["argv"], ours["loaded"], ours["existing"]) == (theirs["argv"], [], theirs["existing"])
        assert ours["sitecustomize"] == theirs["sitecustomize"]
        assert (ours["handed down"], theirs["handed down"], theirs["knows"]) == (1, 0, False)
        if "-S" not in ours["argv"]:
            found = [entry for entry in ours["path"] if not entry.endswith("inherited")]
            assert found == theirs["path"]
    assert [child["knows"] for child, *_ in launched] == [True, True, False, False, False]
    assert [child["existing"] for child, *_ in launched] == [1, 1, None, None, None]
    assert all(child["path"] == theirs["path"] for (child, *_), (theirs, *_) in zip(launched[:4], direct, strict=False))


def test_children_of_an_hf_cwd_that_is_not_installed(tmp_path):
    """Those of the same environment know it, others do not notice; and so for one in a zip file."""
    home, other = (Environment(tmp_path / name) for name in ("home", "other"))
    for environment in (home, other):
        environment.package.unlink()
    with zipfile.ZipFile(tmp_path / "hf_cwd.zip", "w") as archive:
        for file in (ROOT / "hf_cwd").rglob("*.py"):
            archive.write(file, file.relative_to(ROOT))
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    commands = [[environment.python, script] for environment in (home, other)]
    zipped = f"import sys; sys.path.insert(0, {str(tmp_path / 'hf_cwd.zip')!r}); from hf_cwd import launcher; "
    zipped += "launcher.main(sys.argv[1:])"
    direct = children(home.python, (), *commands, cwd=tmp_path)
    # The working directory, which is where hf_cwd is, is none of the children's, whose script is elsewhere.
    for way, cwd in {LAUNCHED: ROOT, ("-c", zipped): tmp_path}.items():
        found = children(home.python, way, *commands, cwd=cwd)
        assert [end for _, *end in found] == [["", 0], ["", 0]]
        assert [child["knows"] for child, *_ in found] == [True, False]
        assert [child["path"] for child, *_ in found] == [child["path"] for child, *_ in direct]
        assert [child["loaded"] for child, *_ in found] == [[], []]
    names = "from transformers.training_args import OptimizerNames as names; print(names('cwd_adamw').value)"
    script.write_text(names)
    run = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, {str(script)!r}]))"
    assert launch(*LAUNCHED, "-c", run, python=home.python, cwd=ROOT).stdout == "cwd_adamw\n"


def test_spawned_processes_know_the_names(tmp_path):
    """Also those of a server that forks: neither is a copy of this process."""
    (tmp_path / "script.py").write_text(
        "import multiprocessing, sys\n"
        "def knows(_):\n"
        "    return [type(finder).__name__ for finder in sys.meta_path].count('CWDFinder')\n"
        "if __name__ == '__main__':\n"
        "    for method in ('spawn', 'forkserver', 'fork'):\n"
        "        with multiprocessing.get_context(method).Pool(1) as pool:\n"
        "            print(pool.map(knows, [0]))\n"
    )
    assert launch(*LAUNCHED, "script.py", cwd=tmp_path).stdout == "[1]\n" * 3


CODE = """
import sys
print({key: str(value) for key, value in globals().items() if key not in ("sys", "__builtins__")}, sys.argv, sys.path)
print(sys.stdin.read(), file=sys.stderr)
def fail():
    int("three")
if "error" in sys.argv:
    fail()
sys.exit(3)
"""


@pytest.mark.parametrize("ending", ["error", "status"])
@pytest.mark.parametrize("way", ["-c", "-"])
def test_code_runs_as_under_python(way, ending, tmp_path):
    results = []
    for prefix in ((), LAUNCHED):
        command = [sys.executable, *prefix, *(["-c", CODE] if way == "-c" else ["-"]), ending, "--flag=1"]
        text = "some text" if way == "-c" else CODE
        done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        results.append((done.returncode, done.stdout, done.stderr))
    assert results[0] == results[1]
    assert results[0][0] == {"error": 1, "status": 3}[ending]
    assert f"['{way}', '{ending}', '--flag=1']" in results[0][1]


LAUNCHERS = {
    # On a CPU, too: MULTI_CPU and --cpu start a single process, without a word.
    # Started by us, what it starts knows the names as well; tests/test_configs.py has it start us.
    "accelerate": [
        *(*LAUNCHED, COMMANDS / "accelerate", "launch", "--main_process_port", 0),
        *("--multi_gpu", "--num_processes", 2),
    ],
    "torchrun": [COMMANDS / "torchrun", "--standalone", "--nproc_per_node", 2, *LAUNCHED],
    "deepspeed": [COMMANDS / "deepspeed", "--num_gpus", 2, "--master_port", "{port}", "--module", "hf_cwd"],
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_processes(name, material, tmp_path):
    command = [str(part).format(port=free_port()) for part in LAUNCHERS[name]]
    options = flags(material, output_dir="out")
    if name == "deepspeed":
        options += ["--deepspeed", str(ROOT / "configs/deepspeed/zero2.json")]
    environment = {"HF_HOME": str(tmp_path / "home"), "DS_ACCELERATOR": "cpu"}
    result = launch(*command, SCRIPTS / "unmodified.py", *options, cwd=tmp_path, **environment)
    ranks = reports(tmp_path / "out")
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    local_rank = [[f"--local_rank={i}"] if name == "deepspeed" else [] for i in range(2)]
    assert [rank["argv"][1:] for rank in ranks] == [local_rank[0] + options, local_rank[1] + options]
    assert ranks[0]["accuracies"] == ranks[1]["accuracies"] != []
    assert result.stderr.count("[hf_cwd] cwd_muon lr=") == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with an accelerator transformers needs no --use_cpu")
def test_processes_that_would_train_apart_are_refused(material, tmp_path):
    """Without --use_cpu TrainingArguments answer world size 1 in each of two processes, and nobody says a word."""
    options = flags(material, output_dir="out", use_cpu="false")
    for result in finish_all(fork_ranks(2, *LAUNCHED, SCRIPTS / "unmodified.py", *options, cwd=tmp_path)):
        assert result.returncode != 0
        assert "ValueError: 2 processes were started, but TrainingArguments have world_size=1" in result.stderr
    assert reports(tmp_path / "out") == []


def test_two_ranks_equal_one_process_with_the_same_global_batch(tmp_path):
    """Every rule under DDP on gloo, in fp64 so that the order of a sum cannot flip a sign."""
    script = SCRIPTS / "ddp.py"
    one = fork(script, tmp_path / "one", cwd=tmp_path)
    for result in finish_all([one, *fork_ranks(2, *LAUNCHED, script, tmp_path / "two", cwd=tmp_path)]):
        assert result.returncode == 0, result.stderr
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


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--script_raises"], 1)], ids=["0", "1"])
def test_ranks_end_with_their_own_status(options, status, tmp_path):
    """Without hf_cwd.ending one rank in four aborts here."""
    result = launch("-m", "tests.support.endings", 8, *options, cwd=ROOT)
    assert result.stdout == f"8 launches of two ranks ended with {{{status}: 16}}\n"
