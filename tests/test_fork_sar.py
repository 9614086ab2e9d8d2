"""SAR pays an answer for what its question tells of it, a token on average: filler costs."""
import copy, importlib.util, json, math
from pathlib import Path

import pytest
import torch

import sami, tiny

path = Path(sami.__file__).parent / "forks" / "sar.py"
spec = importlib.util.spec_from_file_location("fork_sar", path)
sar = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sar)

SUMS = [("one plus two", "", 3), ("four", "", 4), ("six minus one plus three", "", 8)]
CFG = sar.Config(n=3, max_new_tokens=7)


def gain(v):
    """R_SA of an answer of whose tokens the question tells v nats each."""
    v = torch.tensor(v, dtype=torch.float64)
    return float(sar.self_aligned(v - 5, torch.full_like(v, -5)))


def official(asked, alone):
    """The released formula: two perplexities."""
    ppl = [math.exp(-sum(logp) / len(logp)) for logp in (asked, alone)]
    return max((ppl[1] - ppl[0]) / ppl[1], -1)


def collected(arm, cfg=CFG, sums=SUMS, model=None):
    model = model or tiny.model()
    return sar.collect(model, tiny.model(seed=1), tiny.tokenizer(), sums, arm, cfg, (1, 2))[0]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def advantage(batch):
    """One number an answer: (Q, n). Every token of an answer has the same one."""
    for row in batch:
        assert [len(a) for a in row[4]] == [len(y) for y in row[1]]
        assert all(len(set(a.tolist())) == 1 for a in row[4])
    return torch.tensor([[float(a[0]) for a in row[4]] for row in batch])


def test_the_formula_is_that_of_two_perplexities():
    """Without the exp of a large number, after which inf / inf is no reward at all."""
    rng = torch.Generator().manual_seed(1)
    for length in (1, 2, 30):
        asked, alone = -4 * torch.rand(2, length, generator=rng, dtype=torch.float64)
        found = float(sar.self_aligned(asked, alone))
        assert found == pytest.approx(official(asked.tolist(), alone.tolist()), abs=1e-9)
    one = torch.tensor([-1.0]), torch.tensor([-3.0])
    assert float(sar.self_aligned(*one)) == pytest.approx(1 - math.exp(-2))
    assert gain([0.0, 0.0]) == 0, "a question that tells nothing"
    # from below it is clipped where the question makes the answer twice as unlikely a token
    assert gain([-math.log(2) + 0.01]) > -1 and gain([-math.log(2) - 0.01]) == -1
    for far in (100.0, 800.0, 1e5):  # nats a token: exp(100) is inf in fp32, exp(800) in fp64
        unlikely, likely = torch.tensor([-far, -far]), torch.tensor([-1.0, -1.0])
        assert sar.self_aligned(unlikely, likely) == -1 and sar.self_aligned(likely, unlikely) == 1


def test_filler_dilutes():
    """Four tokens of which the question tells 2 nats each, in answers of growing length."""
    found = [gain([2.0] * 4 + [0.0] * (length - 4)) for length in (4, 8, 16, 32, 64, 128)]
    assert found == pytest.approx([0.865, 0.632, 0.393, 0.221, 0.118, 0.061], abs=5e-4)


def test_what_the_reward_cannot_see():
    """An echo of three numbers out of thirteen earns more than the right one and an end; a wrong
    question tells less than nothing, and an answer pads itself against that."""
    tells = math.log(13)  # nats of a number that the question makes certain
    assert gain([tells] * 3) == pytest.approx(12 / 13)
    assert gain([tells, 0.0]) == pytest.approx(1 - 13 ** -0.5)
    assert gain([tells, 0.0]) < gain([tells] * 3)
    assert gain([-1.0]) == -1 < gain([-1.0] + [0.0] * 3) < gain([-1.0] + [0.0] * 7) < 0


