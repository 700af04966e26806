import numpy as np
import pytest
from attrs import asdict, evolve

from benches.drawn_tasks import (
    FINDINGS,
    LESIONS,
    ORGANS,
    PALETTES,
    Task,
    TaskConfig,
    draw_sample,
    draw_tasks,
    task_list,
)

CFG = TaskConfig(tasks=12, samples=5, size=40)


@pytest.fixture(scope="module")
def drawn():
    return draw_tasks(CFG)


def test_samples_of_a_task_lie_side_by_side(drawn):
    assert [t for t, _, _ in drawn] == [f"task-{i:03d}" for i in range(12) for _ in range(5)]
    for _, text, picture in drawn:
        assert (picture.dtype, picture.shape) == (np.uint8, (40, 40, 3))
        assert picture.std() > 5
        assert not set("{}") & set(text)
        assert text[0].isupper()
        assert text[-1] in ".?"
    assert len({text for _, text, _ in drawn}) == len({p.tobytes() for _, _, p in drawn}) == 60


def test_draws_are_pure_in_the_seed(drawn):
    for (t, text, picture), (u, again, same) in zip(drawn, draw_tasks(CFG), strict=True):
        assert (t, text, picture.tobytes()) == (u, again, same.tobytes())
    other = draw_tasks(evolve(CFG, seed=1))
    assert all(a[1] != b[1] and not np.array_equal(a[2], b[2]) for a, b in zip(drawn, other, strict=True))


def test_the_seed_draws_samples_too():
    (a, p), (b, q) = (draw_sample(evolve(CFG, seed=s), plain(), 0) for s in (0, 1))
    assert a != b
    assert not np.array_equal(p, q)


def test_more_tasks_and_samples_leave_those_there_are(drawn):
    more = draw_tasks(evolve(CFG, tasks=14, samples=7))
    for t in range(12):
        for i in range(5):
            (_, a, p), (_, b, q) = drawn[t * 5 + i], more[t * 7 + i]
            assert (a, p.tobytes()) == (b, q.tobytes())
    text, picture = draw_sample(CFG, task_list(CFG)[7], 3)
    assert (text, picture.tobytes()) == (drawn[38][1], drawn[38][2].tobytes())


def test_tasks_differ_and_share():
    tasks = task_list(TaskConfig(tasks=60))
    looks = [{k: v for k, v in asdict(t).items() if k not in ("name", "number")} for t in tasks]
    assert len({tuple(x.values()) for x in looks}) == 60
    for factor in looks[0]:  # each value is that of several tasks
        values = [x[factor] for x in looks]
        assert all(values.count(v) >= 2 for v in set(values)), factor
    assert {x["palette"] for x in looks} == set(PALETTES)


def test_of_many_tasks_no_two_are_alike():
    looks = [tuple(asdict(evolve(t, number=0, name="")).values()) for t in task_list(TaskConfig(tasks=4000))]
    assert len(set(looks)) == 4000


def plain(**other):
    look = {"palette": "grey", "cycles": 7.0, "angle": 0.0, "lesion": "disc", "dark": False}
    return Task(
        number=0, name="t", **look | {"organ": "lung", "finding": "mass", "question": "count"} | other
    )


@pytest.mark.parametrize(
    "other",
    [
        {"palette": "pink"},
        {"cycles": 16.0},
        {"angle": 90.0},
        {"dark": True},
        *({"lesion": k} for k in LESIONS[1:]),
    ],
)
def test_every_factor_of_the_look_shows(other):
    """With the same nuisances the pictures differ, and the text does not."""
    (a, p), (b, q) = draw_sample(CFG, plain(), 0), draw_sample(CFG, plain(**other), 0)
    assert a == b
    assert (np.abs(p.astype(int) - q) > 3).mean() > 0.002


def test_what_is_asked_shows_more_often_than_what_is_remarked():
    def share(words, texts):
        return np.mean([any(w in t.lower() for w in words) for t in texts])

    texts = [draw_sample(CFG, plain(), i)[0] for i in range(300)]
    for of, own in ((ORGANS, "lung"), (FINDINGS, "mass")):
        said = {name: share(words, texts) for name, words in of.items()}
        others = [v for name, v in said.items() if name != own]
        assert 0.65 < said[own] < 0.95  # sometimes left vague
        assert max(others) < 0.35
        assert min(others) > 0.02  # the remarks speak of other organs


def test_nuisances_are_strong():
    """Within a task the brightness varies more than between tasks of one palette."""
    light = np.array(
        [[draw_sample(CFG, plain(angle=a), i)[1].mean() for i in range(20)] for a in (0.0, 45.0, 90.0)]
    )
    assert light.std(1).mean() > 2 * light.mean(1).std()


@pytest.mark.parametrize("wrong", [{"tasks": 0}, {"samples": 0}, {"size": 31}, {"seed": -1}])
def test_errors(wrong):
    with pytest.raises(
        ValueError, match="needs tasks and samples >= 1, size >= 32 and seed >= 0, got TaskConfig"
    ):
        TaskConfig(**wrong)


def test_more_tasks_than_there_are():
    with pytest.raises(ValueError, match="there are 192000 different tasks at most, got tasks=192001"):
        task_list(TaskConfig(tasks=192001))
