"""configs/: models, recipes and DeepSpeed's files as they are written, and how many processes Accelerate starts."""

import json
import lzma
import math
import re

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import hf_cwd  # noqa: F401  registers the cwd_* names
from hf_cwd.trainer.optim_args import optimizer_arguments
from tests.support.forking import fork
from tests.support.launching import ROOT, launch
from tests.support.tiny import tiny_llama

RECIPES = sorted((ROOT / "configs/recipes").iterdir())
DEEPSPEED = sorted((ROOT / "configs/deepspeed").iterdir())
# Sequences in a batch, steps, AdamW's learning rate, weight decay and eps, warm-up steps.
SIZES = {
    "llama-111m": (128, 7252, 1.649e-3, 0.261, 1e-6, 1000),
    "llama-338m": (192, 15466, 1.366e-3, 0.276, 1e-6, 1000),
    "llama-986m": (256, 35106, 1e-3, 0.3, 1e-6, 1000),
    "llama-2.3b": (1024, 21297, 1e-3, 0.3, 1e-6, 1000),
    "olmo-1b": (2048, 23842, 4e-4, 0.1, 1e-8, 2000),
}
RULES = ("adamw", "lion", "muon")


@pytest.mark.parametrize(
    ("name", "count", "paper"),
    [
        ("llama-111m", 110_371_328, 110.55e6),
        ("llama-338m", 338_183_168, 338.44e6),
        ("llama-986m", 985_437_696, 985.89e6),
        ("llama-2.3b", 2_320_574_464, 2321.38e6),
        ("olmo-1b", 1_176_715_264, None),  # the paper has no count for it
    ],
)
def test_model_sizes(name, count, paper):
    config = AutoConfig.from_pretrained(ROOT / f"configs/models/{name}.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == count, "tied weights are one parameter, and counted once"
    assert config.max_position_embeddings == 2048
    if paper is not None:
        # The paper's model has biases in the FFN, the norms and the output, which a stock Llama has not.
        assert count == pytest.approx(paper, rel=2e-3)


@pytest.mark.parametrize(("name", "count"), [("llama-7b", 6_738_415_616), ("llama-70b", 70_553_706_496)])
def test_models_to_explain(name, count):
    """Llama 2 7B and Llama 3 70B, whose numbers of parameters are known."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ROOT / f"configs/models/{name}.json"))
    assert sum(p.numel() for p in model.parameters()) == count


def test_a_recipe_for_each_size_and_rule():
    assert {path.name for path in RECIPES} == {f"{size}-{rule}.yaml" for size in SIZES for rule in RULES}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """The flags of short documents of the demo corpus and of a tokenizer for them; scripts/ can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # recipes name their model from there
        from common.lm_data import train_tokenizer
        from datasets import Dataset

        folder = tmp_path_factory.mktemp("recipes")
        with lzma.open("scripts/corpus/sotu.jsonl.xz", "rt", encoding="utf-8") as corpus:
            rows = [{"text": json.loads(next(corpus))["text"][:1500]} for _ in range(40)]
        (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        tokenizer = train_tokenizer(Dataset.from_list(rows), text_column="text", vocab_size=512)
        tokenizer.save_pretrained(folder / "tokenizer")
        yield [
            *("--train_file", str(folder / "docs.jsonl"), "--tokenizer_name", str(folder / "tokenizer")),
            *("--cache_dir", str(folder / "cache"), "--use_cpu", "true", "--report_to", "none"),
            *("--disable_tqdm", "true", "--output_dir"),
        ]


def stated(path):
    """What a recipe must ask of the optimizer."""
    size, rule = path.stem.rsplit("-", 1)
    _, _, lr, weight_decay, eps, _ = SIZES[size]
    return {
        "adamw": {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.95), "eps": eps},
        "lion": {"lr": pytest.approx(lr / 5), "weight_decay": pytest.approx(weight_decay * 5), "betas": (0.9, 0.95)},
        "muon": {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": 0.95,
            "nesterov": False,
            "adamw_betas": (0.9, 0.95),
            "adamw_eps": eps,
        },
    }[rule]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_asks_for_what_is_published(path, lm, tmp_path):
    from common.lm_args import parse

    model, data, training = parse([str(path), *lm, str(tmp_path)], "")
    size, rule = path.stem.rsplit("-", 1)
    batch, steps, *_, warmup = SIZES[size]
    assert (training.optim, model.config_name) == (f"cwd_{rule}", f"configs/models/{size}.json")
    assert optimizer_arguments(training) == stated(path)
    processes = int(re.search(r"--nproc_per_node (\d+)", path.read_text())[1])
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * processes == batch
    assert (data.block_size, training.max_steps, training.warmup_steps) == (2048, steps, warmup)
    assert (training.lr_scheduler_type, training.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    assert (training.max_grad_norm, training.bf16) == (1.0, True)


class Steps(TrainerCallback):
    """What the optimizer is, and how often it stepped."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.optimizer, self.number = optimizer, state.global_step


# Of the model only its kind is left; of the run, two steps: one with a learning rate of 0, and one with all of it.
SHRUNKEN = {
    "config_overrides": "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2,"
    "num_key_value_heads=2,vocab_size=512,max_position_embeddings=64",
    "block_size": 64,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "warmup_steps": 1,
    "logging_steps": 1,
    "max_eval_samples": 4,
    "save_strategy": "no",
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_starts(path, lm, tmp_path):
    import pretrain

    steps = Steps()
    over = [str(part) for key, value in SHRUNKEN.items() for part in (f"--{key}", value)]
    metrics = pretrain.main([str(path), *lm, str(tmp_path), *over], callbacks=[steps])
    assert steps.number == 2
    assert metrics["train_tokens"] == 2 * 2 * 4 * 64
    assert math.isfinite(metrics["train_loss"])
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    expected, rule = stated(path), path.stem.rsplit("-", 1)[1]
    assert [entry["learning_rate"] for entry in history[:2]] == [0, expected["lr"]]
    groups = steps.optimizer.param_groups
    assert {group["algorithm"] for group in groups} == ({"muon", "adamw"} if rule == "muon" else {rule})
    assert all(group["initial_lr"] == expected["lr"] for group in groups)
    for key in expected.keys() - {"lr", "adamw_betas", "adamw_eps"}:
        assert groups[0][key] == expected[key], key


@pytest.fixture
def _no_deepspeed_is_left():
    yield
    unset_hf_deepspeed_config()


@pytest.mark.usefixtures("_no_deepspeed_is_left")
@pytest.mark.parametrize("precision", ["fp16", "bf16", None])
@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_leaves_the_trainer_s_flags_to_the_trainer(path, precision, tmp_path):
    model = tiny_llama()
    flags = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "max_grad_norm": 0.7}
    flags |= {precision: True} if precision else {}
    training = TrainingArguments(str(tmp_path), deepspeed=str(path), use_cpu=True, optim="cwd_muon", **flags)
    training.hf_deepspeed_config.trainer_config_finalize(training, model, 10)  # raises where flag and file disagree
    config = training.deepspeed_plugin.deepspeed_config
    assert "auto" not in json.dumps(config)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (3, 5)
    assert (config["train_batch_size"], config["gradient_clipping"]) == (15, 0.7)
    assert [config[key]["enabled"] for key in ("fp16", "bf16")] == [precision == "fp16", precision == "bf16"]


def test_deepspeed_and_accelerate_agree():
    """Files of one name ask for the same stage and offload, and for nothing that a script has a flag for."""
    for path in sorted((ROOT / "configs/accelerate").glob("zero*.yaml")):
        asked = yaml.safe_load(path.read_text())
        options = asked.pop("deepspeed_config")
        zero = json.loads((ROOT / f"configs/deepspeed/{path.stem}.json").read_text())["zero_optimization"]
        given = {"zero_stage": zero["stage"]}
        if "offload_optimizer" in zero:
            given["offload_optimizer_device"] = zero["offload_optimizer"]["device"]
        if zero["stage"] == 3:
            given |= {"zero3_init_flag": True, "zero3_save_16bit_model": True}
            assert zero["stage3_gather_16bit_weights_on_model_save"]
        assert (options, asked["mixed_precision"]) == (given, "no")


PROBE = """
import pathlib
from transformers import HfArgumentParser, TrainingArguments
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
report = f"{args.world_size} {args.parallel_mode.value} {args.optim.value}"
pathlib.Path(args.output_dir, f"rank-{args.process_index}").write_text(report)
"""


@pytest.mark.parametrize(
    ("name", "reports"),
    [("single", ["1 not_parallel cwd_lion"]), ("ddp", ["2 distributed cwd_lion", "2 distributed cwd_lion"])],
)
def test_accelerate_starts_as_many_processes_as_the_file_says(name, reports, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    flags = ["--optim", "cwd_lion", "--use_cpu", "--output_dir", str(tmp_path)]
    command = ("-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{name}.yaml", "-m", "hf_cwd")
    launch(*command, tmp_path / "probe.py", *flags, cwd=ROOT, start=fork)  # which starts the processes itself
    assert [path.read_text() for path in sorted(tmp_path.glob("rank-*"))] == reports
