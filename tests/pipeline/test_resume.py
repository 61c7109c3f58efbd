"""Every decision of `plan`, from facts alone."""

from __future__ import annotations

import pytest
from store_toys import chain, toy

from pipeline.difference import Difference, Nearest
from pipeline.resume import Action, Facts, Refuse, Resume, Reuse, Run, Wait, needed, plan
from pipeline.stage import Stage

TEACHER, DISTILL, EVALUATE = chain()
STAGES = [TEACHER, DISTILL, EVALUATE]
DONE = Facts(artifact="ok")
HELD = Facts(lease="held", holder="process 12 on host", attempt=2)


def decide(facts: dict[Stage, Facts], **options: object) -> list[Action]:
    return plan(STAGES, {stage.identity: known for stage, known in facts.items()}, **options)  # type: ignore[arg-type]


def only(facts: Facts, **options: object) -> Action:
    """The action for one stage whose inputs are there."""
    actions = decide({TEACHER: DONE, DISTILL: facts}, **options)
    return next(action for action in actions if action.stage == DISTILL)


def test_on_an_empty_store_everything_runs_each_after_its_inputs():
    assert decide({}) == [
        Run(TEACHER, "no artifact"),
        Run(DISTILL, "no artifact", after=("teacher",)),
        Run(EVALUATE, "no artifact", after=("distill",)),
    ]


def test_a_finished_target_needs_nothing_else():
    assert decide({EVALUATE: DONE}) == [Reuse(EVALUATE, "its artifact is there")]


def test_only_the_missing_and_what_it_reads_is_planned():
    assert decide({DISTILL: DONE}) == [Reuse(DISTILL, "its artifact is there"), Run(EVALUATE, "no artifact")]


def test_a_target_in_another_process_hands_needs_none_of_its_inputs_from_us():
    assert decide({EVALUATE: HELD}) == [Wait(EVALUATE, "process 12 on host is building it (attempt 2)")]


def test_a_plan_says_when_a_builder_that_seems_to_be_dead_is_replaced():
    facts = Facts(lease="held", holder="process 12 on host (silent for 60 min)", attempt=2, silent=True)
    assert decide({EVALUATE: facts}) == [
        Wait(
            EVALUATE,
            "process 12 on host (silent for 60 min) was building it (attempt 2); "
            "it is taken over after 90 s without a sign of life",
        )
    ]


def test_what_depends_on_another_process_work_waits_for_it_by_name():
    assert decide({TEACHER: HELD}) == [
        Wait(TEACHER, "process 12 on host is building it (attempt 2)"),
        Wait(DISTILL, "waits for: teacher"),
        Wait(EVALUATE, "waits for: distill"),
    ]


def test_the_reason_to_run_names_the_nearest_artifact_and_what_differs():
    nearest = Nearest("distill/xyz_ab12", (Difference("config.loss.kv", "3.0", "0.0"),))
    assert str(only(Facts(nearest=nearest))) == (
        f"run {DISTILL}: no artifact; nearest is distill/xyz_ab12, which differs in config.loss.kv: 3.0 there, 0.0 here"
    )


def test_a_failure_before_this_run_is_tried_again_and_mentioned():
    failed = Facts(attempt=2, outcome="failed", error="ValueError: the loss is NaN")
    again = Run(DISTILL, "no artifact; attempt 2 failed: ValueError: the loss is NaN")
    assert only(failed, before={DISTILL.identity: 2}) == only(failed) == again


def test_a_failure_since_this_run_began_is_final():
    failed = Facts(attempt=2, outcome="failed", error="ValueError: no", log="/store/log.txt")
    action = only(failed, before={DISTILL.identity: 1})
    assert action == Refuse(DISTILL, "attempt 2 failed: ValueError: no (/store/log.txt)", "failed")


