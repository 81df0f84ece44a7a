# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
import re
import subprocess
import sys
from importlib import resources

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.demo.corpora import grammar
from nemo_mtbi.io.seeds import stable_rng
from nemo_mtbi.metrics.scorers import SCORERS
from nemo_mtbi.targets.tasks import Task, TaskPool, draw_prompt, draw_tasks

POOL = {
    "name": "mini",
    "tasks": [
        {"name": "say", "scoring": "wer", "split": "train", "prompts": {"train": ["say it"], "heldout": ["again"]}},
        {"name": "free", "scoring": "f1", "split": "train", "prompts": {"train": [""]}, "max_new_tokens": 12},
        {"name": "end", "scoring": "exact", "split": "heldout", "prompts": {"train": ["last?", "end?"]}},
    ],
}


@pytest.fixture(scope="module")
def demo() -> TaskPool:
    with resources.as_file(resources.files("nemo_mtbi") / "assets" / "demo" / "tasks.yaml") as path:
        return TaskPool.from_yaml(path)


def test_pools_of_every_editor(tmp_path):
    path = tmp_path / "mini.yaml"
    odd = {**POOL, "tasks": [{**POOL["tasks"][0], "prompts": {"train": ["où\u2028ça"]}}]}
    text = yaml.safe_dump(odd, allow_unicode=True)
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert TaskPool.from_yaml(path) == TaskPool.from_dict(odd)
    for content, message in ((text.encode("latin-1", "replace"), "not UTF-8"), (text.encode("utf-16"), "UTF-16")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read the task pool .*mini.yaml is {message}"):
            TaskPool.from_yaml(path)
    with pytest.raises(ValueError, match="cannot read the task pool .* is a folder"):
        TaskPool.from_yaml(tmp_path)


def test_reads_a_pool(tmp_path):
    path = tmp_path / "mini.yaml"
    path.write_text(yaml.safe_dump(POOL))
    pool = TaskPool.from_yaml(path)
    assert pool == TaskPool.from_dict(POOL)
    assert pool["say"] == Task("say", "wer", False, ("say it",), ("again",))
    assert pool["free"] == Task("free", "f1", False, ("",), (), 12)
    assert [t.name for t in pool.train] == ["say", "free"]
    assert [t.name for t in pool.heldout] == ["end"]
    assert pickle.loads(pickle.dumps(pool)) == pool
    assert [t.name for t in pool.subset(["end", "say"]).tasks] == ["say", "end"]


def broken(task: int, **changes) -> dict:
    data = copy.deepcopy(POOL)
    data["tasks"][task].update(changes)
    return data


@pytest.mark.parametrize(
    "data, parts",
    [
        (broken(0, scoring="bleu"), ["task 'say'", "scoring is 'bleu'", *SCORERS]),
        (broken(0, scoring=["wer"]), ["task 'say'", "scoring is ['wer']", "one of wer"]),
        (broken(1, name="say"), ["duplicate task name 'say'", "rename or remove"]),
        (broken(0, name=3), ["non-empty string", "3"]),
        (broken(0, weight=2), ["task 'say'", "unknown key 'weight'", "max_new_tokens"]),
        (broken(0, split="test"), ["task 'say'", "split is 'test'", "train or heldout"]),
        (broken(0, prompts={"heldout": ["x"]}), ["task 'say'", "no train prompt", "prompts.train"]),
        (broken(0, prompts={"train": []}), ["task 'say'", "no train prompt"]),
        (broken(0, prompts={"train": ["a"], "dev": ["b"]}), ["task 'say'", "unknown key 'dev'", "train, heldout"]),
        (broken(0, prompts={"train": ["a"], "heldout": ["a"]}), ["task 'say'", "'a' stands twice", "remove"]),
        (broken(0, prompts={"train": ["a", "a"]}), ["task 'say'", "'a' stands twice"]),
        (broken(0, prompts={"train": [True]}), ["task 'say'", "True is not a string", "quotes"]),
        (broken(0, prompts={"train": "say it"}), ["task 'say'", "prompts.train must be a list"]),
        (broken(0, prompts=["say it"]), ["task 'say', prompts", "must be a mapping"]),
        (broken(0, max_new_tokens=0), ["task 'say'", "max_new_tokens"]),
        (
            {"tasks": [{"name": "x", "split": "train", "prompts": {"train": ["a"]}}]},
            ["task 'x'", "'scoring' is missing"],
        ),
        ({"tasks": ["say"]}, ["task number 1", "must be a mapping"]),
        ({"tasks": {}}, ["'tasks' must be a list"]),
        ({"tasks": []}, ["has no task"]),
        ({"name": "x"}, ["key 'tasks' is missing"]),
        ({**POOL, "task": []}, ["unknown key 'task'", "name, tasks"]),
        (None, ["must be a mapping"]),
    ],
)
def test_an_illegal_pool_is_refused_with_the_remedy(tmp_path, data, parts):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError) as err:
        TaskPool.from_yaml(path)
    for part in [str(path), *parts]:
        assert part in str(err.value)


