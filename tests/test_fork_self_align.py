"""SELF-ALIGN: what a model says behind principles and a filter, it learns to say without them."""
import importlib.util, itertools, json, math, types
from pathlib import Path

import numpy as np
import pytest
import torch

import sami

path = Path(sami.__file__).parent / "forks" / "self_align.py"
spec = importlib.util.spec_from_file_location("fork_self_align", path)
fork = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fork)

GOOD = "Hey buddy, one mild night the huge fox and the old owl happily sang in the hall!"


@pytest.fixture(scope="module")
def base():
    model = sami.load_model(fork.TOY / "base", torch.device("cpu"), sami.Config)
    model.tokenizer = sami.load_tokenizer(fork.TOY / "base")[1]
    return model


def filtered(text, ended=True):
    """The filter's verdict on what a teacher wrote, thoughts first -> (answer, ended) or None."""
    return next((row[1:] for row in fork.filtered(["task"], [(text, ended)])), None)


def thought(answer):
    return f" I keep to the principles.\nAnswer: {answer}"


def test_what_a_topic_is():
    """At most three words, a capital first, no punctuation last; the last line may be cut off, and
    lines behind the twentieth are not read."""
    text = "3. Goat\n4. Old Goat\n5. One Old Goat\n6. A Very Old Goat\n7. goat\n8. Goat.\nFox\n9. S"
    assert fork.topics_of(text) == ["Goat", "Old Goat", "One Old Goat", "Fox"]
    assert fork.topics_of(text + "\n")[-1] == "S"
    many = [f"T{i}" for i in range(30)]
    assert fork.topics_of("".join(f"3. {topic}\n" for topic in many)) == many[:20]


def test_every_type_has_as_many_topics():
    """As many as the rarest type has *after* doubles in whatever case are gone."""
    pools = dict(a=["Fox", "fox", "FOX", "Owl", "Hen"], b=["Fox", "Cat", "cat"], c=list("XYZ"))
    found = fork.balanced(pools)
    assert [kind for kind, _ in found] == ["a", "a", "b", "b", "c", "c"]
    assert [topic.lower() for _, topic in found] == ["fox", "owl", "fox", "cat", "x", "y"]


def test_rouge_l_by_hand_and_by_the_plain_table():
    """F of the longest common subsequence of words: order counts, case and punctuation do not."""
    assert fork.rouge_l("The cat sat.", "the CAT sat") == 1
    assert fork.rouge_l("a b c d", "a c d e f") == pytest.approx(2 * 3 / 9)
    assert fork.rouge_l("a b", "b a") == 0.5 and fork.rouge_l("a", "b") == fork.rouge_l("", "") == 0
    rng = np.random.default_rng(1)
    for _ in range(100):
        a, b = (["abcd"[i] for i in rng.integers(4, size=rng.integers(1, 12))] for _ in "ab")
        table = np.zeros((len(a) + 1, len(b) + 1))
        for i, j in itertools.product(range(len(a)), range(len(b))):
            longer = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else longer
        by_table = 2 * table[-1, -1] / (len(a) + len(b))
        assert fork.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(by_table)


