"""What the benchmark ``unavailability`` measures, from commit records alone."""

from __future__ import annotations

import pytest

from benchmarks.unavailability import CASES, Commit, gap_s, main


def test_a_task_is_away_from_the_old_owner_s_last_commit_to_the_new_one_s_first_with_records() -> None:
    log = [Commit(1_000, 4, 10), Commit(1_200, 4, 20)]
    assert gap_s(log, 4) is None
    log.append(Commit(3_000, 5, 20))  # a start commits its incarnation, before it reads anything
    assert gap_s(log, 4) is None
    log += [Commit(3_500, 5, 30), Commit(3_700, 5, 40)]
    assert gap_s(log, 4) == 2.3


def test_a_start_that_broke_off_in_between_is_part_of_it() -> None:
    log = [Commit(1_000, 4, 10), Commit(2_000, 5, 10), Commit(4_000, 6, 10), Commit(4_100, 6, 11)]
    assert gap_s(log, 4) == 3.1


def test_both_endings_are_measured_with_and_without_a_standby_and_as_static_member() -> None:
    assert len({(case.ending, case.standby_replicas, case.static) for case in CASES}) == len(CASES) == 6


def test_it_needs_a_broker(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--transport", "embedded"])
    assert "embedded" in capsys.readouterr().err
