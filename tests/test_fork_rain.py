"""RAIN searches instead of learning: it finds what its judge likes, and is as good as that."""
import importlib.util, json
from pathlib import Path

import numpy as np
import pytest
import torch

import sami, tiny

path = Path(sami.__file__).parent / "forks" / "rain.py"
spec = importlib.util.spec_from_file_location("fork_rain", path)
rain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rain)


def family(*children):
    """A parent of children with these (p, n, v, e), whose ids are [0], [1], ..."""
    parent = rain.Node(32)
    for i, (p, n, v, e) in enumerate(children):
        child = rain.Node(31, [i], p, parent)
        child.n, child.visits, child.v, child.e = n, n, v, np.array(e, dtype=float)
        parent.children.append(child)
    parent.n = parent.visits = sum(n for _, n, _, _ in children)
    return parent


def letters(seed=0):
    """A small Llama as a model to search with: ids 60 and 61 end and mark."""
    model = tiny.model(seed).requires_grad_(False)
    model.tokens, model.ends, model.marks = 0, {60}, {60, 61}
    model.table = model.get_input_embeddings().weight.numpy()
    return model


def place(model, ids):
    return rain.reach(model, (rain.DynamicCache(), None), [ids])


def logits(model, ids):
    """The obvious way: the whole text, no cache -> (V,)."""
    return model(torch.tensor([ids]), use_cache=False).logits[0, -1]


def roots(monkeypatch, search):
    """Run a search -> what it returns, [(root, its visits when it came, when it was left)]."""
    seen, inner = [], rain.backup

    def backup(node, root, *rest):
        if not seen or seen[-1][0] is not root:
            seen.append([root, root.visits, 0])
        inner(node, root, *rest)
        seen[-1][2] = root.visits

    monkeypatch.setattr(rain, "backup", backup)
    return search(), seen


def test_equation_1_by_hand():
    """Mean scores from -1 to 1 count as 0 to 1; who was never visited counts as worst, and is
    chosen by p alone; with c = 0 the best v is."""
    one = family((0.5, 3, 0.5, [1]), (0.3, 0, 0, [1]), (0.2, 6, -1, [1]))
    by_hand = [0.75 + 2 * 0.5 * 3 / 4, 0 + 2 * 0.3 * 3 / 1, 0 + 2 * 0.2 * 3 / 7]
    assert one.worths(2).tolist() == pytest.approx(by_hand)
    assert one.worths(0).tolist() == pytest.approx([0.75, 0, 0])
    new = family((0.5, 0, 0, [1]), (0.3, 0, 0, [1]), (0.2, 0, 0, [1]))
    new.n = 1
    assert new.worths(2).tolist() == pytest.approx([1.0, 0.6, 0.4]), "in the order of p"
    shared = [2 * (0.75 * p + 0.25 / 3) for p in (0.5, 0.3, 0.2)]
    assert new.worths(2, 0.25).tolist() == pytest.approx(shared), "a quarter is spread evenly"


def test_the_greedy_child_hides_nobody_and_is_not_hidden():
    """Its p is at most that of all others together, at least the next one's and the last one's."""
    for p in (0.98, 0.001):  # the sum of two is also the largest and the smallest of them
        new = family((p, 0, 0, [1]), (0.01, 0, 0, [1]), (0.01, 0, 0, [1]))
        new.n = 1
        assert new.worths(1).tolist() == pytest.approx([0.5, 0.25, 0.25])
    for p, expected in ((0.9, [5, 2, 2, 1]), (0.01, [3, 2, 2, 1])):  # 0.25 all, 0.15 = 0.1 + 0.05
        new = family((p, 0, 0, [1]), *[(q, 0, 0, [1]) for q in (0.1, 0.1, 0.05)])
        new.n = 1
        assert new.worths(1).tolist() == pytest.approx(np.array(expected) / sum(expected))
    four = family((0.2, 0, 0, [1]), (0.1, 0, 0, [1]), (0.1, 0, 0, [1]), (0.05, 0, 0, [1]))
    four.n = 1
    assert four.worths(1).tolist() == pytest.approx(np.array([4, 2, 2, 1]) / 9), "0.15 < 0.2 < 0.25"
    only = family((0.3, 0, 0, [1]))
    only.n = 1
    assert only.worths(1).tolist() == [1]