def test_the_last_number_counts():
    """In words or digits, anywhere in the text; a part of a word is no number."""
    for text in ("three", "so 3", "one plus two is three .", "4 no, Three. well now", "3. often"):
        assert sar.right(text, 3), text
    for text in ("", "well", "three four", "thirteen", "threefold", "3 13", "33"):
        assert not sar.right(text, 3), text
    assert sar.right("six", 6) and not sar.right("sixteen six 7", 6)


def test_advantages_keep_the_size_of_rewards():
    """Rows of mean 0. What is added to all changes nothing; twice alpha is twice the advantage of
    equally right answers, which division by their spread would make as large as right and wrong."""
    correct = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    aligned = torch.tensor([[0.5, 0.2, 0.3], [0.4, 0.1, 0.1]])
    found = sar.advantages(correct, aligned, 1, 0.2)  # rewards 1.1, 0.04, 1.06: 2.2 / 3 on average
    assert found[0].tolist() == pytest.approx([1.1 - 2.2 / 3, 0.04 - 2.2 / 3, 1.06 - 2.2 / 3])
    assert found[1].tolist() == pytest.approx([0.04, -0.02, -0.02], abs=1e-6)
    assert found.sum(1).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert torch.allclose(sar.advantages(correct, aligned + 7, 1, 0.2), found, atol=1e-6)
    assert torch.allclose(sar.advantages(correct, aligned, 1, 0.4)[1], 2 * found[1])
    assert sar.advantages(correct, aligned, 1, 0)[1].tolist() == [0, 0, 0]
    assert torch.allclose(sar.advantages(correct, aligned, 0, 0.2)[1], found[1])


def slope(log_ratio, advantage, base=0.0, **flags):
    """d loss / d log-prob of a token whose log-prob grew by log_ratio since it was sampled."""
    new = torch.tensor([log_ratio - 1], requires_grad=True)
    old, base, advantage = (torch.tensor([x]) for x in (-1.0, log_ratio - 1 + base, advantage))
    sar.token_loss(new, old, base, advantage, sar.Config(**flags)).sum().backward()
    return float(new.grad)


def test_the_clipped_loss_by_hand():
    """On fresh samples the slope is minus the advantage. Who has moved by more than a fifth in the
    wanted direction is pushed no further; who moved the wrong way is pushed back."""
    assert slope(0.0, 0.7) == pytest.approx(-0.7) and slope(0.0, -0.7) == pytest.approx(0.7)
    assert slope(0.1, 2.0) == pytest.approx(-2 * math.exp(0.1))
    assert slope(0.19, 1.0) == pytest.approx(0) and slope(-0.23, -1.0) == pytest.approx(0)
    assert slope(-0.23, 1.0) == pytest.approx(-math.exp(-0.23))
    assert slope(0.19, -1.0) == pytest.approx(math.exp(0.19))
    assert slope(0.19, 1.0, clip=0.3) == pytest.approx(-math.exp(0.19))
    # the base likes the token log 2 more: d/dx (r - 1 - log r) = 1 - r = -1
    assert slope(0.0, 0.0, base=math.log(2), kl=0.5) == pytest.approx(-0.5, abs=1e-6)


def test_a_batch_by_hand(monkeypatch):
    """Every answer scored alone, one row each: no padding, no neighbour, no gradient gets in."""
    # a random model is never right: another verifier, of the text and of its question's result
    monkeypatch.setattr(sar, "right", lambda text, result: (len(text) + result) % 2)
    model, base, tokenizer = tiny.model(), tiny.model(seed=1), tiny.tokenizer()
    batch, shown = sar.collect(model, base, tokenizer, SUMS, "sar", CFG, (1, 2))
    plain = lambda m, p, y: sami.plain_logps(m, [p], [[y]]).tolist()
    rewards, lengths = [], []
    for (x, _, result), (prompt, ids, old, before, each) in zip(SUMS, batch):
        assert tokenizer.decode(prompt) == f"Question: {x}\nAnswer:"
        empty = sar.ask(tokenizer, "")
        assert tokenizer.decode(empty) == "Question: \nAnswer:"
        for y, sampler, reference in zip(ids, old, before):
            assert sampler.tolist() == pytest.approx(plain(model, prompt, y), abs=1e-4)
            assert reference.tolist() == pytest.approx(plain(base, prompt, y), abs=1e-4)
            rewards.append(CFG.alpha * official(plain(model, prompt, y), plain(model, empty, y)))
            rewards[-1] += sar.right(tokenizer.decode(y, skip_special_tokens=True), result)
            lengths.append(len(y))
        assert not any(t.requires_grad for t in (*old, *before, *each))
    again = sami.sample(model, [row[0] for row in batch for _ in range(3)], temperature=1.0,
                        max_new_tokens=7, eos_ids=[0], seed=[(1, 2, i) for i in range(9)])
    assert [y for row in batch for y in row[1]] == again
    rewards = torch.tensor(rewards).view(3, 3)
    assert torch.allclose(advantage(batch), rewards - rewards.mean(1, keepdim=True), atol=1e-5)
    assert rewards.std(1).min() > 1e-3 and len(set(lengths)) > 1, "there is something to tell apart"
    assert shown[1] == pytest.approx(sum(lengths) / 9)