def test_a_step_checkpoint_is_resumed_from_and_the_reason_tells_its_history():
    failed = Facts(checkpoint=200, attempt=2, outcome="failed", error="OutOfMemoryError: 2 GB")
    assert only(failed) == Resume(DISTILL, "from step checkpoint 200 of attempt 2 which failed: OutOfMemoryError: 2 GB")
    killed = Facts(checkpoint=40, lease="dead", attempt=1, outcome="interrupted", error="process 12 on host is gone")
    assert only(killed) == Resume(
        DISTILL, "from step checkpoint 40 of attempt 1 which was interrupted: process 12 on host is gone"
    )


def test_an_interrupted_attempt_without_a_checkpoint_runs_from_the_start():
    killed = Facts(lease="dead", attempt=1, outcome="interrupted", error="process 12 on host is gone")
    assert only(killed) == Run(DISTILL, "no artifact; attempt 1 was interrupted: process 12 on host is gone")


def test_a_payload_that_the_user_removed_is_built_again():
    assert only(Facts(attempt=1, outcome="done")) == Run(
        DISTILL, "no artifact; attempt 1, whose payload was removed since"
    )


def test_what_the_scheduler_stopped_stays_stopped_until_it_is_continued():
    stopped = Facts(checkpoint=100, attempt=1, outcome="stopped", stopped="stopped at step 100")
    assert only(stopped) == Refuse(
        DISTILL, "stopped at step 100; `overfill resume --continue-stopped` continues it", "stopped"
    )
    assert only(stopped, continue_stopped=True) == Resume(
        DISTILL, "from step checkpoint 100 of attempt 1: stopped at step 100"
    )


def test_an_altered_artifact_is_built_again_with_its_problem_as_the_reason_before_what_reads_it():
    altered = Facts(artifact="altered", problem="/store/distill/xyz: altered: a.bin is missing", outcome="done")
    assert decide({TEACHER: DONE, DISTILL: altered}) == [
        Reuse(TEACHER, "its artifact is there"),
        Run(DISTILL, "it is set aside and built again: /store/distill/xyz: altered: a.bin is missing"),
        Run(EVALUATE, "no artifact", after=("distill",)),
    ]


def test_an_altered_artifact_that_another_process_builds_again_is_waited_for():
    assert only(Facts(artifact="altered", problem="x", lease="held", holder="process 12 on host", attempt=2)) == Wait(
        DISTILL, "process 12 on host is building it (attempt 2)"
    )


def test_an_artifact_that_is_there_is_used_whatever_its_attempts_say():
    assert only(Facts(artifact="ok", lease="held", outcome="failed", stopped="x")).kind == "reuse"


def test_an_input_read_under_two_names_is_named_once():
    both = toy("compare", {"a": TEACHER, "b": TEACHER})
    assert plan([both], {})[1] == Run(both, "no artifact", after=("teacher",))


def test_of_two_inputs_the_one_that_waits_decides():
    other = toy("data")
    both = toy("compare", {"a": TEACHER, "b": other})
    actions = {action.stage: action for action in plan([both], {TEACHER.identity: HELD})}
    assert actions[both] == Wait(both, "waits for: teacher")
    assert actions[other] == Run(other, "no artifact")


def test_targets_are_the_stages_nobody_reads_unless_they_are_named():
    assert [action.stage for action in decide({TEACHER: DONE}, targets=[DISTILL])] == [TEACHER, DISTILL]
    assert [action.stage for action in decide({EVALUATE: DONE}, targets=[DISTILL, EVALUATE])] == STAGES


def test_inputs_that_were_not_listed_are_planned_all_the_same():
    assert [action.stage for action in plan([EVALUATE], {})] == STAGES
    assert needed([EVALUATE], {}) == STAGES


def test_cells_share_their_upstream_stages():
    other = toy("evaluate", {"student": DISTILL}, samples=16)
    assert [action.stage for action in plan([*STAGES, TEACHER, DISTILL, other], {})] == [*STAGES, other]


@pytest.mark.parametrize("facts", [DONE, HELD, Facts(artifact="altered"), Facts(), Facts(checkpoint=1, attempt=1)])
def test_an_action_reads_as_a_line(facts: Facts):
    action = only(facts)
    assert str(action) == f"{action.kind} distill/{DISTILL.folder_name}: {action.reason}"
    assert "\n" not in str(action)
