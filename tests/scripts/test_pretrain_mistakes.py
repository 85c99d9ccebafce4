"""pretrain.py: what it refuses, and says: one line that names the value, exit status 2, no traceback."""

import bz2
import errno
import gzip
import json
import lzma
import re
import resource
import shutil
import signal
from pathlib import Path

import pretrain
import pytest
import torch
from common.data_files import load_file
from common.usage import UsageError, command, told, writing
from transformers import ViTConfig, ViTForImageClassification

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = "--config_overrides"

ERRORS = {
    "no data": ({"train_file": None}, "no data.*--dataset_name and --train_file"),
    "two data": ({"dataset_name": "x"}, "exactly one of --dataset_name and --train_file"),
    "no file": ({"train_file": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    "kind of file": ({"train_file": __file__}, r"'.py'; use one of .txt, .json"),
    "column": ({"text_column": "body"}, "'body'.*text, year"),
    "no held-out document": ({"validation_split_percentage": 0}, "--validation_split_percentage 0"),
    "no model": ({"config_name": None}, "exactly one of --config_name"),
    "two models": ({"model_name_or_path": "x"}, "exactly one of --config_name"),
    "no config": ({"config_name": "nowhere.json"}, "--config_name nowhere.json: no such file or directory"),
    "no tokenizer": ({"train_tokenizer_vocab_size": None}, "--tokenizer_name or --train_tokenizer_vocab_size"),
    "two tokenizers": ({"tokenizer_name": "x"}, "only one of --tokenizer_name"),
    "small vocabulary": ({"train_tokenizer_vocab_size": 200}, "200.*at least 257"),
    "large vocabulary": ({"train_tokenizer_vocab_size": 600}, "600 tokens.*512.*--config_overrides vocab_size=600"),
    "override of nothing": ({"config_overrides": "hidden=8"}, "hidden=8.*a field of LlamaConfig"),
    "override's type": ({"config_overrides": "hidden_size=big"}, "hidden_size=big: expected a value like 32"),
    "override without =": ({"config_overrides": "hidden_size"}, "'hidden_size': expected NAME=VALUE"),
    "long blocks": ({"block_size": 128}, "--block_size 128.*2 to 64.*max_position_embeddings=128"),
    "nothing to resume": ({"resume_from_checkpoint": "true"}, "no checkpoint in"),
    "not a checkpoint": ({"resume_from_checkpoint": "nowhere"}, "nowhere is no checkpoint"),
    "unknown flag": ({"blok_size": 3}, "--blok_size 3"),
    "no held-out blocks": ({"max_eval_samples": 0}, "--max_eval_samples 0: give 1 or more"),
    "no training blocks": ({"max_train_samples": 0}, "--max_train_samples 0: give 1 or more"),
    "fewer than none": ({"max_train_samples": -3}, "--max_train_samples -3: give 1 or more"),
    "negative blocks": ({"block_size": -4}, "--block_size -4: give 2 or more"),
    "batch of none": ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: give 1 or more"),
    "evaluation batch": ({"per_device_eval_batch_size": -1}, "--per_device_eval_batch_size -1: give 1 or more"),
    "accumulation": ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0: give 1 or more"),
    "workers": ({"dataloader_num_workers": -1}, "--dataloader_num_workers -1: give 0 or more"),
    "processes": ({"preprocessing_num_workers": 0}, "--preprocessing_num_workers 0: give 1 or more"),
    "steps": ({"max_steps": 0}, "--max_steps 0: give 1 or more, or -1"),
    "epochs": ({"max_steps": None, "num_train_epochs": 0}, "--num_train_epochs 0.0: give more than 0"),
    "saves": ({"save_steps": 0}, "--save_steps 0.0: give more than 0"),
    "seed": ({"seed": -1}, "--seed -1: give 0 to 4294967295"),
    "large seed": ({"seed": 2**32}, "--seed 4294967296: give 0 to 4294967295"),
    "learning rate": ({"learning_rate": -1}, "--learning_rate -1.0: give 0 or more"),
    "no number": ({"learning_rate": "nan"}, "--learning_rate nan: give a finite number"),
    "infinite": ({"weight_decay": "inf"}, "--weight_decay inf: give a finite number"),
    "text for a number": ({"max_steps": "many"}, "argument --max_steps.*invalid int value: 'many'"),
    "betas": ({"adam_beta1": 1.5}, "--adam_beta1 1.5: give 0 to 1"),
    "smoothing": ({"label_smoothing_factor": 7}, "--label_smoothing_factor 7.0: give 0 to 1"),
    "optimizer": ({"optim": "muon"}, r"--optim muon does not exist\. Did you mean cwd_muon\?"),
    "near optimizer": ({"optim": "cwd_adam"}, "cwd_adam does not exist. Did you mean cwd_adamw"),
    "optimizer's option": ({"optim_args": "foo=1"}, "--optim_args: cwd_adamw has no option 'foo'. Its options are"),
    "torch's option": ({"optim": "adamw_torch", "optim_args": "foo"}, "--optim_args foo: write key=value"),
    "torch's error": ({"optim": "adamw_torch", "adam_beta2": 1}, "--optim adamw_torch: Invalid beta parameter"),
    "not installed": ({"optim": "adamw_bnb_8bit"}, "--optim adamw_bnb_8bit: .*install `bitsandbytes`"),
    "no matrix": (
        {"optim": "cwd_muon", "config_overrides": "num_hidden_layers=0"},
        "--optim cwd_muon: .*no",
    ),
    "ours alone": ({"optim": "sgd", "cwd_not_finite": "skip"}, "--cwd_not_finite skip has no effect on --optim sgd"),
    "schedule": ({"lr_scheduler_type": "cosin"}, "--lr_scheduler_type.*invalid choice: 'cosin'"),
    "broken JSON": ({"lr_scheduler_kwargs": "{bad"}, "--lr_scheduler_kwargs {bad is no JSON"),
    "no DeepSpeed file": ({"deepspeed": "nope.json"}, "wrong flags: .*nope.json"),
    "best model": ({"load_best_model_at_end": "true"}, "wrong flags: .*load_best_model_at_end requires"),
    "metric": ({"metric_for_best_model": "f1"}, "--metric_for_best_model f1: give one of loss, token_accuracy"),
    "reports": ({"report_to": "nothing"}, "the Trainer takes no such flags: nothing is not supported"),
    "output is a file": ({"output_dir": __file__}, "--output_dir .*: .*py is a file. Give a directory"),
    "output below a file": ({"output_dir": f"{__file__}/a/b"}, "--output_dir .*/a/b: .*py is a file. Give a directory"),
    "output nowhere": ({"output_dir": "/proc/nowhere"}, "--output_dir /proc/nowhere cannot be written: .*Give another"),
    "empty output": ({"output_dir": ""}, "--output_dir is empty: give a name"),
    "empty name": ({"config_name": ""}, "--config_name is empty: give a name"),
    "cache is a file": ({"cache_dir": __file__}, "--cache_dir .* is a file. Give a directory"),
    "directory for a file": ({"train_file": ROOT / "tests"}, "tests is a directory: give it by --dataset_name"),
    "file for a directory": ({"train_file": None, "dataset_name": __file__}, "is a file: give it by --train_file"),
    "no dataset": ({"train_file": None, "dataset_name": "/no/where"}, "--dataset_name /no/where cannot be read: "),
    "numbers": ({"text_column": "year"}, r"no texts in column 'year' \(row 0 is 17\d\d\)"),
    "images": (
        {"config_name": ROOT / "configs/models/vit-digits.json"},
        "a ViTConfig has no vocab_size",
    ),
    "shape": ({"config_overrides": "num_attention_heads=5"}, f"{OVERRIDES} num_attention_heads=5: .*not a multiple"),
    "negative vocabulary": ({"config_overrides": "vocab_size=-4"}, "the tokenizer has 512 tokens, the model only"),
}


@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_mistakes(workspace, flags, refused, changes, message):
    output = workspace / "mistakes"
    assert re.search(message, refused(pretrain, flags(**({"output_dir": output} | changes))))
    assert not list(output.glob("checkpoint-*"))


def test_traceback_is_shown_when_it_is_asked_for(flags, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrain.py", *flags(deepspeed="nope.json"), "--traceback"])
    with pytest.raises(UsageError, match="wrong flags") as error:
        command(pretrain.main)
    assert "nope.json" in str(error.value.__cause__)


ROWS = "\n".join(json.dumps({"text": f"Row {i} is here."}) for i in range(60)).encode()
BAD_FILES = {
    "empty.txt": (b"", "empty.txt is empty: give a file with text"),
    "empty.jsonl": (b"", "empty.jsonl is empty"),
    "blank.csv": (b"\xef\xbb\xbf\r\n \n", "blank.csv is empty"),
    "empty.txt.gz": (gzip.compress(b""), "empty.txt.gz is empty"),
    "binary.txt": (bytes(range(256)), "binary.txt is binary, and no text"),
    "image.jsonl": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "image.jsonl is binary"),
    "latin1.txt": ("one\ncaf\xe9\n".encode("latin1"), "line 2 is no UTF-8 .byte 0xe9.*iconv -f LATIN1"),
    "latin1.jsonl": ('{"text": "caf\xe9"}\n'.encode("latin1"), "line 1 is no UTF-8 .byte 0xe9"),
    "latin1.csv": ("text\ncaf\xe9\n".encode("latin1"), "line 2 is no UTF-8 .byte 0xe9"),
    "mark.txt": ("some text\n".encode("utf-16"), "mark.txt is UTF-16, and must be UTF-8: iconv -f UTF-16"),
    "nomark.txt": ("some text\n".encode("utf-16-be"), "nomark.txt is UTF-16"),
    "wide.csv": ("text\na\n".encode("utf-32"), "wide.csv is UTF-32"),
    "fake.jsonl.gz": (b"not gzip", "fake.jsonl.gz is named .gz, and is not compressed so"),
    "fake.txt.xz": (b"not xz", "fake.txt.xz is named .xz"),
    "fake.txt.bz2": (gzip.compress(b"text"), "fake.txt.bz2 is named .bz2"),
    "cut.jsonl.gz": (gzip.compress(ROWS)[:-9], "cut.jsonl.gz cannot be read: .*ended before.*Copy or make it again"),
    "cut.jsonl.xz": (lzma.compress(ROWS)[:60], "cut.jsonl.xz cannot be read: .*ended before"),
    "cut.jsonl.bz2": (bz2.compress(ROWS)[:80], "cut.jsonl.bz2 cannot be read: .*ended before"),
    "half.jsonl": (ROWS + b'\n{"text": "a', "half.jsonl cannot be read: line 61 is no JSON .*Mend or remove it"),
    "half.json": (b'[{"text": "a"}, {"te', "half.json cannot be read: it is no JSON"),
    "lists.jsonl": (b'["a"]\n["b"]\n', "lists.jsonl cannot be read: it is no JSON .Extra data"),
    "words.jsonl": (b'"a"\n"b"\n', 'words.jsonl cannot be read: line 1 is "a", where a JSON object belongs'),
    "numbers.jsonl": (b'{"text": 60}\n' * 60, "numbers.jsonl has no texts in column 'text' .row 0 is 60"),
    "numbers.csv": (b"text\n1\n2\n", "numbers.csv has no texts in column 'text' .row 0 is 1"),
    "mixed.jsonl": (b'{"text": "a"}\n{"text": 3}\n', "mixed.jsonl has no texts in column 'text' .row 1 is 3"),
    "nested.jsonl": (b'{"text": {"a": 1}}\n', "nested.jsonl has no texts in column 'text' .row 0 is {'a': 1}"),
    "nulls.jsonl": (b'{"text": null}\n', "nulls.jsonl has no texts in column 'text' .it is empty"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}\n', "twice.jsonl cannot be read: .*specified twice.*Mend the file"),
    "header.csv": (b"text\n", "header.csv cannot be read: it has a header and no rows"),
    "ragged.csv": (b"text,a\n1,2\n1,2,3,4\n", "ragged.csv cannot be read: .*Expected 2 fields in line 3, saw 4"),
    "fake.parquet": (b"no parquet at all", "fake.parquet is no Parquet file, or is cut off"),
    "a::b.jsonl": (ROWS, "'::' in a path stands between file systems"),
    "archive.tar.gz": (gzip.compress(b"a"), "unknown kind of file '.tar'"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("flag", ["train_file", "validation_file"])
def test_files_that_are_not_what_they_seem(name, flag, flags, refused, tmp_path):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    assert re.search(message, refused(pretrain, flags(output_dir=tmp_path / "out", **{flag: tmp_path / name})))
    assert not (tmp_path / "out").exists()


GOOD_FILES = {
    "crlf.txt": b"one\r\ntwo\r\n",
    "crlf.jsonl": b'{"text": "one"}\r\n{"text": "two"}\r\n',
    "crlf.csv": b"text\r\none\r\ntwo\r\n",
    "bom.txt": b"\xef\xbb\xbfone\ntwo\n",
    "bom.jsonl": b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n',
    "bom.json": b'\xef\xbb\xbf[{"text": "one"}, {"text": "two"}]',
    "bom.csv": b"\xef\xbb\xbftext\none\ntwo\n",
    "bom.txt.gz": gzip.compress(b"\xef\xbb\xbfone\ntwo\n"),
    "LOUD.TXT": b"one\ntwo\n",
    "LOUD.JSONL.XZ": lzma.compress(b'{"text": "one"}\n{"text": "two"}\n'),
    "we[i]rd *?.txt": b"one\ntwo\n",
    "a{b},#c%20.csv": b"text\none\ntwo\n",
    ".hidden.txt": b"one\ntwo\n",
    "gzip by its first bytes.txt": gzip.compress(b"one\ntwo\n"),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_files_that_are_fine(name, tmp_path):
    (tmp_path / name).write_bytes(GOOD_FILES[name])
    (tmp_path / "weird a.txt").write_text("another file, which the glob characters of a name would match")
    rows = load_file(str(tmp_path / name), sample_by="line", cache_dir=str(tmp_path / "cache"))
    assert rows["text"][:] == ["one", "two"]


def test_a_bom_and_glob_characters_train(flags, tmp_path):
    path = tmp_path / "[a]*.TXT"
    path.write_bytes(b"\xef\xbb\xbf" + b"We the people of the United States\r\n" * 200)
    metrics = pretrain.main(flags(train_file=path, output_dir=tmp_path / "out", max_steps=1, save_strategy="no"))
    assert metrics["train_tokens"] == 4 * 64


def test_too_little_data(workspace, flags, refused):
    short = workspace / "short.txt"
    short.write_text("We the people\n" * 3)
    assert "5 % of 3 documents is no document" in refused(pretrain, flags(train_file=short))
    message = "training documents hold fewer tokens than one block of 64: lower --block_size"
    assert message in refused(pretrain, flags(train_file=short, validation_file=short))


def test_overrides_belong_to_a_config(flags, refused):
    argv = flags(config_name=None, model_name_or_path="x", config_overrides="hidden_size=8")
    assert refused(pretrain, argv).startswith("--config_overrides changes a --config_name")


ARGUMENTS = {
    "broken.yaml": (b"a: [b", "broken.yaml cannot be read: .*expected ',' or ']'"),
    "broken.json": (b"{", "broken.json cannot be read: "),
    "binary.yaml": (b"\xff\xfe\0", "binary.yaml cannot be read: "),
    "list.yml": (b"- a", "list.yml: expected a mapping of argument names"),
    "unknown.yaml": (b"stepz: 3\noutput_dir: x", "unknown arguments: --stepz 3; see --help"),
    "value.yaml": (b"max_steps: many", "--max_steps.*invalid int value: 'many'"),
    "nowhere.yaml": (None, "nowhere.yaml: no such file of arguments"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_files_of_arguments(name, refused, tmp_path):
    content, message = ARGUMENTS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert re.search(message, refused(pretrain, [str(tmp_path / name)]))


def changed(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def cut(folder: Path, name: str, size: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:size])


MODELS = {
    "no configuration": (lambda f: (f / "config.json").unlink(), "the directory has no config.json"),
    "broken configuration": (lambda f: cut(f, "config.json", 20), "is no configuration: .*not a valid JSON file"),
    "unknown model": (lambda f: changed(f, model_type="nope"), "is no configuration: .*model type `nope`"),
    "text for a size": (lambda f: changed(f, hidden_size="big"), "'hidden_size' expected int, got str"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights that can be read"),
    "weights cut off": (lambda f: cut(f, "model.safetensors", 5000), "has no weights that can be read"),
    "empty weights": (lambda f: cut(f, "model.safetensors", 0), "has no weights that can be read"),
    "another size": (lambda f: changed(f, hidden_size=48), r"its model.*\[512, 32\], and should be \[512, 48\]"),
    "more layers": (lambda f: changed(f, num_hidden_layers=3), "of 29 it lacks 9, such as model.layers.2"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "tokenizer cut off": (lambda f: cut(f, "tokenizer.json", 500), "has no tokenizer that can be read"),
    "broken tokenizer": (lambda f: cut(f, "tokenizer_config.json", 9), "has no tokenizer that can be read"),
}


@pytest.mark.parametrize(("change", "message"), MODELS.values(), ids=MODELS)
def test_models_that_are_not_whole(change, message, model, flags, refused, tmp_path):
    change(shutil.copytree(model, tmp_path / "model"))
    options = {"config_name": None, "train_tokenizer_vocab_size": None, "model_name_or_path": tmp_path / "model"}
    line = refused(pretrain, flags(output_dir=tmp_path / "out", **options))
    assert re.search(message, line)
    assert str(tmp_path / "model") in line


def test_weights_of_another_model(model, flags, refused, tmp_path):
    """transformers would train on random weights, and only warn."""
    folder = shutil.copytree(model, tmp_path / "model")
    ViTForImageClassification(ViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "vit"
    )
    shutil.copy(tmp_path / "vit/model.safetensors", folder)
    options = {"config_name": None, "train_tokenizer_vocab_size": None, "model_name_or_path": folder}
    line = refused(pretrain, flags(output_dir=tmp_path / "out", **options))
    assert "has not the weights of a LlamaForCausalLM: of 20 it lacks 20" in line


def test_a_disk_that_is_full(flags, refused, tmp_path):
    """No file may grow beyond 60 kB, which weights and states do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for optim in ("cwd_adamw", "adamw_torch"):
        argv = flags(output_dir=tmp_path / optim, optim=optim)
        pretrain.main(flags(output_dir=tmp_path / "cached", optim=optim, max_steps=1, save_strategy="no"))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
            line = refused(pretrain, argv)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert line.startswith(f"--output_dir {tmp_path / optim} cannot be written: "), line
        assert "Make room, or give another --output_dir" in line
    signal.signal(signal.SIGXFSZ, handler)


def test_errors_of_the_disk_are_told_from_others():
    with pytest.raises(UsageError, match=r"--output_dir out cannot be written: .*No space left"), writing("out"):
        raise RuntimeError("checkpoint-3 could not be saved") from OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RuntimeError, match="a bug"), writing("out"):
        raise RuntimeError("a bug")
    with pytest.raises(torch.OutOfMemoryError), told("a model"):  # what auto_find_batch_size waits for
        raise torch.OutOfMemoryError("of memory")
