"""Checkpoints of a training: resumed, damaged, kept and refused."""

from __future__ import annotations

import pytest
import torch
from tiny_training import (
    PLAIN,
    Killed,
    equal,
    state_of,
    stream,
    tiny,
)

from sievit.models.training.checkpoints import (
    DamagedCheckpoint,
    checkpoint_files,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from sievit.models.training.loop import Checkpointing
from sievit.models.training.recipe import Recipe
from sievit.sparsify.finetune import finetune


def run(folder, model, steps=9, every=2, kill_at=None, **more):
    def killer(step, rate, terms, share):
        if step == kill_at:
            raise Killed

    return finetune(model, stream, steps=steps, recipe=PLAIN, listener=killer,
                    checkpointing=Checkpointing(folder, every, {"seed": 1} | more))  # fmt: skip


@pytest.mark.parametrize("kill_at", [0, 1, 2, 5, 8])
def test_a_killed_training_resumes_to_the_same_losses(tmp_path, kill_at):
    whole, cut = tiny(), tiny()
    wanted = run(tmp_path / "whole", whole)
    with pytest.raises(Killed):
        run(tmp_path / "cut", cut, kill_at=kill_at)
    again = tiny(seed=5)  # another start: everything must come from the checkpoint
    if kill_at < 2:
        again = tiny()
    got = run(tmp_path / "cut", again)
    assert got.losses == wanted.losses
    assert got.resumed_at == kill_at // 2 * 2
    assert got.steps == 9 - got.resumed_at
    assert equal(state_of(whole), state_of(again)) or kill_at >= 2
    trained = [name for name, _ in whole.named_parameters()]
    assert all(torch.equal(whole.get_parameter(n), again.get_parameter(n)) for n in trained)


def test_a_finished_training_is_not_done_again(tmp_path):
    model = tiny()
    first = run(tmp_path, model)
    again = run(tmp_path, model)
    assert again.losses == first.losses
    assert again.steps == 0


def test_the_average_is_kept_in_the_checkpoint(tmp_path):
    recipe = Recipe(**{**PLAIN.__dict__, "ema_decay": 0.9})
    models = []
    for name, kill_at in (("whole", None), ("cut", 5)):
        model = tiny()
        for kill in (kill_at, None)[kill_at is None :]:

            def killer(step, rate, terms, share, kill=kill):
                if step == kill:
                    raise Killed

            plan = Checkpointing(tmp_path / name, 2)
            try:
                finetune(model, stream, steps=8, recipe=recipe, listener=killer,
                         checkpointing=plan)  # fmt: skip
            except Killed:
                model = tiny()
        models.append(state_of(model))
    assert equal(*models)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(tmp_path, damage):
    wanted = run(tmp_path / "whole", tiny())
    with pytest.raises(Killed):
        run(tmp_path / "cut", tiny(), kill_at=5)
    newest = checkpoint_files(tmp_path / "cut")[-1]
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    newest.write_bytes(content[: {"cut": -1, "flipped": None, "empty": 0}[damage]])
    with pytest.raises(DamagedCheckpoint, match="checksum"):
        load_checkpoint(newest)
    with pytest.warns(UserWarning, match="the one before it is used"):
        got = run(tmp_path / "cut", tiny())
    assert got.resumed_at == 2
    assert got.losses == wanted.losses


def test_a_folder_of_damaged_checkpoints_is_said_not_restarted(tmp_path):
    save_checkpoint(tmp_path, 1, {"a": 1})
    checkpoint_files(tmp_path)[0].write_bytes(b"nonsense")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(DamagedCheckpoint, match="no checkpoint in"),
    ):
        newest_checkpoint(tmp_path)


def test_two_checkpoints_are_kept(tmp_path):
    for step in range(5):
        save_checkpoint(tmp_path, step, {"step": step})
    assert [path.name for path in checkpoint_files(tmp_path)] == [
        "step-00000003.pt",
        "step-00000004.pt",
    ]
    path, state = newest_checkpoint(tmp_path)
    assert state == {"step": 4}
    assert path.name == "step-00000004.pt"


def test_a_checkpoint_that_cannot_be_written_names_the_last_good_one(tmp_path, monkeypatch):
    good = save_checkpoint(tmp_path, 1, {"a": 1})

    def full(path, mode="r"):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="No space left") as error:
        save_checkpoint(tmp_path, 2, {"a": 2})
    monkeypatch.undo()
    assert str(good) in str(error.value)
    assert load_checkpoint(good) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == [good.name]


def test_a_resume_with_other_settings_says_which(tmp_path):
    run(tmp_path, tiny(), steps=4)
    with pytest.raises(ValueError, match=r"seed was 1, is 2; steps was 4, is 6"):
        run(tmp_path, tiny(), steps=6, seed=2)


def test_a_loss_that_is_not_finite_names_the_last_checkpoint(tmp_path):
    def spoiled(start):
        for index, (images, labels) in enumerate(stream(start), start):
            yield (images * float("nan") if index == 3 else images), labels

    with pytest.raises(FloatingPointError, match=r"nan at step 3, rate .*step-00000002\.pt"):
        finetune(tiny(), spoiled, steps=6, recipe=PLAIN,
                 checkpointing=Checkpointing(tmp_path, 2))  # fmt: skip
