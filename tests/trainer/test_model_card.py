"""The model card: its text and its tags say what trained the model, however it comes to be written."""

import re
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from transformers import Trainer

import hf_cwd
from hf_cwd import CWDLion, CWDTrainer
from hf_cwd.report.read import read
from tests.support.tiny import tiny_data, tiny_llama


def train(args, model=None, **options):
    trainer = CWDTrainer(model=model or tiny_llama(), args=args, train_dataset=tiny_data(), **options)
    trainer.train()
    return trainer


def card(args):
    return ModelCard.load(Path(args.output_dir) / "README.md")


def table(text):
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))


def test_the_optimizer_in_words_and_numbers(arguments):
    args = arguments(optim="cwd_muon", optim_args="mask=gt,adamw_eps=1e-6", adam_beta2=0.95, lr_scheduler_type="linear")
    trainer = train(args)
    trainer.create_model_card(tags="mine")
    found = card(args)
    assert found.data.tags == ["mine", "generated_from_trainer", "cautious-weight-decay", "hf_cwd"]
    text = found.text
    assert "OptimizerNames" not in text
    (line,) = re.findall(r"^- optimizer: (.*)$", text, re.MULTILINE)
    assert line.startswith(f"CWD-Muon (hf_cwd {hf_cwd.__version__}) with lr=0.01, weight_decay=0.1, momentum=0.95, ")
    assert "mask=gt" in line
    assert re.search(r"^- lr_scheduler_type: linear$", text, re.MULTILINE), "the line after it is left alone"
    assert "https://arxiv.org/abs/2510.12402" in text
    assert "a step decays a weight x only where u·x > 0" in text
    assert "Learning rate 0.01, weight decay 0.1." in text
    parts = "muon: 14 matrices in 14 tensors, 15,360 parameters; adamw: 7 tensors, 4,256 parameters."
    assert f"Its parameters by rule: {parts}" in text
    fraction = [entry["cwd/decayed_fraction"] for entry in trainer.state.log_history if "loss" in entry][-1]
    assert f"On the last step that was logged {fraction:.1%} of the elements were decayed." in text
    shown = table(text)
    assert shown["adamw_betas"] == "(0.9, 0.95)"
    assert shown["adamw_eps"] == "1e-06"
    assert shown.keys() >= {"ns_steps", "ns_dtype", "kernel", "master", "exchange_bytes", "adamw_lr"}
    assert text.index("### Optimizer") < text.index("### Framework versions")


def test_every_rule(arguments, algorithm):
    args = arguments(optim=f"cwd_{algorithm}", max_steps=1)
    train(args).create_model_card()
    text = card(args).text
    assert "OptimizerNames" not in text
    names = {"adamw": "CWD-AdamW", "lion": "CWD-Lion", "muon": "CWD-Muon", "sgd": "CWD-SGD"}
    assert f"- optimizer: {names[algorithm]} (hf_cwd" in text
    assert f"It was trained by {names[algorithm]} of hf_cwd" in text


def test_twice_is_once(arguments):
    args = arguments(optim="cwd_adamw", optim_args="mask=gt", max_steps=2)
    trainer = train(args)
    trainer.create_model_card()
    first = (Path(args.output_dir) / "README.md").read_text()
    trainer.create_model_card()
    hf_cwd.trainer.model_card.complete(trainer)
    assert (Path(args.output_dir) / "README.md").read_text() == first


