"""``hf-cwd explain``: the table says what training does, without a weight in memory."""

import re
import sys

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, GPT2Config, LlamaConfig, MixtralConfig, Trainer, TrainingArguments

from hf_cwd.cli import cost_table, explain, main
from tests.support.tiny import TINY, tiny_llama


@pytest.fixture
def explained(monkeypatch, capsys):
    """``explained(source, *flags)``: the lines that the command prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-cwd", "explain", *map(str, arguments)])
        assert main() == 0
        return capsys.readouterr().out.splitlines()

    return run


def rows(lines):
    """The table: name to the other columns."""
    start = next(i for i, line in enumerate(lines) if line.startswith("parameter"))
    table = lines[start + 1 : lines.index("", start)]
    return {name: rest for name, *rest in (re.split(r"  +", line) for line in table)}


def test_layers_are_folded(explained, tmp_path):
    GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=2, architectures=["GPT2LMHeadModel"]).save_pretrained(
        tmp_path
    )
    lines = explained(tmp_path, "--learning_rate", 1e-3, "--weight_decay", 0.1, "--optim_args", "adamw_lr=5e-4")
    assert lines[0] == "GPT2LMHeadModel with --optim cwd_muon"
    table = rows(lines)
    assert table["transformer.wte.weight"] == [
        *("1", "64x32", "adamw", "0.0005", "0.1", "embedding, tied to the output head")
    ]
    assert table["transformer.h.{0-2}.attn.c_attn.weight"] == [
        *("3", "32x96", "muon", "0.001", "0.1", "hidden matrix, transposed, fused q, k, v (32 + 32 + 32)")
    ]
    assert table["transformer.h.{0-2}.ln_1.bias"] == ["3", "32", "adamw", "0.0005", "0", "vector (bias)"]
    assert len(table) == 2 + 12 + 2
    assert lines[-2].startswith("muon: 18 matrices in 12 tensors, 36,864 parameters; adamw: 28 tensors")


def test_it_says_what_training_does(explained, tmp_path):
    """Every line of --all against the groups of the optimizer that a real Trainer makes from the same flags."""
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    flags = {
        "learning_rate": 1e-3,
        "weight_decay": 0.2,
        "optim_args": "adamw_lr=2e-4",
        "optim_target_modules": ".*mlp.*",
    }
    table = rows(explained(tmp_path, "--all", *(part for key, value in flags.items() for part in (f"--{key}", value))))
    args = TrainingArguments(str(tmp_path / "out"), optim="cwd_muon", use_cpu=True, report_to="none", **flags)
    groups = Trainer(model=model, args=args).create_optimizer().param_groups
    names = {p: name for name, p in model.named_parameters()}
    trained = {names[p]: group for group in groups for p in group["params"]}
    assert table.keys() == trained.keys()
    for name, (_, shape, rule, lr, weight_decay, _) in table.items():
        group = trained[name]
        assert (rule, float(lr), float(weight_decay)) == (group["algorithm"], group["lr"], group["weight_decay"])
        assert shape == "x".join(map(str, model.get_parameter(name).shape))
    assert {row[-1] for name, row in table.items() if "q_proj" in name} == {"not in target_modules"}


def test_element_wise_rules(explained, tmp_path):
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    lines = explained(tmp_path / "config.json", "--optim", "cwd_lion")
    assert {row[2] for row in rows(lines).values()} == {"lion"}
    assert "lion: 21 tensors" in lines[-3]
    assert "nothing is decayed" in lines[-1]


def test_layers_that_differ_are_told_apart(explained, tmp_path):
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=32, num_hidden_layers=5, num_experts=4, mlp_only_layers=[0, 3]
    )
    config.save_pretrained(tmp_path)
    table = rows(explained(tmp_path))
    assert table["model.layers.{0,3}.mlp.up_proj.weight"][0] == "2"
    assert table["model.layers.{1-2,4}.mlp.gate.weight"][-1] == "router"
    assert "experts, stack of 4, fused gate, up" in table["model.layers.{1-2,4}.mlp.experts.gate_up_proj"][-1]


def test_large_models_from_their_configuration(explained, tmp_path):
    """Llama 3 70B and Mixtral 8x7B in full: they would not fit, so that nothing can have been allocated."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    LlamaConfig(**shape, num_attention_heads=64, num_key_value_heads=8).save_pretrained(tmp_path)
    lines = explained(tmp_path)
    # embeddings and head, then 80 layers: q and o, k and v, the three of the MLP, two norms; the last norm
    layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    total = 2 * 128256 * 8192 + 80 * (layer + 2 * 8192) + 8192
    assert lines[-3].startswith(f"muon: 560 matrices in 560 tensors, {80 * layer:,} parameters")
    assert lines[-2].startswith(f"{total:,} parameters")
    MixtralConfig().save_pretrained(tmp_path)
    assert "muon: 896 matrices in 192 tensors" in explained(tmp_path)[-3]  # 32 layers of 4, 8 experts of 3
    assert not any(p.device.type != "meta" for p in explain.load(str(tmp_path)).parameters())


