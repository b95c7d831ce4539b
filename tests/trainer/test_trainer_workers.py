"""Batches made ahead by workers and values read a step late: the same run as without, and nothing lost or unsaid."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.checkpoint import FOLDER, WEIGHTS_FILE
from crepa_trainer.data.sampler import ClipOrder, MicroBatches, Position, RankPositions, micro_batches
from crepa_trainer.families import TrainingFamily
from crepa_trainer.reporting.trackers import read_metrics
from safetensors.torch import load_file
from training_runs import TinyClips, metrics_rows, tiny_config, tiny_settings, train, train_elsewhere

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = "trained/pytorch_lora_weights.safetensors"
# Accumulation, a schedule, an average, and a cutoff, from which on the teacher's side is not read.
STATEFUL = {
    "max_train_steps": 12,
    "gradient_accumulation_steps": 2,
    "batch_size": 2,
    "lr_scheduler": "cosine",
    "ema_decay": 0.8,
    "checkpoint_every": 4,
}
CUTOFF = {"crepa_cutoff_step": 9, "crepa_similarity_threshold": 0.99}


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without workers."""
    output = tmp_path_factory.mktemp("alone") / "run"
    train(tiny_settings(models, output, **STATEFUL, workers=0), tiny_config(models, **CUTOFF))
    return output


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics_rows(one) == metrics_rows(other)
    for name in (LORA, "trained/ema/pytorch_lora_weights.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    "workers", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_run_is_the_same_for_any_number_of_workers(models: Path, alone: Path, tmp_path: Path, workers: int) -> None:
    train(tiny_settings(models, tmp_path / "run", **STATEFUL, workers=workers), tiny_config(models, **CUTOFF))
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_workers_may_be_started_anew(models: Path, alone: Path, tmp_path: Path, start: str) -> None:
    settings = tiny_settings(models, tmp_path / "run", **STATEFUL, workers=2)
    process = train_elsewhere(settings, tiny_config(models, **CUTOFF), start=start)
    assert process.returncode == 0, process.stderr
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_two_ranks_with_workers_are_two_without(models: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        settings = tiny_settings(models, tmp_path / str(workers), **STATEFUL, workers=workers)
        process = train_elsewhere(settings, tiny_config(models, **CUTOFF), processes=2)
        assert process.returncode == 0, process.stderr
    assert_same_run(tmp_path / "2", tmp_path / "0")


@pytest.mark.parametrize(("before", "after"), [(2, 0), pytest.param(0, 2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_with_another_number_of_workers(
    models: Path, alone: Path, tmp_path: Path, before: int, after: int
) -> None:
    config, output = tiny_config(models, **CUTOFF), tmp_path / "run"
    # Of 24 micro-batches of two clips. A worker makes every second, at most four ahead of the training.
    kill_at = 18 if before else 36
    settings = tiny_settings(models, output, **STATEFUL, workers=before)
    killed = train_elsewhere(settings, config, kill_at=kill_at, kill_training=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 4 <= len(read_metrics(output / "metrics.jsonl")) < 12
    train(tiny_settings(models, output, **STATEFUL, workers=after, resume="latest"), config)
    assert_same_run(output, alone)


def clip_of_step(step: int) -> int:
    """The clip that a run of one a step takes there, for the first time in its first epoch."""
    (clip,) = ClipOrder([key.bucket for key in TinyClips().keys], batch_size=1).clips(Position(step, 0, 0))
    return clip


def last_line(process: Any) -> str:
    return str(process.stderr.splitlines()[-1])


def test_a_killed_worker_is_one_line_that_says_what_to_lower(models: Path, tmp_path: Path) -> None:
    settings = tiny_settings(models, tmp_path / "run", max_train_steps=40, workers=2, checkpoint_every=2)
    start = time.monotonic()
    process = train_elsewhere(settings, tiny_config(models), kill_at=8)
    assert process.returncode == 1
    assert "ChildProcessError: DataLoader worker (pid" in last_line(process)
    assert "workers = 2 needs more memory than there is: lower it, 0 reads clips in the training process" in last_line(
        process
    )
    # It ends by itself: torch asks every 5 seconds whether a worker is still there.
    assert time.monotonic() - start < 120
    # What was trained up to there is logged and can be gone on from.
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) >= 8
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert list((tmp_path / "run" / FOLDER).glob("step-*"))


def take_all(made: MicroBatches, workers: int) -> None:
    with micro_batches(made, RankPositions(1, rank=0), workers=workers, device=torch.device("cpu")) as given:
        for _ in given:
            pass


@pytest.mark.parametrize("kill_at", [0, 3])
def test_no_worker_outlives_an_error_that_is_kept(kill_at: int) -> None:
    # Kept by what pytest gives, as by an interpreter that ends: that would wait for them, and they for it.
    with pytest.raises(ChildProcessError, match=r"^DataLoader worker \(pid") as kept:
        take_all(batches(TinyClips(kill_at=kill_at)), workers=2)
    assert multiprocessing.active_children() == []
    assert kept.value.__cause__ is not None


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_a_worker_that_is_gone_while_it_sends_is_said_to_be(error: Exception) -> None:
    class Sent:
        def __reduce__(self) -> Any:
            return received, (error,)

    class Made(MicroBatches):
        def __getitem__(self, wanted: Any) -> Any:
            return Sent()

    made = Made(TinyClips(), batches().order, noise_level)
    with pytest.raises(ChildProcessError, match=r"^DataLoader worker \(pid unknown\) is gone .*: workers = 1 needs"):
        take_all(made, workers=1)
    assert multiprocessing.active_children() == []


def received(error: Exception) -> None:
    """What reading from a process that was killed raises, where the batch is read."""
    raise error


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_clip_is_the_same_error_from_a_worker(models: Path, tmp_path: Path, workers: int) -> None:
    settings = tiny_settings(models, tmp_path / "run", max_train_steps=20, workers=workers)
    broken = clip_of_step(5)
    with pytest.raises(ValueError, match=rf"^clip-{broken}.safetensors is damaged; start again$"):
        train(settings, tiny_config(models), TinyClips(broken=broken))
    # Of the steps before it nothing is lost.
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_full_shared_memory_is_an_error_and_not_silence(models: Path, tmp_path: Path) -> None:
    # No file may grow past this: a batch's text does, the log does not.
    process = train_elsewhere(
        tiny_settings(models, tmp_path / "run", workers=1, batch_size=4),
        tiny_config(models),
        file_size=3000,
        timeout=120,
    )
    assert process.returncode == 1
    assert "OSError: no shared memory for a batch (" in last_line(process)
    assert last_line(process).endswith("give it more, or lower workers")


def noise_level(draw: torch.Tensor, shape: Any) -> torch.Tensor:
    return draw.sigmoid()


def batches(clips: Any = None) -> MicroBatches:
    clips = clips or TinyClips()
    return MicroBatches(clips, ClipOrder([key.bucket for key in clips.keys], batch_size=2), noise_level)


def test_a_batch_is_a_function_of_its_position_alone() -> None:
    torch.manual_seed(1)
    made = batches()
    first = [made[Position(step, 0, 0), True] for step in (5, 6)]
    before = torch.get_rng_state()
    again = [pickle.loads(pickle.dumps(batches()))[Position(step, 0, 0), True] for step in (6, 5)]
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(first, reversed(again), strict=True):
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.time, other.time)
        assert one.clips.keys() == other.clips.keys() == {"latents", "text", "index"}
        assert all(torch.equal(one.clips[name], other.clips[name]) for name in one.clips)
        assert set(one.teacher) == {"features", "feature_grid"}
        assert other.teacher["feature_grid"] in ((2, 3), (3, 2))
    assert not torch.equal(first[0].noise, first[1].noise)


def test_batches_of_an_order_that_has_been_used_go_to_workers(models: Path) -> None:
    family = TrainingFamily.of(str(models / "wan"))
    clips = TinyClips()
    made = MicroBatches(clips, ClipOrder([key.bucket for key in clips.keys], batch_size=2), family.noise_level)
    first = made[Position(0, 0, 0), True]
    again = pickle.loads(pickle.dumps(made))[Position(0, 0, 0), True]
    assert torch.equal(first.time, again.time)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("every", [1, 4])
def test_a_loss_that_is_not_finite_is_named_and_in_no_checkpoint(
    models: Path, tmp_path: Path, workers: int, every: int
) -> None:
    settings = tiny_settings(models, tmp_path / "run", max_train_steps=20, workers=workers, checkpoint_every=every)
    with pytest.raises(FloatingPointError, match=r"^step 5: the loss is nan and grad_norm is nan; lower the learning"):
        train(settings, tiny_config(models), TinyClips(nan=clip_of_step(5)))
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    newest = sorted((tmp_path / "run" / FOLDER).iterdir())[-1]
    assert newest.name == f"step-{5 // every * every:08d}"
    assert all(tensor.isfinite().all() for tensor in load_file(newest / WEIGHTS_FILE).values())
    # What came before it can be gone on from, without the clip that is not finite.
    resumed = settings.model_copy(update={"resume": "latest", "max_train_steps": 7})
    assert len(train(resumed, tiny_config(models))) == 7


def test_a_loss_that_is_not_finite_is_found_before_a_validation(models: Path, tmp_path: Path) -> None:
    validation = {"validation_prompts": ["a video"], "validation_every": 6, "validation_steps": 1}
    settings = tiny_settings(models, tmp_path / "run", max_train_steps=20, **validation)
    with pytest.raises(FloatingPointError, match=r"^step 5: "):
        train(settings, tiny_config(models), TinyClips(nan=clip_of_step(5)))
    assert not (tmp_path / "run" / "validation").exists()


def test_a_loss_that_is_not_finite_in_the_last_step_is_not_exported(models: Path, tmp_path: Path) -> None:
    settings = tiny_settings(models, tmp_path / "run", max_train_steps=6)
    with pytest.raises(FloatingPointError, match=r"^step 5: "):
        train(settings, tiny_config(models), TinyClips(nan=clip_of_step(5)))
    assert not (tmp_path / "run" / "trained").exists()
    assert not (tmp_path / "run" / FOLDER).exists()


@pytest.mark.slow
def test_every_rank_stops_at_a_loss_that_is_not_finite_in_one(models: Path, tmp_path: Path) -> None:
    settings = tiny_settings(models, tmp_path / "run", max_train_steps=20, workers=2, checkpoint_every=3)
    process = train_elsewhere(settings, tiny_config(models), processes=2, nan=clip_of_step(7))
    assert process.returncode != 0
    # The second rank's clip of step 3: both have the mean, and neither waits for the other.
    assert process.stderr.count("FloatingPointError: step 3: the loss is nan and grad_norm is nan") == 2
    assert [path.name for path in (tmp_path / "run" / FOLDER).iterdir()] == ["step-00000003"]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_the_teachers_side_is_no_longer_made_once_it_is_not_wanted(workers: int) -> None:
    positions = RankPositions(1, rank=0)
    with micro_batches(batches(), positions, workers=workers, device=torch.device("cpu")) as made:
        taught = [bool(next(made).teacher)]
        positions.without_teacher = True
        # Two for each worker are under way, and one was asked for when the first was taken.
        taught += [bool(next(made).teacher) for _ in range(8)]
    under_way = 2 * workers
    assert taught == [True] * (1 + under_way) + [False] * (8 - under_way)


@pytest.mark.parametrize("workers", [0, 2])
def test_at_most_two_batches_a_worker_are_made_ahead(workers: int) -> None:
    class Counted(RankPositions):
        asked = 0

        def __iter__(self) -> Any:
            for each in super().__iter__():
                self.asked += 1
                yield each

    positions = Counted(1, rank=0)
    with micro_batches(batches(), positions, workers=workers, device=torch.device("cpu")) as made:
        for taken in range(1, 20):
            next(made)
            assert positions.asked - taken <= 2 * workers


def test_batches_for_a_gpu_are_in_pinned_memory() -> None:
    with micro_batches(batches(), RankPositions(1, 0), workers=0, device=torch.device("cuda")) as made:
        if torch.cuda.is_available():
            batch = next(made)
            tensors = [*batch.clips.values(), batch.teacher["features"], batch.noise, batch.time]
            assert all(tensor.is_pinned() for tensor in tensors)
        else:
            with pytest.warns(UserWarning, match="pin_memory"):
                next(made)
