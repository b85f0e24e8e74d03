"""Whether a run that has failed is begun again: decisions from plain values."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed import saved
from distributed.hosts import retries
from distributed.hosts.hangs import Hung
from distributed.hosts.retries import Lost, Retries, classify
from distributed.resources import Resources
from tasks.errors import RunFailed, UserError

LIMITS = {"lost": 3, "echo": 3, "hung": 3, "user": 1, "memory": 1}


class ActorDiedError(Exception):
    """Ray's."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("no such file"), "user"),
        (ValueError("the moon is full"), "user"),
        (RunFailed("the loss 'ce' is nan"), "training"),
        (Lost("rank 1 was killed by SIGKILL"), "lost"),
        (SystemExit(3), "lost"),
        (ActorDiedError("the actor died"), "lost"),
        (Hung("rank 1 hangs"), "hung"),
        (MemoryError(), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "memory"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), "echo"),
    ],
)
def test_a_failure_has_a_class_whether_a_rank_has_written_it_down_or_its_host_saw_it(tmp_path, error, kind):
    assert classify(None, error) == kind
    saved.write_failure(tmp_path, 1, error)
    assert classify(saved.failure(tmp_path), RuntimeError("a worker failed")) == kind


def test_lost_workers_are_replaced_so_often_before_the_run_gets_on():
    one = Retries(LIMITS)
    assert [one.next("lost", 120, "killed", 100) for _ in range(4)] == ["again", "again", "again", "give up"]


def test_failures_count_by_class():
    one = Retries(LIMITS)
    for _ in range(3):
        assert one.next("lost", 120, "killed", 100) == "again"
        assert one.next("hung", 120, "stands still", 100) == "again"
    assert one.next("lost", 120, "killed", 100) == "give up"
    assert one.next("hung", 120, "stands still", 100) == "give up"


def test_a_failure_is_forgiven_when_there_is_a_checkpoint_beyond_it():
    one = Retries(LIMITS)
    assert [one.next("lost", 120 + 50 * k, "killed", 100 + 50 * k) for k in range(9)] == ["again"] * 9


@pytest.mark.parametrize("kind", ["user", "memory"])
def test_what_the_task_raises_is_tried_again_once_and_only_from_a_checkpoint(kind):
    assert Retries(LIMITS).next(kind, 120, "moon") == "give up"
    one = Retries(LIMITS)
    assert one.next(kind, 120, "moon", 100) == "again"
    assert one.next(kind, 190, "sun", 150) == "give up", "once, even where it is another one and the run got on"


def test_an_echo_counts_as_the_lost_rank_that_it_tells_of():
    one = Retries(LIMITS)
    answers = [one.next(kind, 120, "gone", 100) for kind in ("lost", "echo", "lost", "echo")]
    assert answers == ["again", "again", "again", "give up"]
    echo = {"kind": "RuntimeError", "message": "gloo", "echo": True}
    assert classify(echo, ActorDiedError()) == "lost"
    assert classify(echo, RuntimeError()) == "echo"


def test_the_same_error_at_the_same_step_is_not_tried_again_even_by_another_driver():
    before = Retries(LIMITS)
    before.next("user", 120, "moon", 100)
    assert Retries({**LIMITS, "user": 9}, before.failed).next("user", 120, "moon", 100) == "give up"
    assert Retries({**LIMITS, "user": 9}, before.failed).next("user", 121, "moon", 100) == "again"


@pytest.mark.parametrize("kind", ["lost", "hung"])
def test_none_is_replaced_where_none_may_be(kind):
    limits = retries.limits(Resources(replace_lost=0, replace_hung=0))
    assert Retries(limits).next(kind, 120, "killed", 100) == "give up"


def test_a_loss_that_is_not_finite_is_never_tried_again():
    assert Retries(LIMITS).next("training", 120, "the loss is nan", 100) == "give up"


@given(st.lists(st.tuples(st.sampled_from(sorted(LIMITS)), st.integers(0, 5), st.sampled_from("ab")), max_size=40))
def test_a_run_that_does_not_get_on_ends_after_as_many_failures_as_there_are_replacements(failures):
    one = Retries(LIMITS)
    answers = [one.next(kind, step, message, 0) for kind, step, message in failures]
    for kind, limit in LIMITS.items():
        assert sum(a == "again" for a, (k, *_) in zip(answers, failures, strict=True) if k == kind) <= limit


# ---- with a run directory


