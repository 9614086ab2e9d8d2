"""DNO is DPO against oneself: the reference moves with the policy, the winner is who wins often."""
import importlib.util, json, math, types
from pathlib import Path

import numpy as np
import pytest
import torch

import sami

path = Path(sami.__file__).parent / "forks" / "dno.py"
spec = importlib.util.spec_from_file_location("fork_dno", path)
dno = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dno)

GENERAL = np.array([[.5, .9, .2], [.1, .5, .7], [.8, .3, .5]])  # goes round: 0 > 1 > 2 > 0
PI = np.array([.5, .3, .2])


def longer(shown):
    """A judge: the longer text, and what it read first of two equally long ones."""
    return ["A" if len(a) >= len(b) else "B" for _, a, b in shown]


def example(base, pairs):
    e = sami.Example(0, "", [], [])
    e.base, e.pairs = [[torch.tensor(t) for t in base]], pairs
    return e


def test_at_the_reference_every_pair_costs_log_2():
    """And its gradient is eta / 2 towards each token of the winner, away from the loser's."""
    logp = [[-1.0, -2.0], [-3.0], [-0.5, -0.5, -1.0]]
    cells = [[torch.tensor(t, requires_grad=True) for t in logp]]
    loss = dno.objective(example(logp, [(0, 2)]), cells, types.SimpleNamespace(eta=0.4))["loss"]
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    loss.backward()
    assert cells[0][0].grad.tolist() == pytest.approx([-0.2, -0.2])
    assert cells[0][2].grad.tolist() == pytest.approx([0.2, 0.2, 0.2])
    assert cells[0][1].grad.tolist() == [0], "who is in no pair learns nothing"
    for target in (0.0, 0.3, 1.0):
        found = dno.regression_loss(torch.zeros(2), target)
        assert found.tolist() == pytest.approx([math.log(2)] * 2)


def test_equation_13_by_hand():
    """-log sigmoid(eta * (gain of the winner - gain of the loser)), the mean of a query's pairs;
    gains are sums over tokens, and three responses are scored once for all of their pairs."""
    now, before = [[-1.0, -1.0], [-4.0], [-2.0]], [[-2.0, -3.0], [-2.0], [-2.5]]
    gains, pairs = [3.0, -2.0, 0.5], [(0, 1), (0, 2), (2, 1)]
    cells = [[torch.tensor(t) for t in now]]
    found = dno.objective(example(before, pairs), cells, types.SimpleNamespace(eta=0.5))["loss"]
    by_hand = [math.log(1 + math.exp(-0.5 * (gains[w] - gains[l]))) for w, l in pairs]
    assert float(found) == pytest.approx(sum(by_hand) / 3, abs=1e-6)


def test_soft_labels_lead_to_soft_policy_iteration():
    """All pairs with target sigmoid(r - r') have their minimum at pi * exp(r / eta) / Z (Eq. 8, 9),
    and a scaled gap makes a soft label the hard one of Eq. 13."""
    eta, r = 0.5, GENERAL @ PI
    target = torch.sigmoid(torch.tensor(r[:, None] - r))
    logits = torch.tensor(PI).log().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        gain = logits.log_softmax(0) - torch.tensor(PI).log()
        loss = dno.regression_loss(eta * (gain[:, None] - gain), target).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    exact = PI * np.exp(r / eta) / (PI * np.exp(r / eta)).sum()
    assert logits.softmax(0).tolist() == pytest.approx(exact.tolist(), abs=1e-6)
    assert dno.next_policy(PI, GENERAL, eta).tolist() == pytest.approx(exact.tolist(), abs=1e-12)
    delta = torch.tensor([-1.0, 2.0])
    hard, soft = (dno.regression_loss(delta, t) for t in (1.0, torch.sigmoid(torch.tensor(40.0))))
    assert soft.tolist() == pytest.approx(hard.tolist(), abs=1e-6)


@pytest.mark.parametrize("eta", [0.2, 0.5, 2.0])
def test_an_exact_step_beats_the_last_policy(eta):
    """P(pi_t+1 > pi_t) >= 1/2 + eta * KL(pi_t+1 || pi_t), also where preference goes in circles."""
    new = dno.next_policy(PI, GENERAL, eta)
    kl = (new * np.log(new / PI)).sum()
    assert new @ GENERAL @ PI >= 0.5 + eta * kl > 0.5


def test_rock_paper_scissors_and_a_ranking():
    """The average of all policies approaches Nash, the last one keeps circling; pulled to uniform
    it settles. Where P ranks (Bradley-Terry) the last policy is the best action."""
    average, last = dno.circle(2000)
    assert average[0] == last[0] == pytest.approx(0.7 + 0.05 - 0.5, abs=0.06)
    assert average[2000] < 0.01 < average[100] and last[1000:].min() > 0.1
    assert last[1000:].max() > last[:100].max(), "it does not even come closer"
    assert dno.circle(2000, tau=0.1)[1][-1] < 1e-6
    strength = np.array([1.0, 2.0, 4.0])
    ranking, pi = strength[:, None] / (strength[:, None] + strength), np.ones(3) / 3
    for _ in range(200):
        new = dno.next_policy(pi, ranking, 0.5)
        assert new @ ranking @ pi >= 0.5 - 1e-12
        pi = new
    assert pi[2] > 0.999
    pulled = dno.next_policy(np.array([.8, .2]), np.full((2, 2), .5), eta=1.0, tau=0.5)
    assert pulled.tolist() == pytest.approx([2 / 3, 1 / 3]), "sqrt(.8) : sqrt(.2)"


