"""Mixtures draw tasks by their closed-form shares, rows without favour, and the same again from the seed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from thawline.data.text.fewshot import few_shot
from thawline.data.text.multitask import SAMPLING, TaskSampler, mixture_weights
from thawline.data.text.rows import Example
from thawline.errors import ConfigError, DataError
from thawline.recipe.text import TextData
from thawline.training.text.rows import read_rows

SIZES = (40, 300, 1000)
TASKS = [task for task, size in enumerate(SIZES) for _ in range(size)]


@pytest.mark.parametrize(
    ("sampling", "fields", "shares"),
    [
        ("each", {}, [40, 300, 1000]),
        ("size", {}, [40, 300, 1000]),
        ("size", {"cap": 100}, [40, 100, 100]),
        ("temperature", {"temperature": 2.0}, [40**0.5, 300**0.5, 1000**0.5]),
        ("temperature", {"temperature": 2.0, "cap": 300}, [40**0.5, 300**0.5, 300**0.5]),
        ("equal", {}, [1, 1, 1]),
    ],
)
def test_tasks_come_as_often_as_the_closed_form_says(sampling, fields, shares) -> None:
    expected = np.array(shares) / sum(shares)
    np.testing.assert_allclose(mixture_weights(SIZES, sampling, **fields), expected)
    sampler = TaskSampler(TASKS, sampling, seed=3, **fields)
    tasks = np.array(TASKS)
    drawn = np.concatenate([tasks[sampler.draw(epoch)] for epoch in range(40)])
    found = np.bincount(drawn, minlength=3) / len(drawn)
    # Five standard deviations of a binomial share.
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / len(drawn))).all()


def test_a_small_temperature_neither_overflows_nor_divides_by_zero() -> None:
    np.testing.assert_allclose(mixture_weights(SIZES, "temperature", temperature=1e-3), [0, 0, 1])


def test_a_tasks_rows_are_all_used_before_one_comes_again() -> None:
    sampler = TaskSampler(TASKS, "equal", seed=1)
    order = sampler.draw(0)
    for task, size in enumerate(SIZES):
        times = np.bincount(order[np.array(TASKS)[order] == task], minlength=len(TASKS))
        times = times[np.array(TASKS) == task]
        assert len(times) == size
        assert times.max() - times.min() <= 1


def test_an_epoch_follows_from_seed_and_number_alone() -> None:
    sampler, again = (TaskSampler(TASKS, "temperature", temperature=2, seed=5) for _ in range(2))
    list(sampler)
    sampler.set_epoch(7)
    again.set_epoch(7)
    assert list(sampler) == list(again) == again.draw(7).tolist()
    assert again.draw(8).tolist() != again.draw(7).tolist()
    assert (
        TaskSampler(TASKS, "equal", seed=6).draw(0).tolist() != TaskSampler(TASKS, "equal").draw(0).tolist()
    )
    assert len(list(sampler)) == len(sampler) == sum(SIZES)


def test_batches_of_one_task_are_of_one_task() -> None:
    sampler = TaskSampler(TASKS, "equal", same_task=16)
    tasks = np.array(TASKS)[sampler.draw(0)]
    batches = [set(tasks[i : i + 16].tolist()) for i in range(0, len(tasks), 16)]
    assert all(len(batch) == 1 for batch in batches)
    assert set().union(*batches) == {0, 1, 2}


def test_a_capped_task_counts_up_to_its_cap_but_may_use_any_row() -> None:
    sampler = TaskSampler(TASKS, "size", cap=50)
    assert len(sampler) == 40 + 50 + 50
    rows = np.unique(np.concatenate([sampler.draw(epoch) for epoch in range(60)]))
    assert len(rows[rows >= 340]) > 900


def test_unknown_sampling_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match="Unknown sampling 'sizes'.*Did you mean 'size'"):
        mixture_weights(SIZES, "sizes")
    assert set(SAMPLING) == {"each", "size", "temperature", "equal"}


EXAMPLES = [
    Example(prompt=f"{task}{i}", completion="abc"[i % 3], task=task)
    for task in ("one", "two")
    for i in range(30)
]


def test_k_shots_per_task_and_per_class() -> None:
    per_task = few_shot(EXAMPLES, 6, seed=1)
    assert [sum(example.task == task for example in per_task) for task in ("one", "two")] == [6, 6]
    per_class = few_shot(EXAMPLES, 4, per="class", seed=1)
    counts = {(task, answer): 0 for task in ("one", "two") for answer in "abc"}
    for example in per_class:
        counts[example.task, example.answer] += 1
    assert set(counts.values()) == {4}
    assert len(set(map(id, per_class))) == 24


def test_shots_are_nested_and_do_not_depend_on_other_tasks() -> None:
    alone = few_shot([example for example in EXAMPLES if example.task == "two"], 5, seed=2)
    together = [example for example in few_shot(EXAMPLES, 5, seed=2) if example.task == "two"]
    assert alone == together
    few, more = ({example.prompt for example in few_shot(EXAMPLES, k, seed=2)} for k in (4, 16))
    assert few < more
    assert few_shot(EXAMPLES, 5, seed=2) != few_shot(EXAMPLES, 5, seed=3)


def test_too_few_examples_are_named() -> None:
    with pytest.raises(DataError, match="task 'one' has 30 examples to draw 31 shots from"):
        few_shot(EXAMPLES, 31)
    with pytest.raises(DataError, match="task 'one', class 'a', has 10 examples to draw 11"):
        few_shot(EXAMPLES, 11, per="class")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per", ["task", "class"])
def test_shots_are_never_held_out_rows(tmp_path, per, seed) -> None:
    lines = [
        json.dumps({"input": f"{task} {i}", "output": "ab"[i % 2], "task": task})
        for task in ("one", "two")
        for i in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data = TextData(path=str(tmp_path), shots=4, shots_per=per, eval_fraction=0.4)
    rows = read_rows(data, seed=seed)
    assert len(rows.train) == (8 if per == "task" else 16)
    assert len(rows.held_out) == 24
    assert not {row.prompt for row in rows.train} & {row.prompt for row in rows.held_out}
    # An evaluation on its own sees the rows that the run held out.
    assert read_rows(data, seed=seed, read="held-out").held_out == rows.held_out
