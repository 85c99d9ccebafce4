"""bench/step.py and its parts: shapes of real models, memory, goals, and a run of a second."""

import json

import pytest
import torch
from bench import candidates as bench_candidates
from bench import rounds as bench_rounds
from bench import step as bench_step
from bench.candidates import CANDIDATES, Candidate, candidates, iteration_flops, states, traffic, try_out
from bench.machine import machine, peak_of
from bench.shapes import elements, largest_aspect, least_aspect, shapes_of
from bench.targets import goals
from bench.traffic import Traffic
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_cwd.kernels import c
from tests.support.launching import ROOT, launch

TINY = "2*16x16,1*8x32,3*24"


def llama(vocabulary, hidden, inner, layers, heads, key_value_heads):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            tie_word_embeddings=True,
        )
    )


@pytest.mark.parametrize(
    ("name", "parameters", "make"),
    [
        ("gpt2-124m", 124_439_808, lambda: GPT2LMHeadModel(GPT2Config())),
        ("smollm2-135m", 134_515_008, lambda: llama(49152, 576, 1536, 30, 9, 3)),
        ("llama-3.2-1b", 1_235_814_400, lambda: llama(128256, 2048, 8192, 16, 32, 8)),
    ],
)
def test_shapes_are_the_model_s(name, parameters, make):
    with torch.device("meta"):
        model = make()
    real = {key.partition(".")[2]: tuple(p.shape) for key, p in model.named_parameters()}
    table = shapes_of(name)
    assert {p.name: p.shape for p in table} == real
    assert elements(table) == parameters
    embeddings = {"wte.weight", "wpe.weight", "embed_tokens.weight"}
    assert {p.name for p in table if p.matrix} == {key for key, shape in real.items() if len(shape) == 2} - embeddings


def test_other_shapes():
    table = shapes_of(TINY)
    assert [p.shape for p in table] == [(16, 16), (16, 16), (8, 32), (24,), (24,), (24,)]
    assert [p.matrix for p in table] == [True] * 3 + [False] * 3
    assert (least_aspect(table), largest_aspect(table)) == (1, 4)
    assert len(shapes_of("300-tensors")) == 300
    assert (least_aspect(shapes_of("square")), least_aspect(shapes_of("wide"))) == (1, 4)
    with pytest.raises(ValueError, match="gpt5: give one of gpt2-124m"):
        shapes_of("gpt5")


ERRORS = {
    "model": (["--model", "gpt5"], "--model gpt5: give one of gpt2-124m, smollm2-135m"),
    "pairs": (["--pairs", "0"], "--pairs 0: give at least 1"),
    "threads": (["--threads", "1", "0"], "--threads 0: give at least 1"),
    "candidate": (["--candidates", "cwd_adam"], "--candidates cwd_adam: give some of torch_adamw_fused"),
    "dtype": (["--dtype", "fp8"], "invalid choice: 'fp8'"),
}


@pytest.mark.parametrize(("argv", "message"), ERRORS.values(), ids=ERRORS)
def test_mistakes(argv, message, capsys):
    with pytest.raises(SystemExit):
        bench_step.main(argv)
    assert message in capsys.readouterr().err


def test_list_names_every_candidate(capsys):
    assert bench_step.main(["--list"]) == 0
    assert {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()} == set(candidates())


def test_candidates_that_cannot_run_say_why():
    reasons = {
        "not_here": (bench_candidates._theirs("no_such_package", "Adam"), "not installed (no_such_package)"),
        "no_option": (bench_candidates._cwd("CWDAdamW", warp=9), "TypeError: CWDAdamW has no argument 'warp'"),
    }
    for make, message in reasons.values():
        reason, _ = try_out(Candidate(make), torch.float32, "cpu")
        assert reason.startswith(message)
    assert try_out(CANDIDATES["cwd_adamw_eager"], torch.bfloat16, "cpu") == (
        None,
        {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16},
    )


SOME = {name: CANDIDATES[name] for name in ("torch_adamw_fused", "torch_adamw_fused_again", "cwd_adamw_eager")} | {
    "torch_adamw_foreach": CANDIDATES["torch_adamw_foreach"],
    "cwd_lion_eager": CANDIDATES["cwd_lion_eager"],
}
NEEDED = ("torch_adamw_fused", "torch_adamw_fused_again")


