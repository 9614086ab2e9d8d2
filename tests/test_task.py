"""A task is a folder: how constitutions are drawn, prompts filled, responses cut and dropped; --check shows it all."""
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
    assert len(pairs) == 6 and all(140 < count < 260 for count in pairs.values())  # 200 each, 4.7 standard deviations


def test_first_always_positive_or_not(task):
    assert all(all(cs[0].sides) for cs in draws(task(), 2))
    random = Counter(tuple(cs[0].sides) for cs in draws(task(first_always_positive=False), 2))
    assert len(random) == 4 and all(60 < count < 140 for count in random.values())  # 100 each


def test_independent_others_take_any_other_sides(task):
    others = Counter(frozenset(n for n, s in sides(cs[1]).items() if s) == set() for cs in draws(task(), 2))
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
        assert {(sides(c)[a], sides(c)[b]) for c in cs} == {(True, True), (True, False), (False, True), (False, False)}


def test_focus_is_always_there_and_only_the_first_takes_its_side(task):
    for cs in draws(task(principles_per_constitution=3), 5, focus="p2"):
        assert sides(cs[0])["p2"] and not any(sides(c)["p2"] for c in cs[1:])
        assert len({frozenset(sides(c).items()) for c in cs}) == 5
    three = draws(task(principles_per_constitution=3), 2, focus="p2")
    assert {c.names.index("p2") for cs in three for c in cs} == {0, 1, 2}, "and stands anywhere among the others"
    with pytest.raises(sami.BadInput, match="5"):
        task(principles_per_constitution=3).draw(np.random.default_rng(0), 6, "p2")  # 1 + 2 * 2 there are


def test_heldout_principles_are_never_mixed_with_those_trained_on(task):
    t = task()
    assert {n for cs in draws(t, 2) for c in cs for n in c.names} == {"p1", "p2", "p3", "p4"}
    assert {n for cs in draws(t, 2, heldout=True) for c in cs for n in c.names} == {"p5", "p6"}


def test_wordings_vary_from_draw_to_draw(task):
    t = task(principles=[dict(name=n, positive=[f"{n} yes", f"{n} sure"], negative=[f"{n} no", f"{n} never"])
                         for n in "ab"])
    assert {text for cs in draws(t, 2, 60) for c in cs for text in c.texts} == {
        f"{n} {word}" for n in "ab" for word in ("yes", "sure", "no", "never")}


def test_the_order_of_principles_is_random_and_another_order_says_the_same(task):
    t = task(principles_per_constitution=3)
    [cs] = draws(t, 2, 1)
    orders = {cs[0].shuffled(np.random.default_rng(seed)) for seed in range(100)}
    assert len(orders) == 6 and all(sides(c) == sides(cs[0]) for c in orders)
    assert all(sorted(zip(c.names, c.texts)) == sorted(zip(cs[0].names, cs[0].texts)) for c in orders)
    assert len({c[0].names for c in draws(t, 2, 200)}) == 24, "4 principles, ordered choices of 3"


def test_a_constitution_is_numbered_lines_or_one_line():
    c = sami.Constitution(("a", "b"), (True, False), ("Be kind.", "Be brief."))
    assert str(c) == "1. Be kind.\n2. Be brief."
    assert str(sami.Constitution(c.names, c.sides, c.texts, numbered=False)) == "Be kind. Be brief."


def test_templates_are_filled_by_plain_replacement(task):
    t = task(sampling_prompt="{x} {constitution}|{query}|{constitution}", scoring_prompt="{query} {constitution}")
    assert t.sampling_prompt("what?", "C") == "{x} C|what?|C", "other braces stay"
    assert t.prompt("what?", "C") == "what? C"
    assert t.prompt("{constitution} {query}", "C") == "{constitution} {query} C", "a query is never filled in"
    assert t.prompt("q", "{query}") == "q {query}", "nor is a constitution"
    assert task(sampling_prompt="{constitution}: {query}").prompt("q", "c") == "c: q", "scored as sampled by default"


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
    (tmp_path / "task/train.jsonl").write_text('{"query": "a\u2028b \u0085 c"}\n{"query": "é"}\n', encoding="utf-8")
    assert [q["query"] for q in sami.load_task(tmp_path / "task").train] == ["a\u2028b \u0085 c", "é"]