def test_what_is_read_first_is_no_merit():
    """A judge who prefers the first of two equals is asked in both orders: undecided."""
    P = dno.preferences(longer, {}, ["aa", "b"], ["cc", "d", "eee"])
    assert P.tolist() == [[0.5, 1, 0], [0, 0.5, 0]]
    backwards = lambda shown: ["A" if len(a) > len(b) else "B" for _, a, b in shown]
    assert dno.preferences(backwards, {}, ["aa", "b"], ["cc", "d", "eee"]).tolist() == P.tolist()
    silent = lambda shown: [None] * len(shown)
    assert dno.win_rate(silent, [{}], [["a"]], [["b"]]) == 0.5
    assert dno.win_rate(longer, [{}, {}], [["aa"], ["b"]], [["c"], ["d"]]) == 0.75


def beats(*rows):
    """Half the upper triangle of a preference by hand: rows of wins over those further right."""
    P = np.full((len(rows) + 1,) * 2, 0.5)
    for i, row in enumerate(rows):
        for j, p in enumerate(row, i + 1):
            P[i, j], P[j, i] = p, 1 - p
    return P


def test_who_is_paired_with_whom():
    """Six responses in a strict order have 6 ... 1 points. A winner has four at least, two more
    than its loser where it is the teacher's, one where it is the policy's own."""
    order = beats([1] * 5, [1] * 4, [1] * 3, [1] * 2, [1])  # points 6, 5, 4, 3, 2, 1
    ids = [[k] for k in range(6)]
    below = lambda winner: [(winner, j) for j in range(winner + 1, 6)]
    assert dno.make_pairs(order, ids, 4) == below(0) + below(1) + below(2), "the teacher is last"
    assert dno.make_pairs(order, ids, 5) == below(0) + below(1)
    turn = [5, 0, 2, 3, 4, 1]
    turned = order[np.ix_(turn, turn)]  # points 1, 6, 4, 3, 2, 5: the second best is the teacher's
    assert [p for p in dno.make_pairs(turned, ids, 5) if p[0] == 5] == [(5, 0), (5, 3), (5, 4)]
    assert (1, 5) in dno.make_pairs(turned, ids, 5), "the policy's own may be one above it"
    assert dno.make_pairs(np.full((6, 6), 0.5), ids, 3.5) == [], "equals make no pairs"


def test_equal_ids_and_loops_never_win():
    """The same ids twice are no pair, whatever a noisy oracle says; a loop is everybody's loser."""
    order = beats([1] * 5, [1] * 4, [1] * 3, [1] * 2, [1])
    ids = [[1], [1], [2], [3], [4], [5]]
    found = dno.make_pairs(order, ids, 4)
    assert (0, 1) not in found and (0, 2) in found and (1, 2) in found
    loop = [1, 2, 3, 4] * 3  # 1 2 3 4 three times; two times are no loop
    found = dno.make_pairs(order, [loop, [6], [2], [3], [4], [5]], 4)
    assert (1, 0) in found and (2, 0) in found and not [p for p in found if p[0] == 0]
    found = dno.make_pairs(order, [loop[:11], [6], [2], [3], [4], [5]], 4)
    assert (0, 1) in found and (1, 0) not in found


def test_replay_is_at_most_30_15_7_percent():
    """Of 40 new queries: 12 of the last iteration, 6 of the one before, 3 of the third; without any
    of them twice."""
    past = [[(age, i) for i in range(100)] for age in (1, 2, 3)]
    found = dno.replay(past, 40, np.random.default_rng(1))
    assert [sum(age == a for age, _ in found) for a in (1, 2, 3)] == [12, 6, 3]
    assert len(set(found)) == 21 and found != dno.replay(past, 40, np.random.default_rng(2))
    assert len(dno.replay([past[0][:5]], 40, np.random.default_rng(1))) == 5, "or all there are"