def test_a_peft_adapter(explained, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = tiny_llama()
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "adapter")
    table = rows(explained(tmp_path / "adapter"))
    prefix = "base_model.model.model.layers.{0-1}.self_attn.q_proj"
    assert table[f"{prefix}.lora_A.default.weight"][2:] == ["muon", "5e-05", "0", "LoRA factor"]
    assert table[f"{prefix}.base_layer.weight"][2:] == ["-", "-", "-", "frozen"]
    assert table["base_model.model.lm_head.modules_to_save.default.weight"][2:] == [
        "adamw",
        "5e-05",
        "0",
        "output head",
    ]


def ranks(lines):
    """The table of ranks: the first column to the others."""
    start = next(i for i, line in enumerate(lines) if line.startswith("ranks "))
    cells = (re.split(r"  +", line) for line in lines[start + 1 :])
    return {name: rest for name, *rest in cells if rest}


def test_what_a_step_costs_each_rank(explained, tmp_path):
    """Two ranks, by hand: 14 matrices of which each holds half, so that it receives half of each, once."""
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    lines = explained(tmp_path, "--layout", "fsdp2", "--world", 2, "--device", "cpu")
    total = sum(p.numel() for p in tiny_llama().parameters())
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    states = 2 * total - matrices  # one for each matrix, two for the rest
    assert "--layout fsdp2=2: 2 ranks, float32 parameters" in lines
    weights = f"{total * 4 / 2 / 2**20:.1f} MiB"
    costs = ranks(explained(tmp_path, "--layout", "fsdp2=2", "--device", "cpu", "--all"))
    assert list(costs) == ["0", "1"]
    for kept, gradients, state, _, received, _ in costs.values():
        assert (kept, gradients, state) == (weights, weights, f"{states * 4 / 2 / 2**20:.1f} MiB")
        assert int(received.replace(",", "")) == matrices * 4 / 2
    # To an accelerator they travel in bfloat16, and what a rank holds of bfloat16 parameters is half as large.
    half = ranks(explained(tmp_path, "--layout", "fsdp2=2", "--all", "--dtype", "bfloat16"))
    assert half["0"][4] == f"{matrices * 2 // 2:,}"
    assert half["0"][0] == f"{total * 2 / 2 / 2**20:.1f} MiB"
    # With masters the states are fp32 and there are two more bytes an element.
    flags = ("--layout", "fsdp2=2", "--all", "--dtype", "bfloat16", "--optim_args", "master=remainder")
    assert ranks(explained(tmp_path, *flags))["0"][2] == f"{(states * 4 + total * 2) / 2 / 2**20:.1f} MiB"


def test_options_of_the_exchange(explained, tmp_path):
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    flags = (tmp_path, "--layout", "ddp=4", "--optim_args")
    assert "No exchange: every matrix is orthogonalised where it is" in explained(*flags, "share=never")
    (line,) = (line for line in explained(*flags, "share=always,exchange_bytes=3072") if line.startswith("Rounds"))
    rounds, wire = re.match(r"Rounds of exchange a step: (\d+), in (\w+);", line).groups()
    assert int(rounds) > 4
    assert wire == "bfloat16"
    lines = explained(*flags, "share=always,ns_dtype=float32")
    assert any(line.startswith("Rounds of exchange a step: 1, in float32") for line in lines)


