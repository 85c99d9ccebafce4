"""In which layout a checkpoint of DeepSpeed was saved, and what a run in one process can take of it."""

import pytest

from hf_cwd.checkpoint import manifest
from hf_cwd.checkpoint.files import CheckpointError
from hf_cwd.checkpoint.saved_parallelism import saved_under


def of_deepspeed(checkpoint, *names):
    """Files as DeepSpeed names them, in the place of the Trainer's."""
    for name in ("optimizer.pt", "scheduler.pt", manifest.NAME):
        (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / "global_step2").mkdir(parents=True)
    (checkpoint / "latest").write_text("global_step2\n")
    for name in names:
        (checkpoint / "global_step2" / name).touch()


def test_a_checkpoint_of_deepspeed_gives_its_weights_to_a_run_with_fresh_states(train, out, said):
    """And to no other one."""
    train(max_steps=2)
    of_deepspeed(out / "checkpoint-2", *(f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)))
    words = (
        "was saved under DeepSpeed's ZeRO-1 or 2 on 2 ranks, and this run trains under one process or DDP. Resume it"
    )
    with pytest.raises(CheckpointError, match=words):
        train(str(out / "checkpoint-2"))
    reset = train(str(out / "checkpoint-2"), optim_args="on_rule_change=reset")
    assert reset.state.global_step == 4
    assert "begins with new states at step 2" in said()


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        ([], None),
        (["mp_rank_00_model_states.pt"], None),  # stage 0
        (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed's ZeRO-1 or 2 on 1 rank"),
        (
            [f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for rank in range(12) for kind in ("optim", "model")],
            "DeepSpeed's ZeRO-3 on 12 ranks",
        ),
    ],
)
def test_the_layout_of_deepspeed_s_files(tmp_path, names, layout):
    of_deepspeed(tmp_path, *names)
    assert saved_under(tmp_path) == layout
    (tmp_path / "latest").write_text("global_step9")
    assert saved_under(tmp_path) is None