def test_v_is_the_mean_score_of_all_that_passed():
    """Without credit n counts visits; e is the mean of the unit embeddings of the texts from there
    on; nodes above the root are left alone."""
    above = rain.Node(9)
    root = rain.Node(8, [0], 1.0, above)
    a = rain.Node(7, [1], 1.0, root)
    b = rain.Node(6, [2], 1.0, a)
    root.children, a.children = [a], [b]
    table = np.array([[9.0, 9.0], [3.0, 0.0], [0.0, 4.0]])
    for leaf, tail, s in ((a, [], 1), (b, [], -1), (b, [2], 1), (b, [], 0)):
        rain.backup(leaf, root, tail, s, table, 0.2)
    assert (root.v, root.n, root.visits) == (0.25, 4, 4) and (b.v, b.n) == (0, 3)
    assert (a.v, a.n) == (0.25, 4) and above.n == above.visits == 0
    texts = np.array([[3, 0], [3, 4], [3, 8], [3, 4]])  # a; a b, a b b, a b: sums are enough
    assert a.e == pytest.approx((texts / np.linalg.norm(texts, axis=1)[:, None]).mean(0))
    assert b.e == pytest.approx([0, 1]), "what follows the node, and not what leads to it"


@pytest.mark.parametrize("gamma,cosine,visits,credit", [
    (0.2, 1.0, 2, 0.2), (0.2, 0.96, 2, 0.192), (0.2, 0.94, 2, 0), (0, 1.0, 2, 0), (0.2, 1.0, 0, 0)])
def test_equation_2_by_hand(gamma, cosine, visits, credit):
    """v' = (v n + gamma cos s) / (n + gamma cos), n' = n + gamma cos above 0.95; who was never
    visited has no embedding and no credit; credit is no visit."""
    e = [cosine, (1 - cosine**2) ** 0.5]
    parent = family((0.5, 0, 0, [0, 0]), (0.5, visits, 0.5, e))
    node, sibling = parent.children
    parent.n = parent.visits = visits
    v = 0.5 if visits else 0
    sibling.v = v
    rain.backup(node, parent, [], -1, np.array([[5.0, 0.0]]), gamma)
    assert node.v == -1 and node.n == 1 and sibling.visits == visits and parent.n == visits + 1
    assert sibling.n == pytest.approx(visits + credit)
    if visits:
        lent = (v * visits - credit) / (visits + credit)
        assert sibling.v == pytest.approx(lent)
        rain.backup(sibling, parent, [], 1, np.array([[1.0, 0.0], [0.0, 1.0]]), 0)
        by_hand = (lent * (visits + credit) + 1) / (visits + credit + 1)
        assert sibling.v == pytest.approx(by_hand), "what was lent goes on to weigh"


def test_when_one_more_child_is_added():
    """All are visited, all are bad, and their embeddings vary by less than 0.03 a token."""
    bad = (0.5, 1, -0.5, [1, 0])
    assert family(bad, bad).stuck()
    assert not family(bad).stuck() and not family(*[bad] * 20).stuck()
    assert family(*[bad] * 19).stuck()
    assert not family(bad, bad, (0.5, 0, -0.5, [1, 0])).stuck(), "one was not visited"
    assert not family(bad, (0.5, 1, 0.1, [1, 0])).stuck(), "one is good"
    for apart, alike in ((0.2, True), (0.3, False)):  # variances of two: 0.02 and 0.045
        assert family(bad, (0.5, 1, -0.5, [1 + apart, 0])).stuck() == alike
    longer = family(bad, (0.5, 1, -0.5, [1.3, 0]))
    longer.children[0].ids = [0, 0]
    assert longer.stuck(), "of two tokens each: 0.045 < 0.06"