@pytest.fixture
def check(tmp_path):
    """What --check prints for a task whose model folder has no weights."""
    def run(*more, template=None, **keys):
        flags = tiny.folder(tmp_path, **keys)
        (tmp_path / "base/model.safetensors").unlink()
        if template:
            (tokenizer := tiny.tokenizer()).chat_template = template
            tokenizer.save_pretrained(tmp_path / "base")
        code, printed, err = tiny.command(*flags, "--check", *more)
        assert code == 0 and not err and not (tmp_path / "out").exists(), err
        return printed
    return run


def test_check_shows_prompts_draws_and_filters(check, tmp_path):
    printed = check("--n=3", response_prefix=" So", scoring_prompt="{constitution}, {query}:", stop=["\n", "Q:"],
                    drop_if_contains=["sorry"], first_must_end_with=".", answer_after="Hence")
    task = sami.load_task(tmp_path / "task")
    cs = task.draw(sami.rng(1, 1, 0, sami.DRAW), 3)  # what seed 1, iteration 1 draws for query 0
    sampling, scoring, draws, rules = printed.split("--- ")[1:5]
    assert sampling.startswith("a sampling prompt") and f"tokens)\n{cs[0]}\nQ: train a\nA: So\n" in sampling
    assert scoring.startswith("a scoring prompt") and f"tokens)\n{cs[0]}, train a:\n" in scoring
    assert draws.startswith("the 3 constitutions of this query\n")
    for j, c in enumerate(cs, 1):
        names = [name if side else f"not {name}" for name, side in zip(c.names, c.sides)]
        assert f"c_{j}: {', '.join(names)}\n{c}\n" in draws
    for line in ("a response starts behind 'Hence'", "a response ends before any of ['\\n', 'Q:']",
                 "a query is dropped if a response contains any of ['sorry']",
                 "a query is dropped unless its first response ends with '.'"):
        assert line + "\n" in rules


@pytest.mark.parametrize("flags, numbers", [
    # a prompt has 15 letters of constitution, 7 of query, 7 of template: 29 tokens; 2 * (29 + 2 * 8) = 90 a query
    ([], (8, 0, 16, 128, 720)),  # 2 steps of 4 queries
    (["--eval_queries=3"], (8, 6, 28, 224, 1260)),  # before and after the iteration
    (["--iterations=3", "--steps=2,4,9"], (8 + 16 + 20, 0, 88, 704, 3960)),  # a half has no more than 20
    (["--max_queries=5", "--iterations=2", "--steps=1"], (3 + 2, 0, 10, 80, 450))])
def test_check_tells_what_a_run_costs(check, flags, numbers):
    printed = check(*flags)
    train, held, rows, sampled, scored = numbers
    assert (f"samples for {train} queries to train on (more if some are dropped) and {held} held-out ones: {rows} "
            f"responses,\nat most {sampled} tokens; it scores about {scored:,} tokens if") in printed
    assert printed.count("mean of 40 training queries: 29 tokens") == 2
    assert "the longest prompt has 29 tokens; it and --max_new_tokens fit the model's context of 256\n" in printed


def test_check_shows_what_a_chat_model_reads(check):
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}a:"
    printed = check(template=template, chat=True, sampling_prompt="Keep to this: {constitution}")
    assert "<eos>system: Keep to this: 1. " in printed and "\nuser: train a\na:\n" in printed


def test_a_run_of_several_seeds_is_checked_once(check):
    assert check("--seeds=1,2").count("--- a run samples") == 1