@pytest.mark.parametrize(
    ("megabytes", "shared", "left_out"),
    # Four of 4 MiB each for weights, gradients and two states: 16 MiB a candidate, and 4 MiB less for Lion.
    [(200, False, []), (60, True, []), (24, True, ["torch_adamw_foreach"])],
)
def test_what_does_not_fit_shares_or_stays_out(megabytes, shared, left_out, monkeypatch):
    monkeypatch.setattr(bench_rounds, "available", lambda device: megabytes << 20)
    chosen = bench_rounds.plan(SOME, NEEDED, shapes_of("64*128x128"), torch.float32, "cpu", "auto")
    assert chosen.shared is shared
    assert list(chosen.left_out) == left_out
    assert all("no memory" in reason for reason in chosen.left_out.values())
    assert set(chosen.names) == set(SOME) - set(left_out)


def test_nothing_fits(monkeypatch):
    monkeypatch.setattr(bench_rounds, "available", lambda device: 1 << 20)
    with pytest.raises(MemoryError, match="take a smaller --model"):
        bench_rounds.plan(SOME, NEEDED, shapes_of("64*128x128"), torch.float32, "cpu", "auto")


@pytest.mark.parametrize("memory", ["own", "shared"])
def test_every_candidate_does_the_whole_step(memory):
    table = shapes_of(TINY)
    chosen = bench_rounds.plan(SOME, NEEDED, table, torch.float32, "cpu", memory)
    ready = bench_rounds.prepared(chosen, SOME, table, torch.float32, "cpu")
    places = set()
    for each in ready.values():
        assert all(p.grad.ne(0).all() for p in each.params)
        for p in each.params:
            kept = states(each.optimizer, p)
            assert all(tensor.ne(0).all() for tensor in kept.values())
            places |= {tensor.data_ptr() for tensor in (p, p.grad, *kept.values())}
        before = [p.detach().clone() for p in each.params]
        each.optimizer.step()
        assert all(p.detach().ne(old).any() for p, old in zip(each.params, before, strict=True))
    one = 4 * len(table)
    assert len(places) == (one if memory == "shared" else 4 * one + 3 * len(table))
    assert ready["torch_adamw_fused"].bytes == 28 * elements(table)
    assert ready["cwd_lion_eager"].bytes == 20 * elements(table)
    times = bench_rounds.rounds(ready, 3, "cpu", limit=60)
    assert {len(seconds) for seconds in times.step.values()} == {3}
    assert min(map(min, times.step.values())) > 0


@pytest.mark.skipif(c.unavailable(torch.device("cpu")) is not None, reason="no C kernel here")
@pytest.mark.parametrize(("name", "size"), [("floor_adamw", 28), ("floor_lion", 20)])
def test_floor_moves_the_same_bytes(name, size):
    table = shapes_of(TINY)
    wanted = {key: CANDIDATES[key] for key in (*NEEDED, name)}
    for memory, places in (("own", 3), ("shared", 2)):  # what it spoils is not shared with others
        chosen = bench_rounds.plan(wanted, NEEDED, table, torch.float32, "cpu", memory)
        ready = bench_rounds.prepared(chosen, wanted, table, torch.float32, "cpu")
        assert ready[name].bytes == size * elements(table)
        ready[name].optimizer.step()
        assert len({each.params[0].data_ptr() for each in ready.values()}) == places
        assert all(p.grad.ne(0).all() for p in ready[name].params)


@pytest.mark.skipif(c.unavailable(torch.device("cpu")) is not None, reason="no C compiler here")
@pytest.mark.parametrize(("states", "threads"), [(2, 1), (1, 1), (2, 3)])
def test_the_floor_reads_and_writes_every_element_once(states, threads):
    """Sizes around a chunk of 16384 elements and a block of 32."""
    params = [torch.zeros(size) for size in (1, 31, 33, 16384, 16385, 40000)]
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    floor, before = Traffic(params, states), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        floor.step()
    finally:
        torch.set_num_threads(before)
    for p in params:
        assert len(floor.state[p]) == states
        assert all(torch.equal(t, p.grad) for t in (p, *floor.state[p].values()))


def test_gradients_change_places():
    params = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 3, 2, 2)]
    for value, p in enumerate(params):
        p.grad = torch.full_like(p, value)
    bench_rounds.renew(params)
    assert [p.grad[0].item() for p in params] == [2, 1, 3, 0]