def _run(tmp_path, *errors, checkpoint=100, resources=None, stopped=False):
    """Makes attempts that fail with the given errors, one after the other, then one that ends well."""
    if checkpoint is not None:
        (tmp_path / "checkpoints" / f"step-{checkpoint:08d}").mkdir(parents=True, exist_ok=True)
    coming = list(errors)

    def attempt() -> str:
        assert not (tmp_path / "failure.json").exists(), "the last attempt's failure is not this one's"
        if coming:
            error = coming.pop(0)
            saved.write_failure(tmp_path, 1, error)
            raise error
        return "done"

    return retries.persist(tmp_path, resources or Resources(), attempt, lambda: stopped)


def lost(step: int) -> Lost:
    error = Lost(f"rank 1 (process 7) was killed by SIGKILL at step {step}")
    error.step = step
    return error


def test_attempts_are_made_until_one_ends_well_and_all_is_written_down(tmp_path, caplog):
    assert _run(tmp_path, lost(120), lost(130)) == "done"
    assert [(one.kind, one.step, one.rank) for one in retries.read(tmp_path)] == [("lost", 120, 1), ("lost", 130, 1)]
    line = "rank 1 (process 7) was killed by SIGKILL at step 120: going on from step 100 (1 of 3)"
    assert line in caplog.messages
    assert line in (tmp_path / "log.txt").read_text()


def test_what_ends_a_run_is_raised_with_what_was_tried(tmp_path):
    with pytest.raises(Lost) as told:
        _run(tmp_path, *[lost(120)] * 2, resources=Resources(replace_lost=1))
    assert "begun again once" in told.value.__notes__[-1]
    assert "resources.replace_lost" in told.value.__notes__[-1]
    assert (tmp_path / "failure.json").exists()


@pytest.mark.parametrize("error", [UserError("no such file", "look"), RunFailed("the loss 'ce' is nan")])
def test_a_mistake_and_a_failed_training_end_at_once(tmp_path, error):
    with pytest.raises(type(error)):
        _run(tmp_path, error)
    assert len(retries.read(tmp_path)) == 1


def test_a_run_that_was_asked_to_stop_is_not_begun_again(tmp_path):
    with pytest.raises(Lost):
        _run(tmp_path, lost(120), stopped=True)


def test_a_run_that_is_asked_to_stop_between_two_attempts_makes_none_more(tmp_path, monkeypatch):
    monkeypatch.setattr(Retries, "pause", lambda one, checkpoint: 3.0)
    asked, attempts = threading.Event(), []

    def attempt() -> None:
        attempts.append(1)
        threading.Timer(0.3, asked.set).start()
        raise lost(120)

    with pytest.raises(Lost):
        retries.persist(tmp_path, Resources(), attempt, asked.is_set)
    assert len(attempts) == 1


def test_a_rank_that_told_of_an_older_step_than_its_checkpoint_failed_no_earlier_than_that(tmp_path):
    """A rank shows its step once a second: what is killed again and again would be forgiven each time."""
    with pytest.raises(Lost):
        _run(tmp_path, *[lost(3)] * 9)
    assert len(retries.read(tmp_path)) == 4


def test_a_driver_that_begins_again_knows_what_the_earlier_one_has_spent(tmp_path):
    with pytest.raises(Lost):
        _run(tmp_path, *[lost(120)] * 4)
    (tmp_path / "failure.json").unlink()
    with pytest.raises(Lost):
        _run(tmp_path, lost(120))
    (tmp_path / "failure.json").unlink()
    assert _run(tmp_path, lost(220), checkpoint=200) == "done", "the run got on"


def test_a_line_that_was_cut_off_is_passed_over(tmp_path):
    _run(tmp_path, lost(120), lost(130))
    path = tmp_path / retries.FILE
    path.write_bytes(path.read_bytes()[:-20])
    assert [one.step for one in retries.read(tmp_path)] == [120]
    _run(tmp_path, lost(140))
    assert [one.step for one in retries.read(tmp_path)] == [120, 140]
    assert set(json.loads(path.read_text().splitlines()[0])) == {"time", "kind", "step", "rank", "host", "message"}


def test_memory_that_runs_out_is_told_with_what_to_shrink():
    with pytest.raises(RuntimeError) as told, retries.hinting():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert "data.micro_batch_size" in told.value.__notes__[0]
    with pytest.raises(RuntimeError) as told, retries.hinting():
        raise RuntimeError("anything else")
    assert not hasattr(told.value, "__notes__")


def test_the_pauses_between_attempts_grow_and_stay_short():
    one, pauses = Retries(LIMITS), []
    for _ in range(12):
        one.next("lost", 120, "killed", 100)
        pauses.append(one.pause(100))
    assert pauses == sorted(pauses)
    assert pauses[0] < 1
    assert pauses[-1] == retries.LONGEST
    assert one.pause(121) < 1, "the run got on"