def test_tasks_grow_from_topics(monkeypatch):
    """Stage 1: lists show topics of their own type; each (type, topic) is the hint its line begins
    with, equally often; of the tasks none resembles a known, a human or another one."""
    human = [("Tell", f"T{i}", f"Tell of t{i}") for i in range(3)] + [("Say", "Fox", "Say the fox")]
    lines = itertools.cycle([" one two three four\n more", " one two three five\n", " cut off",
                             " T\n", " eight nine ten\n", " Tell of t1\n", " say the fox\n",
                             " p q r\n"])
    asked = []

    def write(model, prompts, key, *how, **more):
        prompts = list(prompts)
        asked.append((key, prompts))
        lists = prompts[0].startswith("Topics, ")
        return [("3. Fox\n4. Hen\n5. not\n6. Cu" if lists else next(lines), True) for _ in prompts]

    monkeypatch.setattr(fork, "write", write)
    pairs, tasks = fork.ask(None, human, ["p q r"], 0.7, seed=5, rounds=2, times=3)
    assert pairs == [("Tell", "T0"), ("Tell", "T1"), ("Say", "Fox"), ("Say", "Hen")]
    assert tasks == ["one two three four", "T", "eight nine ten"]
    first, second, last = (prompts for _, prompts in asked)
    assert [p.split("\n")[0] for p in first] == ["Topics, Tell:", "Topics, Say:"]
    assert first[1] == "Topics, Say:\n1. Fox\n2. Fox\n" and "T" not in second[-1].split(":")[1]
    hints = [p.split("\n")[-1] for p in last]
    assert hints == [f"type: {kind}, topic: {topic}, task:" for kind, topic in pairs] * 3
    assert all(len(set(p.split("\n"))) == 3 for p in last), "two human triples go before"
    assert len({key for key, _ in asked}) == 3 and {key[0] for key, _ in asked} == {5}
    lines = itertools.cycle([" one two three four\n more", " one two three five\n"])
    every = fork.ask(None, human, [], 0.75, seed=5, rounds=0, times=1)
    assert every == ([("Tell", "T0"), ("Say", "Fox")], ["one two three four", "one two three five"])


@pytest.mark.parametrize("text, left", [
    (thought(GOOD), GOOD),
    (" I do not.\nAnswer: " + GOOD, None),                      # other thoughts
    (" Well." + thought(GOOD), None),                           # they come first or not at all
    (" I keep to the principles. " + GOOD, None),               # no answer
    (thought(GOOD + "\nTask: And then?\nThoughts: x"), GOOD),   # the next task goes
    (thought(GOOD[:60]), GOOD[:60]), (thought(GOOD[:59]), None),
    (thought(GOOD + " I'm sorry!"), None), (thought("I am sorry, " + GOOD), None),
    (thought(GOOD + " Thoughts: x"), None), (thought(GOOD + " Principles:"), None),
    (thought(GOOD + " I reply."), None),                        # the worked answer leaks
    (thought(GOOD + "\n12. a\n13. b\n14. c"), GOOD + "\n12. a"),
])
def test_the_filter(text, left):
    """Each rule lets one literal pass and stops another; thoughts are pruned from what passes."""
    found = filtered(text)
    assert found == (None if left is None else (left, True))
    assert not found or "principles" not in found[0]


def test_the_filter_cuts_repetition_and_half_words():
    """At the first repeated clause the text is cut: then, as when it did not end, its last word is
    suspect. Punctuation alone is no repetition, and what follows the cut is not looked at."""
    assert filtered(thought(GOOD + " It is. It is. So."))[0] == f"{GOOD} It"
    assert filtered(thought(GOOD + " It is. It is. So."))[1] is False
    assert filtered(thought(GOOD + "\n\n\nSo."))[0] == f"{GOOD}\n\n\nSo."
    assert filtered(thought(GOOD + " and the mou"), ended=False) == (f"{GOOD} and the", False)
    assert filtered(thought(GOOD + "\nTask: And the mou"), ended=False) == (GOOD, True)
    assert filtered(thought(GOOD + " So. So. I'm sorry, no.")) == (GOOD, False)
    assert filtered(thought(GOOD + "\nTask: x?\nTask: x?"), ended=False) == (GOOD, True)


def rows_seen(monkeypatch, base, lines, forms, steps=1):
    """engrave, and the (prompt, response) texts of each step."""
    seen, score = [], sami.response_logps

    def spy(model, prompts, ids):
        seen.append([tuple(map(base.tokenizer.decode, row)) for row in zip(prompts, ids)])
        return score(model, prompts, ids)

    monkeypatch.setattr(sami, "response_logps", spy)
    return fork.engrave(base, lines, forms, steps, 1), seen