def test_counts_of_work():
    p = torch.nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD([p], momentum=0.9)
    optimizer.step()
    assert traffic(optimizer, [p]) == 5 * 2 * 32
    assert iteration_flops([p], steps=1) == 2 * (2 * 4 * 4 * 8) + 2 * 4**3


def test_peak_memory_is_seen():
    found = peak_of(lambda: torch.ones(4 << 20), "cpu")
    assert found is None or abs(found - (16 << 20)) < 2 << 20
    assert machine("cpu")["torch"] == torch.__version__


def run_of(**changes):
    seconds = [1.0] * 100

    def row(factor, extra=1e6):
        return {
            "seconds": [factor * value for value in seconds],
            "extra_bytes": extra,
            "bytes": 28,
            "host_seconds": None,
        }

    rows = {"torch_adamw_fused": row(1.0), "cwd_adamw": row(0.98), "cwd_lion": row(0.8), "cwd_sgd": row(0.7, 64e6)}
    given = {"device": "cpu", "family": "element-wise", "same": {"conclusive": True}, "candidates": rows, "tensors": 3}
    return given | changes


def test_goals():
    found = {goal.text: goal.verdict for goal in goals(run_of())}
    assert found["cwd_adamw / torch_adamw_fused"] == "holds"
    assert found["cwd_lion / torch_adamw_fused"] == "misses"
    assert found["cwd_adamw / deepspeed_adam"] == "-"
    assert found["cwd_adamw MB above parameters, gradients, states"] == "holds"
    assert found["cwd_sgd MB above parameters, gradients, states"] == "misses"
    untrusted = {goal.text: goal.verdict for goal in goals(run_of(same={"conclusive": False}))}
    assert untrusted["cwd_adamw / torch_adamw_fused"] == "inconclusive"


@pytest.mark.parametrize(("aspects", "limits"), [((1, 1), [1.02]), ((4, 8), [0.7]), ((1, 4), [])])
def test_goals_of_muon_go_by_shape(aspects, limits):
    found = goals(run_of(family="matrix", least_aspect=aspects[0], largest_aspect=aspects[1]))
    assert [goal.limit for goal in found] == [1.05, *limits]  # the first is for a logged step, of any shape


def test_goals_on_a_gpu_are_rates():
    run = run_of(device="cuda")
    run["candidates"]["copy"] = {"seconds": [0.9] * 100, "extra_bytes": 0, "bytes": 28, "host_seconds": [1e-5] * 100}
    run["candidates"]["cwd_adamw"]["host_seconds"] = [5e-4] * 100
    found = {goal.text: goal for goal in goals(run)}
    assert found["cwd_adamw / copy of as many bytes"].measured.median == pytest.approx(0.98 / 0.9)
    assert found["cwd_adamw / copy of as many bytes"].verdict == "holds"
    assert found["cwd_adamw ms of the host, 3 tensors"].verdict == "holds"


def test_a_run(tmp_path):
    given = ["--model", TINY, "--pairs", 3, "--threads", 1, "--family", "element-wise", "--targets"]
    some = ["--candidates", "cwd_adamw_eager", "cwd_lion_eager", "lion_pytorch"]
    done = launch(ROOT / "scripts/bench/step.py", *given, *some, "--json", "step.json", cwd=tmp_path)
    (run,) = json.loads((tmp_path / "step.json").read_text())["runs"]
    assert (run["model"], run["tensors"], run["rounds"], run["threads"]) == (TINY, 6, 3, 1)
    assert set(run["candidates"]) | set(run["left_out"]) == {*NEEDED, *some[1:]}
    assert run["same"]["conclusive"] is False  # three rounds show nothing
    assert run["machine"]["threads"] == 1
    row = run["candidates"]["cwd_adamw_eager"]
    assert len(row["seconds"]) == 3
    assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    assert "INCONCLUSIVE" in done.stdout
    assert "goal: cwd_adamw_eager / torch_adamw_fused <= 3" in done.stdout
    assert f"torch {torch.__version__}" in done.stdout.splitlines()[0]


def test_a_run_of_muon():
    flags = ["--model", TINY, "--pairs", "2", "--threads", "1", "--family", "matrix", "--dtype", "bf16"]
    args = bench_step.parse([*flags, "--candidates", "cwd_muon_bf16"])
    run = bench_step.measure(args)
    assert run["tensors"] == 3
    assert run["candidates"]["cwd_muon_bf16"]["tflops"] > 0
    assert "cwd_muon_bf16" in bench_step.report(run, targets=True)