def test_ranks_are_folded(explained, monkeypatch, tmp_path):
    """Eight layers of Llama 3 70B on 1024 ranks, of which 968 get none of its 56 matrices."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 8, "vocab_size": 128256}
    LlamaConfig(**shape, num_attention_heads=64, num_key_value_heads=8).save_pretrained(tmp_path)
    lines = explained(tmp_path, "--layout", "fsdp2", "--world", 1024)
    costs = ranks(lines)
    assert len(costs) <= cost_table.LINES
    assert sum(int(b or a) - int(a) + 1 for a, _, b in (name.partition("-") for name in costs)) == 1024
    assert lines[-1].endswith("968 of 1,024 ranks have no matrix to orthogonalise")
    monkeypatch.setattr(cost_table, "LINES", 3)
    (name, values), *others = ranks(explained(tmp_path, "--layout", "fsdp2=1024")).items()
    assert (name, others) == ("0-1023", [])
    low, high = (int(part.replace(",", "")) for part in values[4].split(" to "))
    received = [int(values[4].replace(",", "")) for values in costs.values()]
    assert (low, high) == (min(received), max(received))


def test_no_exchange_for_element_wise_rules(explained, tmp_path):
    LlamaConfig(**(TINY | {"num_key_value_heads": 2})).save_pretrained(tmp_path)
    lines = explained(tmp_path, "--optim", "cwd_lion", "--layout", "fsdp2=2,tp=2")
    assert list(ranks(lines)) == ["0-3"]
    assert lines[-1].startswith("cwd_lion is element-wise: each rank steps what it holds")


FILES = {
    "cut.json": '{"model_type": "lla',
    "list.json": "[1]",
    "text.json": '{"model_type": "llama", "hidden_size": "x"}',
    "negative.json": '{"model_type": "llama", "vocab_size": -4}',
    "timm.json": '{"model_type": "timm_wrapper", "architecture": "resnet18"}',
    "detr.json": '{"model_type": "detr", "use_timm_backbone": true, "backbone": "resnet50"}',
    "cut_adapter/adapter_config.json": "{",
    "adapter/adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "missing.json"}',
    "no_base/adapter_config.json": '{"peft_type": "LORA"}',
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.json"], "missing.json: there is no such file or directory"),
        (["./missing"], "./missing: there is no such file or directory"),
        (["missing"], "'missing' is not a readable configuration, model directory or Hub id: "),
        (["empty"], "empty: the directory has no config.json, nor an adapter_config.json"),
        (["cut.json"], "'cut.json' is not a readable configuration, model directory or Hub id: "),
        (["list.json"], "'list.json' is not a readable configuration, model directory or Hub id: "),
        (["text.json"], "Field 'hidden_size' expected int, got str (value: 'x')"),
        (["negative.json"], "negative.json: the model cannot be made from its configuration: "),
        (["timm.json"], "it needs timm: pip install timm\n"),
        (
            ["detr.json"],
            "detr.json: the model cannot be made from its configuration: it needs timm: pip install timm",
        ),
        (["cut_adapter"], "cut_adapter is not a readable PEFT adapter: "),
        (["adapter"], "missing.json: there is no such file or directory"),
        (["no_base"], "no_base: adapter_config.json does not name the base_model_name_or_path"),
        (["MODEL", "--optim_args", "betas=2:0.9"], "--optim_args: betas="),
        (["MODEL", "--optim_target_modules", "qproj"], "--optim_target_modules 'qproj' names no matrix"),
        (["MODEL", "--model_class", "LLama"], "has no LLama: name one by --model_class"),
        (["MODEL", "--layout", "hsdp"], "--layout 'hsdp': 'hsdp' is not understood. Write ddp, fsdp2, tp, or several"),
        (["MODEL", "--world", "8"], "--world 8 needs --layout: ddp, fsdp2, tp, or several"),
        (["MODEL", "--optim", "cwd_adam"], "invalid choice: 'cwd_adam'"),
    ],
)
def test_wrong_use(arguments, message, monkeypatch, capsys, tmp_path):
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = [str(tmp_path) if argument == "MODEL" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["hf-cwd", "explain", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_without_a_matrix(monkeypatch, capsys, tmp_path):
    config = AutoConfig.for_model("llama", **(TINY | {"num_hidden_layers": 0}), architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hf-cwd", "explain", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "LlamaForCausalLM has no trainable matrix for muon" in capsys.readouterr().err


def test_folding():
    def row(name, shape=(2, 2)):
        return explain.Row(name, 1, shape, "muon", 0.1, 0.1, "hidden matrix")

    folded = explain.fold([row(f"layers.{i}.experts.{j}.w") for i in (0, 1, 3) for j in (0, 1)] + [row("layers.0.w")])
    assert [(r.name, r.count) for r in folded] == [("layers.{0-1,3}.experts.{0-1}.w", 6), ("layers.0.w", 1)]
    assert [r.name for r in explain.fold([row("a.0.w", (1, 2)), row("a.1.w")])] == ["a.0.w", "a.1.w"]