def test_without_alpha_it_is_grpo_bit_for_bit():
    """And `shuffled` hands each answer the reward of the one beside it in the next question."""
    none, found = sar.Config(n=3, max_new_tokens=7, alpha=0.0), []
    for arm in ("grpo", "sar", "shuffled"):
        model = tiny.model()
        batch = collected(arm, none, model=model)
        sar.improve(model, torch.optim.AdamW(model.parameters(), lr=1e-3), batch, none)
        found.append(weights(model))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    alone, mixed = (advantage(collected(arm)) for arm in ("alone", "shuffled"))
    assert torch.allclose(mixed, advantage(collected("grpo")) + alone.roll(1, 0), atol=1e-6)
    assert not torch.allclose(alone, alone.roll(1, 0), atol=1e-3)


def test_no_question_or_no_ear_for_it_is_no_reward():
    """The empty question tells nothing of its answers, nor any one to a model without attention."""
    assert advantage(collected("alone", sums=[("", "", 1), ("", "", 2)])).abs().max() < 1e-6
    assert advantage(collected("alone")).abs().max() > 1e-3
    deaf = tiny.model()
    for layer in deaf.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    # all answers begin behind the same ":", the only token that this one still reads
    assert advantage(collected("alone", model=deaf)).abs().max() < 1e-6


def test_a_step_by_hand():
    """Token losses are summed, then divided by the longest length and by answers; a step for each
    part of the batch, and the base stays what it is."""
    model, base, cfg = tiny.model(), tiny.model(seed=1), sar.Config(n=3, max_new_tokens=7, kl=0.1)
    batch = sar.collect(model, base, tiny.tokenizer(), SUMS, "sar", cfg, (1, 2))[0]
    before, theirs, hand = weights(base), copy.deepcopy(model), copy.deepcopy(model)
    sar.improve(theirs, torch.optim.SGD(theirs.parameters(), lr=1.0), batch, cfg)
    optimizer = torch.optim.SGD(hand.parameters(), lr=1.0)
    for part in (batch[0], batch[2]), (batch[1],):
        total = 0
        for prompt, ids, old, reference, each in part:
            for k, y in enumerate(ids):
                new = sami.plain_logps(hand, [prompt], [[y]])
                kl = (reference[k] - new).exp() - 1 - (reference[k] - new)
                ratio = (new - old[k]).exp()
                push = torch.minimum(ratio * each[k], ratio.clamp(0.8, 1.2) * each[k])
                total = total + (0.1 * kl - push).sum() / 7 / (3 * len(part))
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(hand.parameters(), 1.0)
        optimizer.step()
    assert torch.allclose(weights(theirs), weights(hand), atol=1e-5)
    assert (weights(theirs) - weights(model)).abs().max() > 1e-3
    assert torch.equal(weights(base), before)
    line = torch.nn.Linear(1, 1, bias=False)  # a gradient of 5 is cut to 1
    start = line.weight.item()
    sar.descend(line, torch.optim.SGD(line.parameters(), lr=1.0), 5 * line.weight.sum())
    assert line.weight.item() == pytest.approx(start - 1, abs=1e-5) and line.weight.grad is None


