"""A task is a folder: how constitutions are drawn, prompts filled, responses cut and dropped."""
from collections import Counter

import numpy as np
import pytest

import sami, tiny

POSITIVE = {f"do {s}" for s in "rstuvw"}


@pytest.fixture
def task(tmp_path):
    def make(**keys):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        tiny.folder(path, **keys)
        return sami.load_task(path / "task")
    return make


def draws(task, n, count=400, **how):
    return [task.draw(np.random.default_rng(seed), n, **how) for seed in range(count)]


def sides(c):
    return dict(zip(c.names, c.sides))


def test_constitutions_of_a_query_take_different_sides_of_the_same_principles(task):
    for cs in draws(task(first_always_positive=False), 3):
        assert len({frozenset(sides(c).items()) for c in cs}) == 3
        assert len({frozenset(c.names) for c in cs}) == 1 and len(set(cs[0].names)) == 2
        for c in cs:
            assert [t in POSITIVE for t in c.texts] == list(c.sides), "a side and its wording agree"


def test_the_same_random_numbers_draw_the_same(task):
    t = task()
    assert draws(t, 2, 5) == draws(t, 2, 5) != draws(t, 2, 6)[1:]


def test_every_principle_and_pair_is_equally_likely(task):
    pairs = Counter(frozenset(cs[0].names) for cs in draws(task(), 2, 1200))
    assert len(pairs) == 6
    assert all(140 < count < 260 for count in pairs.values())  # 200 each, 4.7 sd


def test_first_always_positive_or_not(task):
    assert all(all(cs[0].sides) for cs in draws(task(), 2))
    random = Counter(tuple(cs[0].sides) for cs in draws(task(first_always_positive=False), 2))
    assert len(random) == 4 and all(60 < count < 140 for count in random.values())  # 100 each


def test_independent_others_take_any_other_sides(task):
    others = Counter(not any(sides(cs[1]).values()) for cs in draws(task(), 2))
    assert 80 < others[True] < 190  # 1 in 3 is negative throughout: 133 of 400


def test_complement_flips_every_side(task):
    for cs in draws(task(others="complement", first_always_positive=False), 4):
        for a, b in ((0, 1), (2, 3)):
            assert sides(cs[a]) == {name: not side for name, side in sides(cs[b]).items()}
    for cs in draws(task(others="complement", principles_per_constitution=3), 3):
        assert all(cs[0].sides) and not any(cs[1].sides), "an odd one is left without its opposite"
        assert 0 < sum(cs[2].sides) < 3


@pytest.mark.parametrize("others", ["independent", "complement"])
@pytest.mark.parametrize("positive", [True, False])
def test_four_constitutions_of_two_principles_are_all_there_are(task, others, positive):
    for cs in draws(task(others=others, first_always_positive=positive), 4, 50):
        a, b = cs[0].names
        assert {(sides(c)[a], sides(c)[b]) for c in cs} == {
            (True, True), (True, False), (False, True), (False, False)}


def test_focus_is_always_there_and_only_the_first_takes_its_side(task):
    for cs in draws(task(principles_per_constitution=3), 5, focus="p2"):
        assert sides(cs[0])["p2"] and not any(sides(c)["p2"] for c in cs[1:])
        assert len({frozenset(sides(c).items()) for c in cs}) == 5
    three = draws(task(principles_per_constitution=3), 2, focus="p2")
    assert {c.names.index("p2") for cs in three for c in cs} == {0, 1, 2}, "in any place"
    with pytest.raises(sami.BadInput, match="at most 5 different constitutions"):  # 1 + 2 * 2
        task(principles_per_constitution=3).draw(np.random.default_rng(0), 6, "p2")


def test_heldout_principles_are_never_mixed_with_those_trained_on(task):
    t = task()
    assert {n for cs in draws(t, 2) for c in cs for n in c.names} == {"p1", "p2", "p3", "p4"}
    assert {n for cs in draws(t, 2, heldout=True) for c in cs for n in c.names} == {"p5", "p6"}


def test_wordings_vary_from_draw_to_draw(task):
    t = task(principles=[dict(name=n, positive=[f"{n} yes", f"{n} sure"],
                              negative=[f"{n} no", f"{n} never"]) for n in "ab"])
    assert {text for cs in draws(t, 2, 60) for c in cs for text in c.texts} == {
        f"{n} {word}" for n in "ab" for word in ("yes", "sure", "no", "never")}


def test_the_order_of_principles_is_random_and_another_order_says_the_same(task):
    t = task(principles_per_constitution=3)
    [cs] = draws(t, 2, 1)
    orders = {cs[0].shuffled(np.random.default_rng(seed)) for seed in range(100)}
    assert len(orders) == 6 and all(sides(c) == sides(cs[0]) for c in orders)
    said = {tuple(sorted(zip(c.names, c.texts))) for c in (*orders, cs[0])}
    assert len(said) == 1
    assert len({c[0].names for c in draws(t, 2, 200)}) == 24, "4 principles, ordered choices of 3"


def test_a_constitution_is_numbered_lines_or_one_line():
    c = sami.Constitution(("a", "b"), (True, False), ("Be kind.", "Be brief."))
    assert str(c) == "1. Be kind.\n2. Be brief."
    assert str(sami.Constitution(c.names, c.sides, c.texts, numbered=False)) == "Be kind. Be brief."


def test_templates_are_filled_by_plain_replacement(task):
    t = task(sampling_prompt="{x} {constitution}|{query}|{constitution}",
             scoring_prompt="{query} {constitution}")
    assert t.sampling_prompt("what?", "C") == "{x} C|what?|C", "other braces stay"
    assert t.prompt("what?", "C") == "what? C"
    assert t.prompt("{constitution} {query}", "C") == "{constitution} {query} C", "a query never is"
    assert t.prompt("q", "{query}") == "q {query}", "nor is a constitution"
    alone = task(sampling_prompt="{constitution}: {query}")
    assert alone.prompt("q", "c") == "c: q", "scored as sampled by default"


def test_clean_cuts_at_the_first_stop_string(task):
    t = task(stop=["\n\n", "Q:"])
    assert t.clean("  yes\nno \n\nQ: more") == "yes\nno"
    assert t.clean("yes Q: \n\n") == "yes" and t.clean("Q: yes") == "" and t.clean(" yes ") == "yes"


def test_what_is_dropped_and_why(task):
    t = task(drop_if_contains=["onstitution"], first_must_end_with=".")
    assert t.drop(["Yes.", "No"]) is None
    assert "empty" in t.drop(["Yes.", ""])
    assert "identical" in t.drop(["Yes.", "No.", "No."])
    assert "onstitution" in t.drop(["Yes.", "The Constitution says no."])
    assert "'.'" in t.drop(["Yes", "No."]), "the first was cut off; the second need not end"
    assert task().drop(["Yes", "No"]) is None


def test_queries_may_hold_any_character_a_line_of_json_may(tmp_path):
    """U+2028 and U+0085 are line breaks to some, and legal inside a JSON string."""
    tiny.folder(tmp_path)
    lines = '{"query": "a\u2028b \u0085 c"}\n{"query": "é"}\n'
    (tmp_path / "task/train.jsonl").write_text(lines, encoding="utf-8")
    queries = [q["query"] for q in sami.load_task(tmp_path / "task").train]
    assert queries == ["a\u2028b \u0085 c", "é"]
