"""Settings are compared seed by seed, and a setting changes one thing: what its name says."""
import dataclasses, json, math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import ablations, sami, tiny

CFG = sami.Config(n=2, beta=0.5, batch_size=4, device="cpu")


def cells(seed, grad=False):
    """2 x 2 log-probs of responses of three and of five tokens."""
    g = torch.Generator().manual_seed(seed)
    return [[(-torch.rand(k, generator=g)).requires_grad_(grad) for k in (3, 5)] for _ in range(2)]


def example(seed=7):
    return SimpleNamespace(base=cells(seed))


# ---------------------------------------------------------------------------------------- intervals


def test_the_interval_of_a_few_seeds_is_students():
    mean, half = ablations.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.30 / 3**0.5)  # standard deviation 1
    assert ablations.interval([0.5]) == (0.5, math.inf)


def stored(**values):
    """{setting of the row contrast: {seed: its adherence}} -> runs as the store holds them."""
    return {ablations.key_of("toy", "contrast", name): {
        s: dict(dict.fromkeys(ablations.MEASURES, 0.0), adherence=v, seconds=1.0)
        for s, v in found.items()} for name, found in values.items()}


def test_a_difference_is_taken_seed_by_seed():
    # seeds differ by far more than settings: only pairs can tell
    runs = stored(**{"two-sided": {1: 0.1, 2: 0.5, 3: 0.9}, "responses": {1: 0.2, 2: 0.6, 3: 1.0},
                     "constitutions": {2: 0.4, 4: 0.0}})
    own, gap = ablations.paired(runs, "toy", "contrast", "responses", "adherence")
    assert own[0] == pytest.approx(0.6) and own[1] > 0.5
    assert gap == pytest.approx((0.1, 0.0), abs=1e-6)
    _, gap = ablations.paired(runs, "toy", "contrast", "constitutions", "adherence")
    assert gap[0] == pytest.approx(-0.1) and gap[1] == math.inf  # seed 2 alone is in both
    assert ablations.paired(runs, "toy", "contrast", "two-sided", "adherence")[1] is None


def test_a_run_that_failed_has_no_values_and_is_told():
    runs = stored(**{"two-sided": {1: 0.1, 2: 0.2}, "responses": {1: 0.3, 2: 0.4}})
    runs[ablations.key_of("toy", "contrast", "responses")][2] = dict(failed="NaN", seconds=1.0)
    assert ablations.paired(runs, "toy", "contrast", "responses", "heldout")[0][1] == math.inf
    assert "|  | responses (toy: 1 of 2 seeds failed) |" in ablations.report(runs)


def test_a_sentence_claims_what_the_interval_supports():
    runs = stored(**{"two-sided": {1: 0.1, 2: 0.5, 3: 0.9}, "responses": {1: 0.2, 2: 0.61, 3: 1.0},
                     "constitutions": {1: 0.2, 2: 0.4, 3: 0.9}})
    sentence = ablations.conclusion(runs, "contrast")
    assert "differs from two-sided: responses +0.103" in sentence
    assert "no difference seen: constitutions (could be seen: 0.248)" in sentence


def test_a_default_is_beaten_only_outside_its_interval_on_every_bed():
    runs = stored(**{"two-sided": {1: 0.1, 2: 0.5}, "responses": {1: 0.2, 2: 0.6},
                     "constitutions": {1: 0.2, 2: 0.7}})
    both = {k.replace("toy", bed): {s: dict(r) for s, r in found.items()}
            for bed in ("toy", "stories") for k, found in runs.items()}
    assert ablations.defaults(both, ["stories", "toy"]) == (
        "- *contrast, responses*: adherence +0.100 ± 0.000 (stories) and +0.100 ± 0.000 (toy), "
        "nll +0.000 ± 0.000 and +0.000 ± 0.000")
    both[ablations.key_of("toy", "contrast", "responses")][1]["adherence"] = 0.0
    assert ablations.defaults(both, ["stories", "toy"]) == "- nothing"