def test_what_a_node_sprouts():
    """Greedy first, then samples, none of them twice; who comes later is not greedy again."""
    model, prompt = letters(), [5, 6, 7]
    node = rain.Node(30, [8], 1.0, rain.Node(31))
    node.place, node.text = place(model, prompt + [8]), [8]
    rain.sprout(model, node, 10, np.random.default_rng(1))
    ids, text = [k.ids for k in node.children], prompt + [8]
    for token in ids[0]:
        assert token == int(logits(model, text).argmax())
        text.append(token)
    assert len({*map(tuple, ids)}) == len(ids) > 3 and {len(x) for x in ids if 60 not in x} == {2}
    assert all(k.left == (0 if 60 in k.ids else 28) and k.parent is node for k in node.children)
    assert all(k.text == [8] + k.ids for k in node.children)
    for seed in range(9):  # of nine, some are known already
        rain.sprout(model, node, 1, np.random.default_rng(seed))
    more = [tuple(k.ids) for k in node.children]
    assert more[:len(ids)] == [*map(tuple, ids)] and len({*more}) == len(more)
    assert len(ids) < len(more) < len(ids) + 9


def test_probabilities_behind_a_cache_are_those_of_plain_scoring():
    """Noise 0 is greedy, noise near 1 the last of the `width` likeliest; p is the product of what
    tokens have among these; whoever meets a stop ends there."""
    model, prompt = letters(), [5, 6, 7]
    start = place(model, prompt)
    noise = np.array([[0, 0, 0], [0.999999, 0, 0], [0.4, 0.7, 0.2]])
    for width in (1, 15, 10**9):
        for row, (ids, p) in enumerate(rain.write(model, start, width, set(), noise)):
            expected = 1.0
            for t, token in enumerate(ids):
                share, order = logits(model, prompt + ids[:t]).softmax(-1).sort(descending=True)
                share = (share[:width] / share[:width].sum()).tolist()
                rank = order.tolist().index(token)
                assert sum(share[:rank]) - 1e-5 <= noise[row, t] <= sum(share[:rank + 1]) + 1e-5
                expected *= share[rank]
            assert p == pytest.approx(expected, rel=1e-4) and len(ids) == 3
    model.tokens = 0
    (ids, p), *_ = whole = rain.write(model, start, 15, set(), noise)
    assert model.tokens == 3 * 2, "the first tokens cost nothing: their logits are there"
    cut = rain.write(model, start, 15, {whole[2][0][1]}, noise)
    assert cut[2][0] == whole[2][0][:2] and cut[2][1] > whole[2][1] and cut[0] == whole[0]
    assert rain.write(model, start, 15, {ids[0]}, noise[:1])[0][0] == ids[:1]
    assert rain.write(model, start, 15, set(), noise[:, :0]) == [([], 1.0)] * 3


def test_a_place_in_the_tree_is_what_its_whole_text_leads_to(monkeypatch):
    """Behind the caches of its ancestors each node has the logits of the plain way; the tokens that
    are counted are those that the model is given, and no text is run from its start."""
    model, cfg, given, seen = letters(), rain.Config(max_new_tokens=12, most=12), [], []
    model.ends = set()
    inner, forward = rain.sprout, model.forward

    def sprout(model, node, *rest):
        seen.append((node.text, node.place[1][0].clone()))
        inner(model, node, *rest)

    def counted(ids, *args, **how):
        given.append(ids.shape)
        return forward(ids, *args, **how)

    monkeypatch.setattr(rain, "sprout", sprout)
    monkeypatch.setattr(model, "forward", counted)
    judge = lambda ids: 1 if sum(ids) % 3 else -1
    text = rain.rain(model, [5, 6, 7], judge, cfg, (3,))
    assert model.tokens == sum(rows * length for rows, length in given)
    assert given[0] == (1, 3) and max(length for _, length in given[1:]) <= 10
    monkeypatch.setattr(model, "forward", forward)
    assert len({len(ids) for ids, _ in seen}) > 3
    for ids, found in seen:
        assert found.tolist() == pytest.approx(logits(model, [5, 6, 7] + ids).tolist(), abs=1e-4)
    assert text == rain.rain(model, [5, 6, 7], judge, cfg, (3,)), "a function of the key"


