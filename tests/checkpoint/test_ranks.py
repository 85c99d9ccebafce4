"""Several ranks: a disk for each node, an error on one rank, and the plain Trainer's manifests."""

import json

import pytest

from tests.support.forking import fork
from tests.support.launching import ROOT, launch


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch("-m", "tests.checkpoint.rank_cases", folder, cwd=ROOT, start=fork)
    return json.loads((folder / "results.json").read_text())


def test_each_node_has_a_manifest_of_what_is_on_its_disk(results):
    for node, saved in enumerate(results["apart"]):
        assert [*saved] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
        for files in saved.values():
            assert f"rng_state_{node}.pth" in files
            assert f"rng_state_{1 - node}.pth" not in files
            assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= {*files}


def test_a_node_without_the_weights_is_refused(results):
    codes, log = results["as it is"]
    assert codes == [1, 1]
    assert "checkpoint-1 could not be saved in " in log
    assert (
        "on this node it has no weights (model*.safetensors, pytorch_model* ...). Each node has its own disk here"
        in log
    )


def test_nodes_resume_from_the_newest_checkpoint_that_is_whole_on_all(results):
    assert results["resumed apart"]
    assert "checkpoint-1 is what was saved at step 1" in results["log"]
    assert "checkpoint-2 is not what was saved: scheduler.pt has 5 bytes instead of" in results["log"]


def test_an_error_of_one_rank_is_an_error_of_all(results):
    first, second = results["failing"]
    assert "checkpoint-2 could not be saved in " in first
    assert "RuntimeError: rank 1: OSError: [Errno 5] Input/output error" in first
    assert "OSError: [Errno 5] Input/output error" in second
    assert results["kept"] == ["checkpoint-1"]


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_the_plain_trainer_s_manifests_name_the_files_of_all_ranks(results, layout):
    saved = results[f"plain-{layout}"]
    assert [*saved] == ["checkpoint-2", "checkpoint-3"]
    for files in saved.values():
        assert {"rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", "trainer_state.json"} <= {*files}