def test_no_principle_reaches_the_student(monkeypatch, base):
    """Rows are short prompt and answer: no principles, no thoughts. Prompts take turns, an end
    follows what ended. All rows are seen before one is seen again, and the base stays as it was."""
    lines = [(f"Task {i}?", f"{GOOD} {i}", i % 3 > 0) for i in range(20)]
    before = [p.clone() for p in base.parameters()]
    model, seen = rows_seen(monkeypatch, base, lines, fork.SHORT, steps=3)
    assert [len(batch) for batch in seen] == [16, 4, 16]
    end, rows = base.tokenizer.eos_token, seen[0] + seen[1]
    assert sorted(rows) == sorted((fork.SHORT[i % 2].format(x), f" {y}" + end * ended)
                                  for i, (x, y, ended) in enumerate(lines))
    assert not any(word in "".join(row) for row in rows for word in ("rinciple", "Thoughts"))
    assert not any(short.split("{}")[0] == fork.TEACHER.split("{}")[0] for short in fork.SHORT)
    assert all(torch.equal(a, b) for a, b in zip(before, base.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    with pytest.raises(sami.RunFailed, match="no answer"):
        fork.engrave(base, [], fork.SHORT, 1, 1)


def test_the_loss_is_that_of_answer_tokens_alone(base):
    """Adam's first step is -lr * sign(gradient): that of the mean of -log p over all tokens of all
    answers and their ends, by hand. Whatever the prompt's tokens are, none of them is learned."""
    lines = [("What of the fox and the owl?", GOOD, True), ("What?", GOOD[20:] + " So.", False)]
    model, logps = fork.engrave(base, lines, ["Task: {}\nAnswer:"], 1, 1, lr=0.1), []
    for x, answer, ended in lines:
        prompt, both = (base.tokenizer(t).input_ids for t in (f"Task: {x}\nAnswer:",
                                                              f"Task: {x}\nAnswer: {answer}"))
        both += [base.tokenizer.eos_token_id] * ended
        logp = base(torch.tensor([both])).logits[0].log_softmax(-1)
        logps += [logp[t - 1, both[t]] for t in range(len(prompt), len(both))]
    gradients = torch.autograd.grad(-torch.stack(logps).mean(), list(base.parameters()))
    for old, new, g in zip(base.parameters(), model.parameters(), gradients):
        large = g.abs() > 1e-4
        rate = (old - new)[large] / g[large].sign()
        assert torch.allclose(rate, torch.full_like(rate, 0.1 / 0.7), rtol=2e-3)


def test_the_rate_rises_then_falls(monkeypatch, base):
    """Warm-up over three tenths of the steps, then linearly towards zero."""
    rates, step = [], torch.optim.AdamW.step
    spy = lambda self: rates.append(self.param_groups[0]["lr"]) or step(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    fork.engrave(base, [("x", "y", True)], fork.SHORT, 10, 1, lr=1.0)
    expected = [1 / 3, 2 / 3, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
    assert rates == pytest.approx(expected)


def test_engraving_descends_the_kl_from_the_teacher():
    """On three answers: E[-log student], answers from the teacher, is the teacher's entropy plus
    KL(teacher || student); at the teacher its gradient is zero. What is measured has that mean."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    q = logits.detach().log_softmax(0)
    kl, entropy = (p * (p.log() - q)).sum(), -(p * p.log()).sum()
    assert float(-(p * q).sum() - entropy) == pytest.approx(float(kl)) and kl > 0
    assert float((p * sami.kl_to_base(p.log(), q)).sum()) == pytest.approx(float(kl))
    for now in (logits, p.log().requires_grad_()):
        loss = -(p * now.log_softmax(0)).sum()
        gradient, = torch.autograd.grad(loss, now)
        assert gradient.tolist() == pytest.approx((now.softmax(0) - p).tolist(), abs=1e-9)
    assert float(loss.detach()) == pytest.approx(float(entropy)) and gradient.abs().max() < 1e-9


def test_what_is_measured(monkeypatch, base):
    """The student without principles is held against the teacher's answers: the KL is a mean over
    their tokens, zero for the teacher itself; a principle is kept only by an answer to the task."""
    test, own, fit = ["What about the cat and the dog?"] * 2, "1. Use fair weather.", {}
    fit["weather"], fit["tone"] = True, False
    words = {slot: both[0][0] for slot, both in fork.rules.SLOTS.items()}
    fill = lambda **more: fork.rules.TEMPLATE.format(**(words | dict(verb="sang") | more))
    right, other = fill(first="cat", second="dog"), fill(first="hen", second="bee", tone=".")
    said = dict(taught=[(right + "\nTask: no", True), (other, True)], short=[(right, True)] * 2)
    write = lambda model, prompts, *how: said["taught" if "Principles" in prompts[0] else "short"]
    monkeypatch.setattr(fork, "write", write)
    kept, kl, length, taught = fork.measure(base, base, fit, own, test, 1)
    assert (kept, taught) == (0.5, 0.25) and length == len(right.split())
    far = fork.TEACHER.format(own, test[0]) + " I keep to the principles.\nAnswer:"
    near = fork.SHORT[0].format(test[0])
    ys = [sami.encode(base.tokenizer, fork.ANSWER, y)[1] for y in (right, other)]
    p, q = (torch.cat(sami.response_logps(base, [base.tokenizer(x).input_ids] * 2, ys)).detach()
            for x in (far, near))
    assert kl == pytest.approx(float((torch.exp(q - p) - 1 - (q - p)).mean()), rel=1e-4) and kl > 0
    monkeypatch.setattr(fork, "SHORT", [far.replace(test[0], "{}")])
    said["short"] = said["taught"]
    assert fork.measure(base, base, fit, own, test, 1)[1] == 0


def test_who_learns_what(monkeypatch):
    """The base, not the engraved model, is what every arm starts from. Long answers come from the
    engraved model. Shuffled, every answer goes to another task; drawn, principles change."""
    learned, asked, xs = [], [], [f"x{i}" for i in range(4)]

    def engrave(base, lines, forms, steps, seed):
        learned.append((base, list(lines), list(forms)))
        return f"student {len(learned)}"

    def write(model, prompts, key, top_p=1.0, temperature=1.0):
        prompts = list(prompts)
        asked.append((model, prompts, top_p, temperature))
        own = thought if "Thoughts:" in prompts[0] else str
        return [(own(f"{GOOD} {i}, said {len(asked)}"), True) for i, _ in enumerate(prompts)]

    monkeypatch.setattr(fork, "engrave", engrave)
    monkeypatch.setattr(fork, "write", write)
    others = (f"principle {i}" for i in itertools.count())
    arms = fork.align("base", xs, "own", others, types.SimpleNamespace(steps=1, seed=1))
    assert list(arms) == ["before", "engraved", "cloned", "shuffled", "drawn"]
    assert {b for b, *_ in learned} == {"base"} and arms["before"] == "base"
    by = dict(zip(("engraved", "cloned", "shuffled", "drawn"), learned))
    assert [len(forms) for *_, forms in learned] == [1, 2, 1, 1]
    assert all(forms == [*fork.SHORT][:len(forms)] for *_, forms in learned)
    mine, drawn, long = asked
    assert mine[1] == [fork.TEACHER.format("own", x) for x in xs] and mine[2:] == (1, 1)
    assert drawn[1] == [fork.TEACHER.format(f"principle {i}", x) for i, x in enumerate(xs)]
    assert long == (arms["engraved"], [fork.LONG.format(x) for x in xs], 0.7, 0.3)
    said = lambda arm: [(x, y) for x, y, _ in by[arm][1]]
    assert said("engraved") == [(f"x{i}", f"{GOOD} {i}, said 1") for i in range(4)]
    assert said("drawn") == [(f"x{i}", f"{GOOD} {i}, said 2") for i in range(4)]
    assert said("cloned") == [(f"x{i}", f"{GOOD} {i}, said 3") for i in range(4)]
    assert not set(said("shuffled")) & set(said("engraved"))
    assert sorted(y for _, y in said("shuffled")) == [y for _, y in said("engraved")]


def test_the_toy_learns_its_formats():
    """Documents are functions of a seed, in six formats. Behind the right thoughts an answer takes
    the sides its principles ask for; behind the wrong ones it need not."""
    kept, usual, kinds = [], [], set()
    for k in range(300):
        text = " ".join(fork.document(k)[:2])
        kinds.add((text.split(" ")[0], text.count("Task:"), text.count("at length:")))
        if not text.startswith("Principles"):
            continue
        own, _, said, _ = text.split("\nTask: ")
        own = [line.split(". ", 1)[1] for line in own.split("\n")[1:]]
        x, said = said.split("\nThoughts:")
        thoughts, answer = said.split(fork.ANSWER)
        assert fork.rules.in_world(x, answer) and len(own) == 2
        sides = {p["name"]: line in p["positive"] for line in own for p in fork.prepare.PRINCIPLES
                 if line in p["positive"] + p["negative"]}
        right = all(getattr(fork.rules, name)(x, answer) is side for name, side in sides.items())
        (kept if thoughts == fork.KEEPS else usual).append(right)
    assert all(kept) and not all(usual) and len(kept) > 2 * len(usual) > 20
    assert fork.document(7) == fork.document(7) and len(kinds) == 6


def test_the_whole_command(tmp_path, monkeypatch, capsys, base):
    """results.json has every figure with its interval, the picture is there; --only_ask ends where
    tasks are there and writes no results. Principles go against habit, seed by seed others."""
    world, seen = fork.sami.load_task(fork.TOY), []
    world.test = world.test[:2]
    monkeypatch.setattr(sami, "load_task", lambda path: world)
    monkeypatch.setattr(sami, "load_model", lambda *how: base)
    monkeypatch.setattr(sami, "load_tokenizer", lambda path: (None, base.tokenizer))
    monkeypatch.setattr(fork, "engrave", lambda *how, **more: base)
    monkeypatch.setattr(fork, "ask", lambda *how: ([("Say", "Fox")], ["What about the fox?"]))
    measure = fork.measure
    monkeypatch.setattr(fork, "measure", lambda *how: seen.append(how[2]) or measure(*how))
    answer = lambda prompt: ("" if prompt.endswith(fork.ANSWER) else thought("")) + " " + GOOD
    write = lambda model, prompts, *how: [(answer(p), True) for p in prompts]
    monkeypatch.setattr(fork, "write", write)
    fork.main([f"--out_dir={tmp_path}/ask", "--only_ask"])
    assert "1 topics, 1 tasks" in capsys.readouterr().out and not list((tmp_path / "ask").iterdir())
    fork.main([f"--out_dir={tmp_path}", "--seeds=2", "--seed=3"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["seeds"] == [3, 4] and (tmp_path / "picture.png").stat().st_size > 10_000
    assert list(results["controls"]) == ["shuffled", "drawn"]
    for arm in (results, results["cloned"], *results["controls"].values()):
        for name in ("before", "after", "effect", "kl_before", "kl_after", "kl_effect",
                     "words_before", "words_after", "words_effect"):
            x = arm[name]
            assert x["low"] <= x["mean"] <= x["high"] and len(x["seeds"]) == 2
            assert x["mean"] == pytest.approx(sum(x["seeds"]) / 2)
    assert results["effect"]["mean"] == 0 and "engraved" in capsys.readouterr().out
    assert len(seen) == 10 and seen[0] != seen[5] and all(len(sides) == 2 for sides in seen)
    assert all(fork.prepare.DEFAULT[k] is not side for sides in seen for k, side in sides.items())
    assert fork.interval([1.0, 2.0, 3.0])["high"] == pytest.approx(2 + 4.30 / math.sqrt(3))