def test_what_is_committed_is_never_edited(monkeypatch):
    """Roots are prefixes of each other: 1, 2, 4, 10 tokens further, and the rest; a new root keeps
    what it counted and its children; an end ends, and so does the length."""
    model, [(prompt, judge)] = rain.toy(3, 1)
    model.tokens = 0
    search = lambda: rain.rain(model, prompt, judge, rain.Config(), (3,))
    text, seen = roots(monkeypatch, search)
    assert [len(root.text) for root, *_ in seen] == [0, 1, 3, 7, 17]
    assert all(text[:len(root.text)] == root.text for root, *_ in seen) and len(text) == 25
    assert seen[-1][0].children[0].text == text
    assert text[-1] in model.ends and not model.ends & {*text[:-1]}
    for (old, *_), (new, came, _) in zip(seen, seen[1:]):
        assert old.children == [new] and came > 0 and new.children
    assert len(rain.rain(model, prompt, judge, rain.Config(max_new_tokens=9), (3,))) == 9


def test_when_a_child_is_committed(monkeypatch):
    """Where all is well at the seventh visit; where all is bad at the 50th of the root, those from
    before counted, but after 15 new ones at least; the most visited is."""
    model, [(prompt, _)] = rain.toy(3, 1)
    model.tokens = 0
    search = lambda s: lambda: rain.rain(model, prompt, lambda ids: s, rain.Config(), (3,))
    _, good = roots(monkeypatch, search(1))
    assert good[1][1] == 7, "more than six"
    _, bad = roots(monkeypatch, search(-1))
    assert bad[0][1:] == [0, 50]
    for (_, _, left), (_, came, gone) in zip(bad, bad[1:]):
        assert gone == max(50, came + 15) and came < left
    few = lambda: rain.rain(model, prompt, lambda ids: -1, rain.Config(most=5), (3,))
    _, few = roots(monkeypatch, few)
    assert few[0][2] == 5 and all(gone == came + 15 for _, came, gone in few[1:])
    first = rain.rain(model, prompt, lambda ids: -1, rain.Config(most=1, max_new_tokens=1), (3,))
    likeliest = model(torch.tensor([prompt])).logits[0, -1].argmax()
    assert first == [int(likeliest)], "T = 1: of equals the likeliest"


def test_the_judge_reads_up_to_the_next_mark_and_no_text_twice(monkeypatch):
    """A text in the middle of a clause is finished before it is judged; one at its end, here behind
    the object, is judged as it is. At the root, and there alone, p is spread a little."""
    model, [(prompt, _)] = rain.toy(3, 1)
    objects = {*np.arange(260).reshape(26, 10)[3::4].flat}
    model.tokens, model.marks, read, tails, flats, calls = 0, model.ends | objects, [], [], [[]], []
    inner, worths = rain.backup, rain.Node.worths

    def backup(node, root, tail, *rest):
        if not calls:  # from the leaf, not from one of its children
            tails.append((node, list(tail)))
            flats.append([])
        calls.append(node)
        inner(node, root, tail, *rest)
        calls.pop()

    monkeypatch.setattr(rain, "backup", backup)
    monkeypatch.setattr(rain.Node, "worths", lambda self, c, flat=0: (
        flats[-1].append(flat), worths(self, c, flat))[1])
    judge = lambda ids: read.append([*ids]) or 1 - 2 * (sum(ids) % 2)
    rain.rain(model, prompt, judge, rain.Config(), (3,))
    assert len(read) == len({*map(tuple, read)}) > 20
    assert all(ids[-1] in model.marks for ids in read)
    ended = [not tail for node, tail in tails if node.ids]
    assert ended == [node.ids[-1] in model.marks for node, _ in tails if node.ids]
    assert 0.2 < np.mean(ended) < 0.8
    flats = [x for x in flats if x]
    assert {x[0] for x in flats} == {0.25} and {y for x in flats for y in x[1:]} == {0}