def test_equal_settings_of_two_rows_are_one_run_and_all_others_are_their_own():
    key, rows = ablations.key_of, ablations.ROWS
    assert key("toy", "contrast", "two-sided") == key("toy", "temperature", "T = 0.8") == "toy"
    assert key("toy", "precision", "fp32, lr 0.0001") == "toy"
    every = {(key(b, row, name), json.dumps({k: v for k, v in s.items() if k != "replace"}),
              s.get("replace")) for b in ablations.BEDS for row, (_, ss) in rows.items()
             for name, s in ss.items() if name in ablations.settings_of(b, row)}
    assert len({k for k, *_ in every}) == 2 * 52 + 4
    with_function = [k for k, _, replaced in every if replaced]
    assert len(with_function) == len(set(with_function))


def test_a_bed_that_samples_greedily_runs_few_rows_and_no_best_of_four():
    names = {row: ablations.settings_of("manners", row) for row in ablations.ROWS}
    assert {row: found for row, found in names.items() if found} == {
        "contrast": ["two-sided", "constitutions", "responses"],
        "supervised": ["SAMI", "supervised"]}
    flags = ablations.flags_of("manners", ablations.ROWS["contrast"][1]["responses"])
    assert (flags["steps"], flags["batch_size"], flags["temperature"]) == ("8", 40, 0)
    assert flags["contrast"] == "responses" and flags["eval_queries"] == 0


# --------------------------------------------------------------------------------------- objectives


def test_sum_at_the_norm_of_the_mean():
    replaced = ablations.sum_at_norm_of_mean(CFG)["objective"]
    lengths = []
    for objective, reduce in ((replaced, "sum"), (sami.objective, "mean")):
        m, cfg = cells(1, grad=True), dataclasses.replace(CFG, beta=0.0, reduce=reduce)
        grads = torch.autograd.grad(objective(example(), m, cfg)["loss"], sum(m, []))
        lengths.append(torch.cat(grads).norm().item())
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-5)


def test_kl_of_own_responses_leaves_out_what_is_off_the_diagonal():
    e, m = example(), cells(1)
    found = ablations.kl_of_own_responses(CFG)["objective"](e, m, CFG)
    own = torch.cat([m[0][0], m[1][1]]), torch.cat([e.base[0][0], e.base[1][1]])
    assert found["kl"] == pytest.approx(sami.kl_to_base(*own).mean().item(), rel=1e-5)
    contrast = sami.sami_loss(sami.as_matrix(m, "mean"))
    assert found["loss"] == pytest.approx((contrast + 0.5 * found["kl"]).item(), rel=1e-5)


def test_k2_is_half_the_square():
    k2 = ablations.kl_k2(CFG)["kl_to_base"]
    assert k2(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -2.0])).tolist() == [2, 0]


def test_the_exact_kl_is_that_of_all_logits():
    model, other = tiny.model(0), tiny.model(1)
    prompts, responses = [[5, 6, 7], [8, 9]], [[3, 4], [10, 11, 12]]
    new = ablations.kl_exact(CFG)
    with torch.no_grad():
        m, base = (new["score"](net, prompts, [responses] * 2) for net in (model, other))
        found = new["objective"](SimpleNamespace(base=base), m, CFG)
        parts = []
        for p in prompts:
            for y in responses:
                logps = [net(torch.tensor([p + y])).logits[0, len(p) - 1:-1].log_softmax(-1)
                         for net in (model, other)]
                parts.append((logps[0].exp() * (logps[0] - logps[1])).sum(-1))
    assert found["kl"] == pytest.approx(torch.cat(parts).mean().item(), rel=1e-4)
    assert found["kl"] > 0.1