def test_missing_broken_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml: cannot read the task pool"):
        TaskPool.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("tasks: [a, {b")
    with pytest.raises(ValueError, match=r"broken\.yaml: not valid YAML"):
        TaskPool.from_yaml(tmp_path / "broken.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"binary\.yaml: cannot read the task pool"):
        TaskPool.from_yaml(tmp_path / "binary.yaml")


def test_unknown_names_are_refused_with_the_known_ones():
    pool = TaskPool.from_dict(POOL)
    with pytest.raises(KeyError, match="it has: say, free, end"):
        pool["sing"]
    with pytest.raises(ValueError, match="no task sing in task pool 'mini'; it has: say, free, end"):
        pool.subset(["say", "sing"])
    with pytest.raises(ValueError, match="not the string 'say'"):
        pool.subset("say")


def test_fingerprint_follows_the_content():
    pool = TaskPool.from_dict(POOL)
    assert re.fullmatch(r"[0-9a-f]{64}", pool.fingerprint())
    assert TaskPool.from_dict({**POOL, "name": "other"}).fingerprint() == pool.fingerprint()
    changed = [
        broken(0, name="tell"),
        broken(0, scoring="exact"),
        broken(0, split="heldout"),
        broken(0, prompts={"train": ["say it", "again"]}),
        broken(0, prompts={"train": ["say it"]}),
        broken(0, max_new_tokens=5),
        {"tasks": POOL["tasks"][::-1]},
    ]
    prints = [TaskPool.from_dict(data).fingerprint() for data in changed]
    assert len({pool.fingerprint(), *prints}) == 1 + len(changed)


@given(st.integers(0, 30), st.integers(0, 5), st.text())
def test_draws_are_distinct_and_pure(k, epoch, cut_id):
    pool_tasks = tuple(Task(f"t{i}", "exact", False, (f"p{i}",)) for i in range(20))
    drawn = draw_tasks(pool_tasks, k, 1, epoch, cut_id)
    assert len({t.name for t in drawn}) == len(drawn) == min(k, 20)
    assert drawn == draw_tasks(pool_tasks, k, 1, epoch, cut_id)
    if k >= 20:
        assert drawn == list(pool_tasks)


def test_draws_are_the_same_in_another_process_with_another_hash_seed():
    code = (
        "from nemo_mtbi.targets.tasks import draw_prompt, stable_rng\n"
        "print([stable_rng(1, e, 'cut', None, ('a', 2.5)).random() for e in range(3)], "
        "[draw_prompt('abcdef', e, 'cut') for e in range(9)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = [stable_rng(1, e, "cut", None, ("a", 2.5)).random() for e in range(3)]
    assert outputs == {f"{here} {[draw_prompt('abcdef', e, 'cut') for e in range(9)]}\n"}


def test_each_part_of_the_key_counts():
    keys = [(1, 2, "a"), (1, 2, "b"), (1, 3, "a"), (2, 2, "a"), ("1", 2, "a"), (12, "a"), (1, (2, "a"))]
    assert len({stable_rng(*key).random() for key in keys}) == len(keys)


def test_draws_are_about_uniform():
    pool_tasks = tuple(Task(f"t{i}", "exact", False, (f"p{i}",)) for i in range(10))
    hits = dict.fromkeys((t.name for t in pool_tasks), 0)
    for cut in range(2000):
        for task in draw_tasks(pool_tasks, 3, 0, 0, f"cut{cut}"):
            hits[task.name] += 1
    assert all(500 < n < 700 for n in hits.values()), hits
    prompts = [draw_prompt("abcd", cut) for cut in range(2000)]
    assert all(400 < prompts.count(p) < 600 for p in "abcd")


def test_illegal_draws_are_refused():
    with pytest.raises(ValueError, match="no prompt to draw from"):
        draw_prompt((), 1)
    with pytest.raises(ValueError, match="≥ 0"):
        draw_tasks((), -1, 1)
    with pytest.raises(ValueError, match="no stable text form; make it"):
        stable_rng(1, object())
    with pytest.raises(ValueError, match="type list"):
        stable_rng((1, [2]))


def test_demo_pool_and_answers_name_the_same_tasks(demo):
    assert [t.name for t in demo.tasks] == list(grammar.ANSWERS)
    assert len(demo.train) == 17
    assert [t.name for t in demo.heldout] == "last reverse spell bullets digits size title second ending".split()


def test_demo_pool_has_enough_wordings_and_none_is_shared(demo):
    assert demo["chat"].prompts == ("",) and demo["chat"].heldout_prompts == ()
    seen: dict[str, str] = {}
    for task in demo.tasks:
        if task.name != "chat":
            assert len(task.prompts) >= 4 and len(task.heldout_prompts) >= 2, task.name
            assert len(task.prompts + task.heldout_prompts) >= 6, task.name
        for prompt in task.prompts + task.heldout_prompts:
            assert re.fullmatch(r"[a-z ?]*", prompt) and prompt == " ".join(prompt.split()), prompt
            key = prompt.replace("?", "")
            assert key not in seen, f"{prompt!r} stands in {seen.get(key)} and {task.name}"
            seen[key] = task.name


def test_demo_pool_uses_every_scoring_kind(demo):
    assert {t.scoring for t in demo.tasks} == set(SCORERS) - {"cer"}  # English has spaces