def test_where_all_is_alike_and_bad_more_is_tried(monkeypatch):
    """With words that all mean the same, a node that only finds bad ones grows beyond ten."""
    counts, inner = {}, rain.backup

    def backup(node, *rest):
        counts[tuple(node.text)] = len(node.children)
        inner(node, *rest)

    monkeypatch.setattr(rain, "backup", backup)
    for s, table in ((-1, np.ones((260, 2))), (1, np.ones((260, 2))), (-1, None)):
        model, [(prompt, _)] = rain.toy(3, 1)
        model.tokens, model.table = 0, model.table if table is None else table
        counts.clear()
        rain.rain(model, prompt, lambda ids: s, rain.Config(max_new_tokens=7), (3,))
        assert (max(counts.values()) > 10) == (s == -1 and table is not None)


def test_a_judge_is_wrong_about_the_same_texts_each_time():
    judge = lambda ids: 1 if ids[0] % 2 else -1
    texts = [(i, 5) for i in range(2000)]
    for error in (0, 0.3, 1):
        told = rain.wrong(judge, error, (1, 2))
        flipped = [told(ids) != judge(ids) for ids in texts]
        assert flipped == [told(ids) != judge(ids) for ids in texts]
        assert np.mean(flipped) == pytest.approx(error, abs=0.035 * (0 < error < 1))
    other = rain.wrong(judge, 0.3, (1, 3))
    told = rain.wrong(judge, 0.3, (1, 2))
    assert 0.3 < np.mean([told(ids) != other(ids) for ids in texts]) < 0.54, "0.42 of them"


def test_letters_are_asked_in_both_orders(tmp_path, monkeypatch):
    """Who always says A has said nothing; who means it says so in both orders. And the cached,
    batched question is the plain one: examples, query, answer, options."""
    monkeypatch.chdir(path.parent.parent)
    tiny.folder(tmp_path)
    cfg, given, load = rain.Config(model=f"{tmp_path}/base", limit=2), [], sami.load_model

    def watched(*args):
        model = load(*args)
        forward = model.forward
        model.forward = lambda ids, **how: given.append(ids.tolist()) or forward(ids, **how)
        return model

    monkeypatch.setattr(sami, "load_model", watched)
    model, items = rain.own(cfg)
    A, B, newline = (tiny.LETTERS.index(x) for x in "AB\n")
    assert newline in model.ends and tiny.LETTERS.index(",") in model.marks - model.ends
    assert 0 in model.ends and tiny.LETTERS.index("a") not in model.marks
    encode = lambda text: sami.encode(tiny.tokenizer(), text)[0]
    sides, shots = [("harmless", "harmful"), ("harmful", "harmless")], ""
    for shot, answers in rain.SHOTS:
        for side, answer in zip(sides, answers):
            shots += f"{shot}{rain.OPTIONS.format(*side)}{answer})\n\n"
    query = json.loads((Path("data/hh/test.jsonl")).read_text().splitlines()[1])["query"]
    asked = [encode(rain.OPTIONS.format(*side)) for side in sides]
    assert given[1] == [encode(f"{shots}Human: {query}\nAssistant:")] * 2
    for ids in ([3, 4, 5], [9], [7, 7, 20, 30]):
        given.clear()
        verdict, votes = items[1][1](ids), []
        assert given == [[ids + asked[0], ids + asked[1]]] and asked[0] != asked[1]
        for option, harmless, harmful in zip(asked, (A, B), (B, A)):
            z = logits(model, encode(f"{shots}Human: {query}\nAssistant:") + ids + option)
            votes.append(1 if z[harmless] > z[harmful] else -1)
        assert verdict == sum(votes) / 2
    assert items[1][0] == encode(f"Human: {query}\nAssistant:")
    inner = model.forward
    for biased, expected in (((A, A), 0), ((B, B), 0), ((A, B), 1), ((B, A), -1)):
        def forward(*args, **how):
            out = inner(*args, **how)
            for row, letter in zip(out.logits, biased):
                row[:, letter] += 100
            return out
        monkeypatch.setattr(model, "forward", forward)
        assert items[0][1]([3, 4]) == expected
    model.tokens = 0
    items[0][1]([3])
    assert model.tokens == 0, "judgement is free, for best of N too"


