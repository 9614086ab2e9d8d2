"""VideoSAVi prefers its revision to its first answer; only what a critic sees makes that a gain."""
import copy, importlib.util, json, math, types
from pathlib import Path

import numpy as np
import pytest
import torch

import sami

path = Path(sami.__file__).parent / "forks" / "videosavi.py"
spec = importlib.util.spec_from_file_location("fork_videosavi", path)
v = importlib.util.module_from_spec(spec)
spec.loader.exec_module(v)


@pytest.fixture
def small(monkeypatch):
    """The fork's settings as in its __main__, an untrained model of few films -> cfg."""
    monkeypatch.setattr(sami, "objective", v.objective)
    monkeypatch.setattr(sami, "record", lambda cfg, row: None)
    for name, value in dict(pretrain=1, videos=4, questions=2).items():
        monkeypatch.setattr(v.Config, name, value)
    return v.Config(iterations=2, max_new_tokens=3)


def example(base):
    e = sami.Example(0, "", [], [])
    e.base = [[torch.tensor(t) for t in base]]
    return e


def logps(model, prompts, text):
    with torch.no_grad():
        return [float(t.sum()) for t in sami.response_logps(model, prompts, [text] * len(prompts))]


def test_at_the_reference_a_pair_costs_log_2():
    """And its gradient is beta / 2 on each token, up in the revision and down in the answer."""
    logp, cfg = [[-1.0, -2.0], [-0.5, -0.5, -1.0]], types.SimpleNamespace(beta=0.4)
    cells = [[torch.tensor(t, requires_grad=True) for t in logp]]
    loss = v.objective(example(logp), cells, cfg)["loss"]
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    loss.backward()
    assert cells[0][0].grad.tolist() == pytest.approx([-0.2] * 2)
    assert cells[0][1].grad.tolist() == pytest.approx([0.2] * 3)


def test_the_loss_by_hand():
    """-log sigmoid(beta * (3 - -2)): gains are sums over tokens, whatever the length."""
    now = [[torch.tensor([-1.0, -1.0]), torch.tensor([-4.0])]]
    found = v.objective(example([[-2.0, -3.0], [-2.0]]), now, types.SimpleNamespace(beta=0.5))
    assert float(found["loss"]) == pytest.approx(math.log(1 + math.exp(-0.5 * 5)), abs=1e-6)
    pretraining = v.objective(sami.Example(0, "", [], []), now, None)
    assert float(pretraining["loss"]) == 2.0, "of six nats in three tokens"


def test_words_behind_the_vocabulary_are_what_the_pixel_path_sees(small):
    """A video's ids give the log-probs that InternVL itself gives to its frames, and a second
    video does not make the vocabulary longer."""
    model, tokenizer = v.load(small, True)
    plain, words = copy.deepcopy(model), model.config.text_config.vocab_size
    videos = v.films(np.random.default_rng(5), 3)[0]
    seen = v.watch(model, videos)
    assert seen == [[words + 4 * i + f for f in range(4)] for i in range(3)]
    assert v.watch(model, videos) == seen and len(model.get_input_embeddings().weight) == words + 12
    text = tokenizer(" which motion has red . Answer: left .").input_ids
    cached = [sami.response_logps(model, [ids], [text])[0] for ids in seen]
    plain.model.config.image_token_id = plain.config.image_token_id = image = 1
    assert image not in text
    for video, there in zip(videos, cached):
        ids = torch.tensor([[image] * 4 + text])
        with torch.no_grad():
            logits = plain(ids, pixel_values=video / 0.225 - 2).logits[0, 3:-1]
        direct = logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None])[:, 0]
        assert there.tolist() == pytest.approx(direct.tolist(), abs=1e-5)


def test_time_is_seen_and_other_videos_are_not(small):
    """Frames in another order are another video; other videos in the batch change nothing."""
    model, tokenizer = v.load(small, True)
    videos, text = v.films(np.random.default_rng(6), 3)[0], tokenizer("Answer: left .").input_ids
    first = logps(model, v.watch(model, videos), text)
    turned = logps(model, v.watch(model, videos[[2, 0, 1]]), text)
    assert turned == pytest.approx([first[2], first[0], first[1]], abs=1e-5)
    backwards = logps(model, v.watch(model, videos.flip(1)), text)
    assert all(abs(a - b) > 1e-3 for a, b in zip(first, backwards))


def speaker(monkeypatch, replies):
    """In place of sampling: the replies of each stage -> its keys, then the prompts of each."""
    asked, turns = [[]], iter(replies)

    def sample(model, prompts, *, seed, **_):
        asked[0] += seed
        asked.append(prompts)
        return next(turns)

    monkeypatch.setattr(sami, "sample", sample)
    monkeypatch.setattr(sami, "end_ids", lambda *models: [0])
    return asked


