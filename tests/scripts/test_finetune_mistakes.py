"""finetune.py: what it refuses, and says."""

import json
import re
import shutil

import finetune
import pytest
from common.usage import UsageError
from material import TEMPLATE, assistant, user

ERRORS = {
    "no model": ({"model_name_or_path": None}, "no model: give --model_name_or_path"),
    "no data": ({"train_file": None}, "no data.*--dataset_name and --train_file"),
    "no file": ({"train_file": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    "no held-out file": ({"validation_file": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    "no text field": ({"dataset_text_field": "body"}, "'body' in the training data; .*prompt, completion"),
    "too few to hold out": ({"validation_split_percentage": 1}, "1 % of 40 documents is no document"),
    "LoRA's flags alone": ({"lora_r": 4, "use_dora": "true"}, "--lora_r and --use_dora given without --use_peft"),
    "quantised without LoRA": ({"load_in_4bit": "true"}, "--load_in_4bit given without --use_peft"),
    "rank": ({"use_peft": "true", "lora_r": 0}, "--lora_r 0: the rank"),
    "long rows": ({"max_length": 128}, "--max_length 128: the model has 64 positions"),
    "no template": ({"chat_template_path": "nowhere.jinja"}, "nowhere.jinja: no such file"),
    "rank of dropout": ({"use_peft": "true", "lora_dropout": 2}, "--lora_dropout 2.0: give a number from 0"),
    "length": ({"max_length": 0}, "--max_length 0: give 2 or more"),
    "no rows": ({"max_train_samples": 0}, "--max_train_samples 0: give 1 or more"),
    "no batch": ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: give 1 or more"),
    "optimizer's option": ({"optim_args": "foo=1"}, "--optim_args: cwd_adamw has no option 'foo'"),
    "no end": ({"eos_token": "<end>"}, "--eos_token <end>: the tokenizer of .* has no such token"),
    "metric": ({"metric_for_best_model": "f1"}, "--metric_for_best_model f1: give one of loss, runtime"),
    "output is a file": ({"output_dir": __file__}, "--output_dir .*py is a file. Give a directory"),
    "no model there": (
        {"model_name_or_path": "/no/where"},
        "--model_name_or_path /no/where: no such file",
    ),
    "no Hub id": ({"model_name_or_path": "nowhere"}, "--model_name_or_path nowhere is no configuration"),
    "nothing to resume": ({"resume_from_checkpoint": "true"}, "no checkpoint in"),
    "unknown flag": ({"lora_rank": 3}, "--lora_rank 3"),
}


@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_mistakes(arguments, monkeypatch, refused, tmp_path, changes, message):
    monkeypatch.setattr(finetune, "load_model", None)  # so that the model cannot have been loaded
    assert re.search(message, refused(finetune, arguments(**({"output_dir": tmp_path} | changes))))


ROWS = {
    "no format": ([{"year": 1790, "body": "x"}], "columns year, body,.*no format.*prompt and completion; text"),
    "no completion": ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "row 1: 'completion' is 'None'.* a text"),
    "mixed": ([{"prompt": "a", "completion": [user("b")]}], "row 0: 'completion' is .*where a text belongs"),
    "empty chat": ([{"messages": [user("a")]}, {"messages": []}], r"row 1: 'messages' is '\[\]'.*'role' and 'content'"),
    "no role": ([{"messages": [{"content": "a"}]}], "row 0: 'messages' is .*'role' and 'content'"),
    "number": ([{"text": 3}], "row 0: 'text' is '3', where a text belongs"),
    "blank": ([{"text": " "}], "the training data has no rows"),
}


@pytest.mark.parametrize(("rows", "message"), ROWS.values(), ids=ROWS)
def test_rows_of_no_format(arguments, tmp_path, rows, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(UsageError, match=message):
        finetune.main(arguments(train_file=path, output_dir=tmp_path))


def test_held_out_rows_of_another_format(arguments, workspace, tmp_path):
    argv = arguments(validation_file=workspace / "docs.jsonl", output_dir=tmp_path)
    with pytest.raises(UsageError, match=r"held-out data \(text\) has another format .*\(prompt and completion\)"):
        finetune.main(argv)


def test_tokenizers_that_do_not_serve(arguments, model, tmp_path):
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": [user("a"), assistant("b")]})] * 10))
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    argv = arguments(model_name_or_path=bare, train_file=tmp_path / "chats.jsonl", output_dir=tmp_path / "out")
    with pytest.raises(UsageError, match="no chat template: give --chat_template_path"):
        finetune.main(argv)
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    finetune.main([*argv, "--chat_template_path", str(tmp_path / "own.jinja"), "--max_steps", "1"])
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    with pytest.raises(UsageError, match=r"no EOS token.*give --eos_token"):
        finetune.main(arguments(model_name_or_path=bare, output_dir=tmp_path / "out"))
    with pytest.raises(UsageError, match="no training row has a completion within --max_length 2"):
        finetune.main(arguments(max_length=2, output_dir=tmp_path / "out"))


def test_files_are_looked_at(arguments, refused, tmp_path):
    for name, content, message in (
        ("a.jsonl", '{"text": "caf\xe9"}'.encode("latin1"), "line 1 is no UTF-8"),
        ("b.jsonl.gz", b"no gzip", "is named .gz, and is not compressed so"),
        ("c.jsonl", b"", "c.jsonl is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        assert message in refused(finetune, arguments(train_file=tmp_path / name, output_dir=tmp_path / "out"))


def test_weights_that_are_not_the_model_s(arguments, model, refused, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    argv = arguments(model_name_or_path=folder, output_dir=tmp_path / "out")
    assert "of 29 it lacks 9, such as model.layers.2." in refused(finetune, argv)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999])
    assert f"{folder} has no weights that can be read: " in refused(finetune, argv)