def test_the_reference_is_who_sampled_and_moves(monkeypatch):
    """On-policy, every iteration samples with and refers to the last iteration's policy, replayed
    queries too; offline, both stay the base. A policy here is a list with its version."""
    seen, Version = [], types.SimpleNamespace
    fake = lambda model, *rest: [Version(by=model.version, base=None) for _ in range(10)]

    def keep(model, batch, cfg):
        seen.append((model.version, sorted({e.by for e in batch}), len(batch)))
        for e in batch:
            e.base = model.version

    def train(model, batch, steps, t, cfg):
        assert {e.base for e in batch} == {seen[-1][0]}, "no log-probs of an earlier reference"
        assert cfg.lr == pytest.approx(0.1 * 0.9 ** (t - 1)) and steps == math.ceil(len(batch) / 16)
        model.version += 1

    monkeypatch.setattr(dno, "collect", fake)
    monkeypatch.setattr(dno, "respond", lambda model, task, items, count, t, cfg:
                        [[([], [], model.version)] for _ in items])
    monkeypatch.setattr(sami, "add_base_logps", keep)
    monkeypatch.setattr(sami, "train", train)
    better = lambda shown: ["A" if a % 3 > b % 3 else "B" if b % 3 > a % 3 else None
                            for _, a, b in shown]  # version 2 is the best one
    task, cfg = Version(judge=better), dno.Config(lr=0.1, queries=1)
    policy = Version(version=0)
    said, best = dno.improve(policy, policy, task, [0] * 3, [{}], [{}], cfg)
    assert seen == [(0, [0], 10), (1, [0, 1], 13), (2, [0, 1, 2], 14)]
    assert said == [[[0]], [[1]], [[2]], [[3]]] and best == 2, "validation chooses, not the clock"
    seen.clear()
    dno.improve(Version(version=0), Version(version=0), task, [0] * 3, [{}], [{}], cfg)
    assert [s[:2] for s in seen] == [(0, [0])] * 3


def test_what_the_arms_differ_in(tmp_path, monkeypatch):
    """Offline another model, which nobody trains, samples and is the reference; the stranger's
    oracle reads the sides of another query's constitution; nobody meets a query twice."""
    seen = []

    def improve(model, behind, task, fresh, valid, test, cfg):
        own = [e["sides"] == dict(zip(e["c"].names, e["c"].sides)) for e in fresh]
        seen.append((cfg.seed, model is behind, sum(own) / len(own)))
        numbers = [e["number"] for e in fresh + valid + test]
        assert numbers == list(range(1003)) and len(test) == 3
        return [[["no answer"] for _ in test]] * 4, 0

    monkeypatch.chdir(path.parent.parent)
    monkeypatch.setattr(sami, "load_model", lambda *args: object())
    monkeypatch.setattr(dno, "improve", improve)
    monkeypatch.setattr(dno, "draw", lambda found, path: None)
    dno.main(["--seeds=2", "--seed=7", "--eval_queries=3", f"--out_dir={tmp_path}"])
    assert [s[:2] for s in seen] == [(7, True), (7, False), (7, True),
                                     (8, True), (8, False), (8, True)]
    assert [round(s[2]) for s in seen] == [1, 1, 0] * 2 and seen[0][2] == 1 > 0.05 > seen[2][2]


def grammar(model, tokenizer, task, asked, cfg, keys, temperature):
    """In place of sampling: the first of two responses is an answer of the toy's world."""
    words = {slot: both[0][0] for slot, both in task.rules.SLOTS.items()}
    for (query, constitution), key in zip(asked, keys):
        first, second = task.rules.things(query)
        text = task.rules.TEMPLATE.format(first=first, second=second, verb="sang", **words)
        text = "no answer" if key[3] else text
        prompt = sami.encode(tokenizer, task.sampling_prompt(query, constitution))[0]
        yield prompt, tokenizer(f" {text}").input_ids, text, True


def test_the_whole_command(tmp_path, monkeypatch):
    """results.json has every figure with its interval; the picture is there; offline's first
    iteration is that of DNO."""
    monkeypatch.chdir(path.parent.parent)
    monkeypatch.setattr(sami, "objective", dno.objective)
    monkeypatch.setattr(sami, "record", lambda cfg, row: None)
    monkeypatch.setattr(sami, "respond", grammar)
    monkeypatch.setattr("gc.collect", lambda: 0)  # a second for each of eight models
    monkeypatch.setattr(dno.Config, "k", 2)
    dno.main(["--seeds=2", "--iterations=1", "--queries=3", "--eval_queries=2", "--seed=3",
              f"--out_dir={tmp_path}/out"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["seeds"] == [3, 4] and (tmp_path / "out/picture.png").stat().st_size > 10_000
    for arm in (results, results["controls"]["offline"], results["controls"]["stranger"]):
        for name in ("before", "after", "effect", "over_last_2", "over_base_2"):
            x = arm[name]
            assert x["low"] <= x["mean"] <= x["high"] and len(x["seeds"]) == 2
            assert x["mean"] == pytest.approx(sum(x["seeds"]) / 2)
        assert arm["before"] == results["before"], "all begin with the base"
    offline, lead = results["controls"]["offline"], results["controls"]["lead_on_offline"]
    assert offline["after"]["seeds"] == results["after"]["seeds"] and lead["mean"] == 0
    assert results["before"]["mean"] < 1 and results["over_base_2"] == results["over_last_2"]
    assert dno.interval([1, 2, 3])["high"] == pytest.approx(2 + 4.30 / 3 ** 0.5)