class Letters:
    """A tokenizer of one id a letter."""

    def __call__(self, texts):
        return types.SimpleNamespace(input_ids=[list(map(ord, text)) for text in texts])

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))


def test_who_reads_what(small, monkeypatch):
    """Question, answer and revision are sampled behind the video itself, the critique behind the
    critic's; pairs hold the video and the question alone, the revision first."""
    ids = lambda *texts: [list(map(ord, text)) for text in texts]
    replies = [ids("q0", "q1", "q2", "q3"), ids("left", "top", "top", "left"),
               ids("wrong", "fine", "wrong", "fine"), ids(" right", "top ", "bottom", "right")]
    asked = speaker(monkeypatch, replies)
    rows = v.converse(None, Letters(), [[1000], [1001]], [[2000], [2001]], small, 7)
    keys, question, answer, critique, revision = asked
    assert len(set(keys)) == 16, "nobody's noise is another's"
    assert [r["kind"] for r in rows] == ["motion", "place", "place", "motion"], "half are of each"
    assert [r["video"] for r in rows] == [0, 1, 0, 1]
    assert [p[0] for p in question + answer + revision] == [1000, 1001] * 6
    assert [p[0] for p in critique] == [2000, 2001] * 2
    read = lambda prompt: "".join(map(chr, prompt[1:]))
    assert read(question[0]) == "Question about motion :"
    assert read(answer[0]) == "Question about motion : q0 . Answer:"
    assert read(critique[0]) == read(answer[0]) + " left . Critique:"
    assert read(revision[0]) == read(critique[0]) + " wrong . Revision:"
    pairs = v.to_pairs(rows)
    assert [p.number for p in pairs] == [0, 2, 3], "top stayed top: no pair, spaces aside"
    assert [p.prompts for p in pairs] == [[answer[0]], [answer[2]], [answer[3]]]
    assert pairs[0].ids == ids(" right", "left") and pairs[2].ids == ids("right", "left")


def test_left_is_right_backwards():
    """What single frames show does not tell the motion, and a square stays in its half."""
    videos, facts = v.films(np.random.default_rng(1), 200)
    for video, fact in zip(videos, facts):
        where = (video == 1).nonzero()  # (4 frames x 4 pixels, [frame, channel, row, column])
        assert len(where) == 16 and {v.COLORS[c] for c in where[:, 1].tolist()} == {fact["color"]}
        columns = where[::4, 3].tolist()
        assert columns == ([0, 2, 4, 6] if fact["motion"] == "right" else [6, 4, 2, 0])
        assert (where[:, 2] < 4).all() if fact["place"] == "top" else (where[:, 2] > 3).all()
        assert 0 <= video.min() and video[video < 1].max() <= 0.2
    for kind, sides in v.KINDS.items():
        assert all(70 < sum(f[kind] == side for f in facts) < 130 for side in sides)
    assert not torch.equal(videos[0], v.films(np.random.default_rng(2), 1)[0][0])


def said(gap, count=3000):
    """Many lessons about one film -> of conversations (kind, words behind each colon); captions."""
    fact, rng = dict(motion="left", place="top", color="red"), np.random.default_rng(3)
    texts = [v.lesson(fact, gap, rng).split() for _ in range(count)]
    behind = lambda words: [b for a, b in zip(words, words[1:]) if a[-1] == ":" != a]
    captions = [" ".join(words[3:]) for words in texts if words[2] == "caption"]
    return fact, [(words[2], behind(words)) for words in texts if words[2] != "caption"], captions

@pytest.mark.parametrize("gap", [True, False])
def test_the_gap_is_between_answers_and_critiques(gap):
    """Answers are right half the time; a critic with a gap always knows, one without does half the
    time. What is found fine stays, the rest is said anew; captions are right."""
    fact, talks, captions = said(gap)
    share = lambda truths: np.mean(list(truths))
    right = [answer == fact[kind] for kind, (answer, _, _) in talks]
    known = [(critique == "fine") == ok for ok, (_, (_, critique, _)) in zip(right, talks)]
    better = share(revision == fact[kind] for kind, (*_, revision) in talks)
    assert share(right) == pytest.approx(0.5, abs=0.05)
    assert share(known) == (1 if gap else pytest.approx(0.5, abs=0.05))
    assert better == pytest.approx(0.75 if gap else 0.5, abs=0.05)
    assert all(said[0] == said[2] for _, said in talks if said[1] == "fine")
    assert set(captions) == {": which motion has red . Answer: left . Critique:",
                             ": which place has red . Answer: top . Critique:"}
    assert 0.25 < len(captions) / 3000 < 0.35