def test_the_toy_is_what_it_says():
    """Words lead to the ten of the next place; synonyms are harmful together, 40 % of the verbs; by
    enumeration 0.6 ** 6 of the answers are harmless on average."""
    model, items = rain.toy(4, 400)
    p = model(torch.arange(250)[None]).logits[0].softmax(-1)  # (250, 260)
    for place in range(25):
        then = p[10 * place:10 * place + 10, 10 * place + 10:10 * place + 20]
        assert then.sum(1).tolist() == pytest.approx([1] * 10, abs=1e-5)
    verbs = [range(20 + 40 * k, 30 + 40 * k) for k in range(6)]
    good = np.array([[[judge((i,)) > 0 for i in clause] for clause in verbs] for _, judge in items])
    assert (good[:, :, ::2] == good[:, :, 1::2]).all()
    assert good.mean() == pytest.approx(0.6, abs=0.02)
    assert all(judge((0, 11, 35, 45, 259)) == 1 for _, judge in items), "other words never are"
    shares = []
    for ([topic], judge), ok in zip(items, good):
        reach = torch.zeros(260).index_fill(0, torch.tensor([topic]), 1.0)
        for place in range(25):
            reach = reach[:250] @ p
            if place % 4 == 1:
                low = 10 * place + 10
                reach[low:low + 10] *= torch.tensor(ok[place // 4])
        shares.append(float(reach.sum()))
    assert np.mean(shares) == pytest.approx(0.6**6, abs=0.01)


def test_the_whole_command(tmp_path, monkeypatch):
    """results.json has every figure with its interval; best of N has RAIN's tokens; who is always
    lied to finds what is harmful."""
    monkeypatch.setattr(rain, "ERRORS", ("0", "1"))
    rain.main(["--limit=2", "--most=8", "--seed=3", f"--out_dir={tmp_path}/out"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["seeds"] == [3, 4, 5, 6, 7] and results["minutes"] > 0
    assert (tmp_path / "out/picture.png").stat().st_size > 10_000
    assert set(results) == {*rain.NAMES, "controls", "seeds", "minutes"}
    right, lied = (results["controls"][e] for e in ("0", "1"))
    assert {k: results[k] for k in rain.NAMES} == right and right["before"] == lied["before"]
    for arm in (right, lied):
        for x in arm.values():
            assert x["mean"] == pytest.approx(np.mean(x["seeds"])) and len(x["seeds"]) == 5
            half = 2.776 * np.std(x["seeds"], ddof=1) / 5**0.5
            assert x["high"] - x["mean"] == pytest.approx(half) == x["mean"] - x["low"]
        seeds = {k: np.array(x["seeds"]) for k, x in arm.items()}
        assert seeds["effect"] == pytest.approx(seeds["after"] - seeds["before"])
        assert seeds["lead"] == pytest.approx(seeds["after"] - seeds["best_of_n"])
        over = seeds["tokens"] / 25 - seeds["n"]  # an answer has 25 tokens: what is left is less
        assert (0 <= over).all() and (over < 1).all()
    assert right["after"]["mean"] > lied["after"]["mean"] == lied["best_of_n"]["mean"] == 0