def test_a_chat_model_gets_an_empty_turn():
    """Without its question an answer still stands behind the system prompt and the frame."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% endif %}")
    text = "system: Reason, then answer.\nuser: {}\nassistant: "
    for x in ("one plus two", ""):
        assert tokenizer.decode(sar.ask(tokenizer, x)) == text.format(x)


def test_the_toy_is_right():
    """Its sums, its steps and its results agree; none comes twice, in training and in the test."""
    sums = sar.all_sums()
    assert len({x for x, *_ in sums}) == len(sums) == 517
    worth = {word: i for i, word in enumerate(sar.NUMBERS)}
    for x, steps, result in sums:
        a, p, b, q, c = x.split()
        half = worth[a] + worth[b] * (1 if p == "plus" else -1)
        assert result == half + worth[c] * (1 if q == "plus" else -1)
        assert steps == (f"{a} {p} {b} is {sar.NUMBERS[half]} . "
                         f"{sar.NUMBERS[half]} {q} {c} is {sar.NUMBERS[result]} .")


def test_figures_are_paired_intervals():
    """Student's t with seeds - 1 degrees of freedom: 1, 2, 3 is 2 +- 4.30 / sqrt(3)."""
    found = sar.figures(sar.np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]))
    assert found["accuracy"]["high"] - 2 == pytest.approx(4.30 / 3 ** 0.5, abs=1e-6)
    assert found["accuracy"]["seeds"] == [1, 2, 3] and found["tokens"]["low"] == 5


@pytest.mark.parametrize("given", ["", "model"])
def test_the_experiment(tmp_path, given, capsys, monkeypatch):
    """Its own small model or any other; `effect` is what sar has more than grpo, in pairs."""
    flags = [f"--out_dir={tmp_path}/out", "--seeds=2", "--steps=1", "--n=2", "--batch_size=2",
             "--pretrain=2", "--max_new_tokens=3"]
    if given:
        tiny.folder(tmp_path)
        monkeypatch.setattr(sar, "all_sums", lambda: [("one", "", 1)] * 155)  # short, and run once
        flags.append(f"--model={tmp_path}/base")
    asked = dict(load=set(), train=set(), test=set())

    def listening(*args, inner=sar.load):
        asked["load"].update(x for x, *_ in args[0])
        return inner(*args)

    def watching(*args, inner=sar.collect):
        asked["train" if args[-1][1] == 1 else "test"].update(x for x, *_ in args[3])
        return inner(*args)

    monkeypatch.setattr(sar, "load", listening)
    monkeypatch.setattr(sar, "collect", watching)
    sar.main(flags)
    if not given:
        assert len(asked["test"]) == 150 and 2 <= len(asked["train"]) <= 4
        assert not asked["test"] & (asked["load"] | asked["train"]), "sums that no arm has met"
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found.keys() >= {"before", "after", "effect", "controls", "seeds", "minutes"}
    differences = {"shuffled_minus_grpo", "sar_minus_shuffled", "alone_minus_grpo",
                   "grpo_minus_base"}
    assert found["controls"].keys() == {"grpo", "alone", "shuffled"} | differences
    assert found["effect"].keys() == {"accuracy", "tokens"} and found["seeds"] == [1, 2]
    level = dict(found["controls"], base=found["before"], sar=found["after"])
    level["sar_minus_grpo"] = found["effect"]
    for pair in (name for name in level if "minus" in name):
        ours, theirs = (level[name] for name in pair.split("_minus_"))
        for name, figure in level[pair].items():
            by_hand = [a - g for a, g in zip(ours[name]["seeds"], theirs[name]["seeds"])]
            assert figure["seeds"] == pytest.approx(by_hand, abs=1e-6)
            assert figure["mean"] == pytest.approx(sum(by_hand) / 2, abs=1e-6)
            assert figure["low"] <= figure["mean"] <= figure["high"]
    assert (tmp_path / "out" / "picture.png").stat().st_size > 1000
    assert "eta" in capsys.readouterr().out