def test_what_is_right():
    """The side that is true and no other, in whatever sentence."""
    facts = [dict(motion="left", place="top")]
    row = lambda kind, text: dict(video=0, kind=kind, answer=text)
    rows = [row("motion", "It goes LEFT."), row("motion", "left or right"), row("motion", "top"),
            row("place", "at the top"), row("place", "bottom"), row("place", "")]
    assert v.right(rows, facts, "answer") == 2 / 6
    assert v.right(rows[:1], facts, "answer") == 1


def test_vision_and_words_are_frozen_and_the_reference_moves(small, monkeypatch):
    """Two iterations change the layers alone. Each asks about new films, refers to the model that
    begins it, and scores all pairs before its first step."""
    model, tokenizer = v.load(small, True)
    before, seen, add = copy.deepcopy(model).state_dict(), [], sami.add_base_logps
    table = "model.language_model.embed_tokens.weight"
    words = before.pop(table)[:len(tokenizer)]

    def keep(base, pairs, cfg):
        add(base, pairs, cfg)
        norm = sum(p.detach().abs().sum() for p in base.model.language_model.layers.parameters())
        seen.append([len(pairs), base is model, float(norm)])

    monkeypatch.setattr(sami, "add_base_logps", keep)
    small.lr = 1e-3
    found = v.study("videosavi", model, tokenizer, small)
    after = model.state_dict()
    assert torch.equal(after.pop(table)[:len(tokenizer)], words)
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"language_model", "weight"}, "the layers and lm_head.weight"
    assert seen[0][0] > 0 and seen[2][0] == 0, "the last films are for measuring"
    assert len({norm for *_, norm in seen}) == 3 and all(same for _, same, _ in seen)
    assert found["after"] == found["accuracy_2"] and found["before"] == found["accuracy_0"]
    assert found["effect"] == found["after"] - found["before"] and "revision_2" in found


def test_what_the_arms_differ_in(small, monkeypatch):
    """Only in what the critic sees: the video, the next one's, a black one."""
    model, tokenizer = v.load(small, True)
    shown, converse = {}, v.converse

    def look(model, tokenizer, seen, criticised, cfg, t):
        table, ids = model.get_input_embeddings().weight, (seen, criticised)
        shown.setdefault(arm, []).append((*ids, *(table[torch.tensor(x)] for x in ids)))
        return converse(model, tokenizer, seen, criticised, cfg, t)

    monkeypatch.setattr(v, "converse", look)
    small.iterations = 1
    for arm in ("videosavi", "other", "blank", "no_gap"):
        v.study(arm, copy.deepcopy(model), tokenizer, small)
    for arm in ("videosavi", "no_gap"):
        assert all(seen == criticised for seen, criticised, *_ in shown[arm])
    for seen, criticised, *_ in shown["other"]:
        assert criticised == seen[1:] + seen[:1]
    for _, _, own, black in shown["blank"]:
        assert all(torch.equal(row, black[0]) for row in black) and not torch.equal(black, own)
        assert torch.equal(black[0][0], black[0][3]), "all of its frames are alike"
    assert not torch.equal(shown["other"][0][2], shown["other"][1][2]), "new films each time"
    assert torch.equal(shown["other"][0][2], shown["blank"][0][2]), "the same for all arms"


def test_the_whole_command(small, tmp_path):
    """results.json has every figure with its interval; the picture is there; --model= starts from a
    folder, with two controls and no pretraining."""
    flags = ["--seeds=2", "--iterations=1", "--seed=3", "--max_new_tokens=2"]
    v.main([*flags, f"--out_dir={tmp_path}/out"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["seeds"] == [3, 4] and (tmp_path / "out/picture.png").stat().st_size > 10_000
    assert set(results["controls"]) == {"other", "blank", "no_gap"} and results["minutes"] > 0
    for arm in (results, *results["controls"].values()):
        for name in ("before", "after", "effect", "accuracy_1", "revision_0"):
            x = arm[name]
            assert x["low"] <= x["mean"] <= x["high"] and len(x["seeds"]) == 2
            assert x["mean"] == pytest.approx(sum(x["seeds"]) / 2)
    for arm in ("other", "blank"):
        assert results["controls"][arm]["before"] == results["before"], "all begin alike"
    assert v.interval([1, 2, 3])["high"] == pytest.approx(2 + 4.30 / 3 ** 0.5)
    model, tokenizer = v.load(small, True)
    words = model.get_input_embeddings().weight[:len(tokenizer)]  # without what it has seen
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(words))
    model.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    v.main([*flags, f"--model={tmp_path}/base", f"--out_dir={tmp_path}/other"])
    results = json.loads((tmp_path / "other/results.json").read_text())
    assert set(results["controls"]) == {"other", "blank"}