def test_supervised_pulls_each_response_to_its_own_constitution_alone():
    m = cells(1, grad=True)
    loss = ablations.supervised(CFG)["objective"](
        example(), m, dataclasses.replace(CFG, beta=0.0))["loss"]
    loss.backward()
    assert m[0][0].grad.tolist() == pytest.approx([-1 / 6] * 3)  # of 3 tokens, of 2 responses
    assert m[1][1].grad.tolist() == pytest.approx([-1 / 10] * 5)
    assert not m[0][1].grad.any() and not m[1][0].grad.any()


# ----------------------------------------------------------------------------- samples, data, steps


def test_of_four_answers_the_one_is_kept_that_tells_most_of_its_constitution():
    net = tiny.model()
    prompts = [[5, 6, 7], [8, 9]]
    pool = [[(p, [3 + 4 * r + j, 20 + r], f"{j}{r}", True) for j, p in enumerate(prompts)]
            for r in range(4)]
    tries = iter(pool)
    with mock.patch.object(ablations, "RESPOND", lambda *a: next(tries)):
        best = ablations.best_of_four(net, None, None, [None] * 2, CFG, [(1,), (2,)], 0.8)
    for j in (0, 1):
        with torch.no_grad():
            logp = torch.stack([torch.stack([
                sami.response_logps(net, [p], [pool[r][j][1]])[0].mean() for r in range(4)])
                for p in prompts])  # (2, 4)
        assert best[j][2] == f"{j}{int((logp[j] - logp[1 - j]).argmax())}"


@pytest.mark.parametrize("count, kept", [(2, [2, 3, 6, 7]), (1, [3, 7])])
def test_the_last_queries_of_every_batch(count, kept):
    seen = []
    with mock.patch.object(ablations, "TRAIN", lambda *a: seen.append(a)):
        train = ablations.last_of_a_batch(count)(CFG)["train"]
        train(None, list(range(8)), 2, 1, CFG)
    [(_, examples, steps, _, cfg)] = seen
    assert examples == kept and steps == 2 and cfg.batch_size == count


def task_of(replaced, path, **cfg):
    with mock.patch("sami.load_task", replaced(dataclasses.replace(CFG, **cfg))["load_task"]):
        return sami.load_task(path / "task")


def test_changed_tasks(tmp_path):
    tiny.folder(tmp_path)
    rng = sami.np.random.default_rng
    few = [task_of(ablations.few_principles(2), tmp_path, seed=s).principles for s in range(4)]
    assert all(len(f) == 2 for f in few) and len({json.dumps(f) for f in few}) > 1
    assert len(sami.load_task(tmp_path / "task").principles) == 4
    task = task_of(ablations.principles_each(3), tmp_path)
    assert {len(c.names) for c in task.draw(rng(0), 2)} == {3}
    task = task_of(ablations.drawing(others="complement", first_always_positive=True), tmp_path)
    assert [c.sides for c in task.draw(rng(0), 2)] == [(True, True), (False, False)]
    task = task_of(ablations.changed_task(ablations.positive_sides_only), tmp_path)
    a, b = task.draw(rng(0), 2)
    assert a.sides == b.sides == (True, True) and not set(a.names) & set(b.names)
    with pytest.raises(sami.BadInput, match="3 constitutions need 6"):
        task.draw(rng(0), 3)


