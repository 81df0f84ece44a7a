# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from dataclasses import replace

import pytest
import target_fakes as fakes
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.targets.plan import TargetPlan, plan_shard

CHAT, PLAN, POOL, make_cuts = fakes.CHAT, fakes.PLAN, fakes.POOL, fakes.make_cuts


def test_plan_is_a_pure_function_of_the_shard():
    cuts = list(make_cuts())
    requests, batches = plan_shard(cuts, PLAN, POOL, CHAT)
    assert (requests, batches) == plan_shard(list(make_cuts()), PLAN, POOL, CHAT)
    assert sorted(i for batch in batches for i in batch) == list(range(len(requests)))
    for batch in batches:
        longest = max(len(requests[i].layout) for i in batch)
        assert len(batch) == 1 or len(batch) * (longest + PLAN.max_new_tokens) <= PLAN.batch_tokens
    assert plan_shard(cuts, replace(PLAN, seed=8), POOL, CHAT) != (requests, batches)
    # what a cut is asked does not depend on its neighbors
    alone, _ = plan_shard(cuts[5:6], PLAN, POOL, CHAT)
    assert [(r.task, r.prompt) for r in alone] == [(r.task, r.prompt) for r in requests if r.cut == 5]


@given(
    tasks_per_cut=st.none() | st.integers(1, 6),
    prompts_per_task=st.integers(1, 4),
    split=st.sampled_from(["train", "all"]),
    seed=st.integers(0, 2**40),
    cut_id=st.text(),
)
def test_draws_are_distinct_and_legal(tasks_per_cut, prompts_per_task, split, seed, cut_id):
    plan = TargetPlan(tasks_per_cut=tasks_per_cut, prompts_per_task=prompts_per_task, split=split, seed=seed)
    tasks = plan.tasks(POOL)
    draws = plan.draws(cut_id, tasks)
    assert draws == plan.draws(cut_id, tasks)
    assert len(set(draws)) == len(draws)
    assert all(prompt in task.prompts and task in tasks for task, prompt in draws)
    per_task = Counter(task for task, _ in draws)
    assert len(per_task) == (len(tasks) if tasks_per_cut is None else min(tasks_per_cut, len(tasks)))
    assert all(count == min(prompts_per_task, len(task.prompts)) for task, count in per_task.items())


def test_some_tasks_are_always_asked():
    plan = TargetPlan(tasks_per_cut=2, always_tasks=("keys",))
    asked = [[task.name for task, _ in plan.draws(f"cut{n}", plan.tasks(POOL))] for n in range(40)]
    assert {tuple(names) for names in asked} == {("keys", "say"), ("keys", "first")}
    assert [task.name for task, _ in TargetPlan(always_tasks=["first"]).draws("cut", POOL.train)] == [
        "first",
        "say",
        "keys",
    ]
    with pytest.raises(ValueError, match="always_tasks names last, which .* choose among say, keys, first"):
        TargetPlan(always_tasks=("last",)).tasks(POOL)
    with pytest.raises(ValueError, match="always_tasks names 2 tasks, more than tasks_per_cut=1"):
        TargetPlan(tasks_per_cut=1, always_tasks=("say", "keys"))


@given(tasks_per_cut=st.none() | st.integers(1, 4), prompts_per_task=st.integers(1, 4))
def test_the_number_of_questions_is_known_before(tasks_per_cut, prompts_per_task):
    plan = TargetPlan(tasks_per_cut=tasks_per_cut, prompts_per_task=prompts_per_task, split="all")
    counts = [len(plan.draws(f"cut{n}", plan.tasks(POOL))) for n in range(40)]
    assert max(counts) <= plan.most_rows(POOL) <= sum(len(task.prompts) for task in POOL.tasks)
    assert prompts_per_task > 1 or set(counts) == {plan.most_rows(POOL)}


def test_splits_of_tasks_and_wordings():
    assert [task.name for task in TargetPlan().tasks(POOL)] == ["say", "keys", "first"]
    assert [task.name for task in TargetPlan(split="heldout").tasks(POOL)] == ["last"]
    assert TargetPlan(wordings="heldout").prompts(POOL["keys"]) == ("core",)
    assert TargetPlan(wordings="all").prompts(POOL["keys"]) == ("keywords", "what matters", "core")
    with pytest.raises(ValueError, match="'say' has no wording for wordings=heldout"):
        TargetPlan(wordings="heldout").tasks(POOL)
    with pytest.raises(ValueError, match="no task for split=heldout"):
        TargetPlan(split="heldout").tasks(POOL.subset(["say"]))


@pytest.mark.parametrize(
    "wrong", [{"wordings": "seen"}, {"split": "test"}, {"tasks_per_cut": 0}, {"prompts_per_task": None}]
)
def test_illegal_plan(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TargetPlan(**wrong)