def test_all_else_is_the_trainer_s(arguments):
    args = arguments(optim="cwd_lion", max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = CWDTrainer(model=tiny_llama(), args=args, train_dataset=tiny_data(), eval_dataset=tiny_data(8))
    trainer.train()
    options = {"language": "en", "dataset": "d", "dataset_tags": "d", "dataset_args": "x", "tasks": "text-generation"}
    trainer.create_model_card(**options)
    ours = (Path(args.output_dir) / "README.md").read_text()
    Trainer.create_model_card(trainer, **options)
    theirs = (Path(args.output_dir) / "README.md").read_text()
    ours = re.sub(r"<!-- hf_cwd: optimizer -->.*<!-- hf_cwd: end -->\n\n", "", ours, flags=re.DOTALL)
    ours = re.sub(r"- (cautious-weight-decay|hf_cwd)\n", "", ours)
    ours = re.sub(r"- optimizer: CWD.*\n", "", ours)
    assert ours == re.sub(r"- optimizer: Use .*\n.*\n(?=- lr_s)", "", theirs)
    assert "model-index" in ours


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optim_args": "cautious=false"}, "AdamW with plain decoupled weight decay of hf_cwd"),
        ({"weight_decay": 0.0}, "with a weight decay of 0: nothing was decayed."),
    ],
)
def test_what_is_not_cautious_is_not_called_so(arguments, options, said):
    args = arguments(optim="cwd_adamw", max_steps=1, **options)
    train(args).create_model_card()
    assert card(args).data.tags == ["generated_from_trainer", "hf_cwd"]
    assert said in card(args).text
    assert "a step decays a weight x only where" not in card(args).text


def test_a_given_optimizer(arguments):
    model = tiny_llama()
    args = arguments(optim="adamw_torch", max_steps=1)
    train(args, model, optimizers=(CWDLion(model.parameters(), lr=1e-3, weight_decay=0.5), None)).create_model_card()
    assert "- optimizer: CWD-Lion (hf_cwd" in card(args).text
    assert "Learning rate 0.001, weight decay 0.5." in card(args).text
    assert "OptimizerNames" not in card(args).text


def test_before_training_it_says_what_is_asked_for(arguments):
    args = arguments(optim="cwd_muon", optim_args="ns_steps=3")
    CWDTrainer(model=tiny_llama(), args=args, train_dataset=tiny_data()).create_model_card()
    assert table(card(args).text)["ns_steps"] == "3"


def test_a_card_without_the_trainer_s_headings(arguments):
    """Of a class with a card of its own."""

    class Base(Trainer):
        def create_model_card(self):
            (Path(self.args.output_dir) / "README.md").write_text("# Mine\n")

    class Mine(hf_cwd.CWDTrainerMixin, Base):
        pass

    args = arguments(optim="cwd_sgd")
    Mine(model=tiny_llama(), args=args).create_model_card()
    text = (Path(args.output_dir) / "README.md").read_text()
    assert text.startswith("---\ntags:\n- cautious-weight-decay\n- hf_cwd\n---\n# Mine\n\n<!-- hf_cwd: optimizer -->\n")


def test_what_push_to_hub_uploads(arguments, monkeypatch):
    """The one call that needs a network is caught: what stands in the folder by then is uploaded."""
    uploaded = {}

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **options):
        files = huggingface_hub.utils.filter_repo_objects(
            [path.name for path in Path(folder_path).iterdir()], ignore_patterns=ignore_patterns
        )
        uploaded.update({name: (Path(folder_path) / name).read_bytes() for name in files if name.endswith(".md")})

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    args = arguments(optim="cwd_lion", hub_model_id="me/mine")
    trainer = train(args)
    trainer.hub_model_id = "me/mine"  # as of a repository that is there
    trainer.push_to_hub(dataset="d")
    text = uploaded["README.md"].decode()
    assert "- cautious-weight-decay\n" in text
    assert "It was trained by CWD-Lion of hf_cwd" in text
    assert "\n# mine\n" in text


def test_the_report_reads_it(arguments):
    """Of a run without a record: one setting, whole."""
    args = arguments(optim="cwd_sgd", optim_args="momentum=0.9", max_steps=1)
    trainer = train(args)
    trainer.save_state()
    trainer.create_model_card()
    (Path(args.output_dir) / "cwd_run.json").unlink(missing_ok=True)
    (run,) = read([args.output_dir])
    assert run.settings.values["optimizer"].startswith("CWD-SGD (hf_cwd")
    assert "momentum=0.9" in run.settings.values["optimizer"]