# --------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def bed(tmp_path, monkeypatch):
    tiny.folder(tmp_path)
    flags = dict(task=str(tmp_path / "task"), n=2, batch_size=4, max_new_tokens=6, lr=1e-2)
    monkeypatch.setitem(ablations.BEDS, "tiny", flags)
    monkeypatch.setitem(ablations.COMMON, "steps", "2")
    monkeypatch.setattr(ablations, "SPLIT", 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    return lambda row, name, seed=1: ablations.run(
        "tiny", row, name, seed, dict(tiny=str(tmp_path / "base")), str(tmp_path / "cache"))


def test_a_seed_gives_the_same_numbers_whoever_sampled_first(bed, tmp_path):
    row = bed("contrast", "two-sided")
    samples = sorted((tmp_path / "cache").iterdir())
    again, other = bed("contrast", "two-sided"), bed("contrast", "responses")
    assert sorted((tmp_path / "cache").iterdir()) == samples and len(samples) == 1
    assert {**row, "seconds": 0} == {**again, "seconds": 0}
    assert other["loss"] != row["loss"] and other["infonce"] != row["infonce"]
    assert bed("contrast", "two-sided", seed=2)["infonce"] != row["infonce"]
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {
        "tiny 1 2 None.jsonl", "tiny 2 2 None.jsonl"}


def test_weights_rounded_to_bf16_stay_so_while_they_train(bed):
    seen = []
    save = sami.save_model

    def look(model, *rest):
        seen.append([bool((p == p.bfloat16()).all()) for p in model.parameters()])
        save(model, *rest)

    with mock.patch.object(sami, "save_model", look):
        bed("precision", "bf16, lr 0.001")
        bed("precision", "fp32, lr 0.001")
    assert all(seen[0]) and not all(seen[1])
    assert torch.optim.AdamW is ablations.ADAMW and sami.load_model is ablations.LOAD_MODEL


def test_samples_of_the_base_are_the_base_s_in_every_iteration(bed):
    seen, load = [], ablations.COLLECT

    def look(model, *rest):
        seen.append(model.state_dict()["lm_head.weight"].clone())
        return load(model, *rest)

    with mock.patch.dict(ablations.COMMON, steps="2,2,2"), \
            mock.patch.object(ablations, "COLLECT", look):
        for name in ("restart, samples of the base", "continue, samples of the base"):
            setting = ablations.ROWS["restart"][1][name]
            with mock.patch.dict(setting, steps="1,1,1"):
                bed("restart", name)
    assert len(seen) == 6 and all(torch.equal(w, seen[0]) for w in seen)


def test_what_is_there_is_not_run_again_and_the_report_is_made_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "run", None)  # nobody may call it
    runs = stored(**{name: {1: 0.5, 2: 0.6} for name in ablations.ROWS["contrast"][1]})
    runs["toy base"] = {0: dict.fromkeys([*ablations.MEASURES, "seconds"], 0.25)}
    (tmp_path / "ablations.json").write_text(json.dumps(runs))
    ablations.main(["--rows=contrast", "--seeds=1,2", "--beds=toy", f"--out={tmp_path}"])
    text = (tmp_path / "ABLATIONS.md").read_text()
    assert "|  | constitutions |  |  |  |  | +0.000 ± 0.000 | +0.000 ± 0.000 |" in text
    assert "| contrast | two-sided |  |  |  |  | 0.550 ± 0.635 |" in text
    assert "| toy | 0.250 | 0.250 | 0.250 | 0.250 |" in text and "toy: seeds 1, 2 (7 runs" in text
    assert (tmp_path / "ablations.png").stat().st_size > 10_000


def test_every_figure_of_the_report_comes_from_the_store():
    data = ablations.ROOT / "data"
    runs = json.loads((data / "ablations.json").read_text())
    runs = {key: {int(s): r for s, r in found.items()} for key, found in runs.items()}
    assert ablations.report(runs) == (data / "ABLATIONS.md").read_text()
    known = {ablations.key_of(bed, row, name) for bed in ablations.BEDS
             for row, (_, settings) in ablations.ROWS.items() for name in settings}
    assert set(runs) <= known | {f"{bed} base" for bed in ablations.BEDS}


@pytest.mark.parametrize("flag, sentence", [
    ("--rows=lr", "there is no lr, but contrast"), ("--beds=moon", "there is no moon"),
    ("--seeds=one", "--seeds=one must be whole numbers"), ("--seeds=1", "--stories_model=")])
def test_bad_input(flag, sentence, tmp_path):
    with pytest.raises(sami.BadInput, match=sentence):
        ablations.main([flag, f"--out={tmp_path}"])
