"""The loop: sample with the last iteration's model, begin again from the base, train, save."""
import copy, dataclasses, json, tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaAttention

import sami, tiny


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Three iterations, greedy, two constitutions; the weights at the start of each are kept."""
    path, starts, real = tmp_path_factory.mktemp("run"), [], sami.train

    def spy(model, *args):
        starts.append({k: v.clone() for k, v in model.state_dict().items()})
        return real(model, *args)

    sami.train = spy
    try:
        code, out, err = tiny.command(*tiny.folder(path), "--iterations=3", "--steps=1,2,3",
                                      "--eval_queries=3", "--lr=3e-3")
    finally:
        sami.train = real
    assert code == 0, err
    log, out_dir = lines(path / "out/log.jsonl"), path / "out"
    return dict(path=path, out=out_dir, printed=out, starts=starts,
                log=[row for row in log if "step" in row],
                held=[row for row in log if "step" not in row],
                samples=[lines(out_dir / f"samples/iteration-{k}.jsonl") for k in (1, 2, 3)])


def test_restart_really_restarts(ran):
    base = weights(ran["path"] / "base")
    assert len(ran["starts"]) == 3 and all(same(start, base) for start in ran["starts"])
    assert not same(weights(ran["out"] / "iteration-1"), base), "training does change the weights"


def test_without_restart_an_iteration_continues_with_the_last(tmp_path, monkeypatch):
    starts, real = [], sami.train
    monkeypatch.setattr(sami, "train", lambda model, *args: (
        starts.append(copy.deepcopy(model.state_dict())), real(model, *args)))
    for beta in (0.1, 0):  # with a KL the base is loaded in between
        path = tmp_path / str(beta)
        code, _, err = tiny.command(*tiny.folder(path), "--iterations=2", "--restart=False",
                                    f"--beta={beta}")
        assert code == 0, err
        assert same(starts[-1], weights(path / "out/iteration-1"))
        assert same(starts[-2], weights(path / "base"))


def test_each_iteration_samples_with_the_model_of_the_one_before(ran):
    """Samples of iteration K are what Hugging Face generates with the folder iteration-(K-1)."""
    task, tokenizer = sami.load_task(ran["path"] / "task"), tiny.tokenizer()
    folders = [ran["path"] / "base", ran["out"] / "iteration-1", ran["out"] / "iteration-2"]
    models = [AutoModelForCausalLM.from_pretrained(f) for f in folders]

    def say(model, x, c):
        prompt = tokenizer(task.sampling_prompt(x, c), return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0,
                             eos_token_id=0)[0]
        new = ids[prompt.input_ids.shape[1]:]
        return task.clean(tokenizer.decode(new, skip_special_tokens=True))

    for k, rows in enumerate(ran["samples"]):
        pairs = [(row["query"], c, y) for row in rows
                 for c, y in zip(row["constitutions"], row["responses"])]
        assert all(say(models[k], x, c) == y for x, c, y in pairs)
        others = [m for i, m in enumerate(models) if i != k]
        for m in others:
            assert any(say(m, x, c) != y for x, c, y in pairs), "no other model says the same"


def test_slices_alternate_and_never_touch_the_test_queries(ran):
    first, second, third = ({row["query"] for row in rows} for rows in ran["samples"])
    task = sami.load_task(ran["path"] / "task")
    train = [q["query"] for q in task.train]
    halves = set(train[0::2]), set(train[1::2])
    assert first <= halves[0] and second <= halves[1] and third <= halves[0]
    assert not (first | second | third) & {q["query"] for q in task.test}


def test_samples_say_what_was_drawn_what_was_said_and_why_it_was_dropped(ran):
    task = sami.load_task(ran["path"] / "task")
    for steps, rows in zip((1, 2, 3), ran["samples"]):
        usable = sum(row["dropped"] is None for row in rows)
        assert 4 * steps <= usable < 4 * steps + 4, "batch_size for each step"
        for row in rows:
            assert len(row["constitutions"]) == len(row["responses"]) == len(row["sides"]) == 2
            assert row["dropped"] == task.drop(row["responses"])
            for ids, text in zip(row["ids"], row["responses"]):
                assert tiny.tokenizer().decode(ids).strip() == text, "the ids spell the response"
            for c, chosen in zip(row["constitutions"], row["sides"]):
                said = {p["positive" if chosen[p["name"]] else "negative"]
                        for p in tiny.PRINCIPLES if p["name"] in chosen}
                assert {line.split(". ")[1] for line in c.splitlines()} == said


def test_log_has_a_line_per_step(ran):
    places = [(row["iteration"], row["step"]) for row in ran["log"]]
    assert places == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
    for row in ran["log"]:
        assert all(row[key] >= 0 for key in ("loss", "kl", "grad_norm", "tokens_per_second",
                                             "seconds"))
        assert all(0 <= row[key] <= 1 for key in ("row_accuracy", "col_accuracy"))
        assert row["diagonal"] < 0 and row["lr"] == 3e-3
    printed = [line for line in ran["printed"].splitlines() if "| loss" in line]
    assert len(printed) == 6
    for line, row in zip(printed, ran["log"]):
        assert all(word in line for word in ("eta", "lr", "kl", "tokens_per_second"))
        assert f"iteration {row['iteration']} step" in line and f"loss {row['loss']:.4g}" in line


def test_log_has_a_line_per_measurement(ran):
    """The base and the model of each iteration, on held-out queries."""
    assert [row["iteration"] for row in ran["held"]] == [0, 1, 2, 3]
    for row in ran["held"]:
        assert row["infonce"] <= row["infonce_cap"] == pytest.approx(0.6931, abs=1e-4)
        assert all(0 <= row[key] <= 1 for key in ("row_accuracy", "col_accuracy"))
        for key in ("infonce", "row_accuracy", "col_accuracy", "diagonal"):
            assert row[key + "_se"] >= 0
    assert len({row["infonce"] for row in ran["held"]}) == 4, "these are four models"
    printed = [line for line in ran["printed"].splitlines() if "infonce " in line]
    assert len(printed) == 4
    for line, row in zip(printed, ran["held"]):
        assert line.startswith(f"iteration {row['iteration']}")
        assert f"infonce {row['infonce']:.4g}" in line


def test_the_kl_is_zero_at_the_start_of_each_iteration_and_then_grows(ran):
    for row in ran["log"]:
        assert abs(row["kl"]) < 1e-6 if row["step"] == 1 else row["kl"] > 1e-5


def test_what_a_run_says_about_itself(ran):
    about = json.loads((ran["out"] / "sami.json").read_text())
    config = about["config"]
    assert config["lr"] == 3e-3 and config["steps"] == "1,2,3" and config["restart"] is True
    assert about["versions"]["torch"] == torch.__version__
    assert about["world_size"] == 1 and "git_commit" in about and "task_sha256" in about
    assert "0.693" in ran["printed"], "chance: log 2"
    assert not list(ran["out"].rglob("*.tmp"))


def test_a_checkpoint_is_a_plain_model_folder_in_fp32(ran):
    for k in (1, 2, 3):
        folder = ran["out"] / f"iteration-{k}"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        want = tiny.tokenizer()("ab c").input_ids
        assert AutoTokenizer.from_pretrained(folder)("ab c").input_ids == want


def test_an_earlier_run_is_moved_aside_never_overwritten(tmp_path):
    flags = tiny.folder(tmp_path)
    for k in range(3):
        code, printed, err = tiny.command(*flags, f"--seed={k}", "--steps=1")
        assert code == 0, err
    seeds = {p.name: json.loads((p / "sami.json").read_text())["config"]["seed"]
             for p in tmp_path.glob("out*")}
    assert seeds == {"out.1": 0, "out.2": 1, "out": 2}
    assert all((tmp_path / name / "iteration-1").is_dir() for name in seeds)
    assert "out.2" in printed


def test_an_iteration_of_an_earlier_run_can_be_the_base_of_the_next(tmp_path):
    """--model=out/iteration-1 while --out_dir=out would move it away before it is read: refused."""
    flags = tiny.folder(tmp_path)
    assert tiny.command(*flags, "--steps=1")[0] == 0
    more = [*flags, f"--model={tmp_path}/out/iteration-1", "--iterations=2", "--steps=1"]
    code, _, err = tiny.command(*more)
    assert code == 2 and "name another --out_dir" in err
    assert (tmp_path / "out/iteration-1").is_dir()
    code, _, err = tiny.command(*more, f"--out_dir={tmp_path}/next")
    assert code == 0 and (tmp_path / "next/iteration-2").is_dir(), err


def test_same_seed_same_weights(tmp_path):
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        code, _, err = tiny.command(*tiny.folder(tmp_path / name), f"--seed={seed}", "--steps=1",
                                    "--temperature=0.8", "--iterations=2")
        assert code == 0, err
        states.append(weights(tmp_path / name / "out/iteration-2"))
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_the_shipped_task_runs(tmp_path, monkeypatch):
    """The flags' defaults: data/toy with the base model that lies beside it."""
    monkeypatch.chdir(Path(sami.__file__).parent)
    code, _, err = tiny.command(f"--out_dir={tmp_path}/out", "--iterations=1", "--steps=1",
                                "--batch_size=2", "--eval_queries=2")
    assert code == 0, err
    before, row, after = lines(tmp_path / "out/log.jsonl")
    assert 0 < row["loss"] < 3 and before["infonce"] != after["infonce"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """8 examples of the tiny task, sampled cold from the tiny model, with the base's log-probs."""
    path = tmp_path_factory.mktemp("task")
    tiny.folder(path)
    (path / "out/samples").mkdir(parents=True)
    cfg = sami.Config(n=2, temperature=0.5, max_new_tokens=8, out_dir=str(path / "out"))
    model, task = tiny.model(), sami.load_task(path / "task")
    got = sami.collect(model, tiny.tokenizer(), task, cfg, 1, 8)
    assert len(got) == 8 and not any(e.dropped for e in got)
    sami.add_base_logps(model, got, cfg)
    return got


def trained(examples, steps, model=None, **flags):
    """A model after `steps` steps, each on all examples -> its weights and its lines of the log."""
    model = model or tiny.model()
    with tempfile.TemporaryDirectory() as out_dir:
        cfg = sami.Config(**{**dict(n=2, batch_size=len(examples), lr=1e-3, grad_clip=0.0,
                                    out_dir=out_dir), **flags})
        sami.train(model, examples * steps, steps, 1, cfg)
        return model.state_dict(), lines(Path(out_dir) / "log.jsonl")


@pytest.mark.parametrize("contrast", ["two-sided", "constitutions", "responses"])
def test_the_loss_falls(examples, contrast):
    _, log = trained(examples, 20, contrast=contrast, lr=3e-3)
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    assert log[-1]["col_accuracy"] + log[-1]["row_accuracy"] > 1.8


def test_the_kl_term_holds_the_model_back(examples):
    kl = [trained(examples, 10, beta=beta, lr=3e-3)[1][-1]["kl"] for beta in (0.01, 10.0)]
    assert kl[1] < 0.3 * kl[0]


def test_the_reported_loss_is_the_mean_over_queries(examples):
    model = tiny.model()
    _, [row] = trained(examples, 1, beta=0.0)
    assert "kl" not in row
    with torch.no_grad():
        losses = [sami.sami_loss(sami.logp_matrix(model, e.prompts, e.ids)).item()
                  for e in examples]
    assert row["loss"] == pytest.approx(sum(losses) / 8, abs=1e-5)


def test_how_a_batch_is_cut_into_passes_changes_nothing(examples):
    (one, [r1]), (many, [r2]) = (trained(examples, 1, tokens_per_pass=t, lr=1e-4)
                                 for t in (10**6, 1))
    assert r1["loss"] == pytest.approx(r2["loss"], abs=1e-6)
    assert r1["grad_norm"] == pytest.approx(r2["grad_norm"], rel=1e-5)
    assert max((one[k] - many[k]).abs().max() for k in one) < 1e-6
    dealt = sami.deal(examples, sami.Config(n=2, tokens_per_pass=300))
    assert 1 < len(dealt) < 8, "and here are passes of several queries"
    assert all(weight == 1 for _, weight in dealt)
    numbers = sorted(e.number for group, _ in dealt for e in group)
    assert numbers == sorted(e.number for e in examples)


def test_checkpointing_changes_nothing(examples, monkeypatch):
    """Activations computed again in the backward pass: the same weights after two steps."""
    runs, forward = [], LlamaAttention.forward
    plain, [_, p2] = trained(examples, 2, lr=1e-4)
    monkeypatch.setattr(LlamaAttention, "forward",
                        lambda *args, **how: runs.append(1) or forward(*args, **how))
    flagged, [_, f2] = trained(examples, 2, lr=1e-4, checkpointing=True)
    assert p2["loss"] == pytest.approx(f2["loss"], abs=1e-6)
    assert max((plain[k] - flagged[k]).abs().max() for k in plain) < 1e-6
    # 2 layers: 2 steps, forward twice; and the comparison with plain scoring
    assert len(runs) == 2 * 2 * 2 + 2 * 2


def test_one_adamw_step_by_hand(examples):
    """A first AdamW step is lr times the gradient's sign, after a decay of lr * 0.01."""
    model, lr, name = tiny.model(), 1e-3, "model.layers.0.mlp.up_proj.weight"
    p = dict(model.named_parameters())[name]
    loss = sum(sami.sami_loss(sami.logp_matrix(model, e.prompts, e.ids)) for e in examples) / 8
    g = torch.autograd.grad(loss, p)[0]
    after, _ = trained(examples, 1, beta=0.0, lr=lr)
    firm = g.abs() > 1e-5  # far above AdamW's epsilon of 1e-8
    want = p.detach() * (1 - lr * 0.01) - lr * g.sign()
    assert firm.float().mean() > 0.9 and torch.allclose(after[name][firm], want[firm], atol=2e-6)


def moved(examples, **flags):
    """How far one step moves the weight that it moves most."""
    before, (after, _) = tiny.model().state_dict(), trained(examples, 1, **flags)
    return max((after[k] - before[k]).abs().max().item() for k in before)


def test_the_learning_rate_of_each_step(examples, monkeypatch):
    """It is asked for by step and number of steps, logged, and what the step is made with."""
    schedule = {(0, 3): 0.0, (1, 3): 2e-3, (2, 3): 1e-3}
    monkeypatch.setattr(sami, "learning_rate", lambda step, steps, cfg: schedule[step, steps])
    _, log = trained(examples, 3)
    assert [row["lr"] for row in log] == [0.0, 2e-3, 1e-3]
    assert log[0]["loss"] == pytest.approx(log[1]["loss"], abs=1e-6) != log[2]["loss"]
    monkeypatch.setattr(sami, "learning_rate", lambda step, steps, cfg: cfg.lr / 4)
    quarter = moved(examples, lr=4e-3)
    monkeypatch.undo()
    assert quarter == pytest.approx(moved(examples, lr=1e-3), rel=1e-3)
    assert moved(examples, lr=4e-3) > 3.9 * quarter


def test_the_learning_rate_may_rise_first():
    cfg = sami.Config(lr=0.4, warmup=3)
    assert [sami.learning_rate(k, 6, cfg) for k in range(6)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert sami.learning_rate(0, 6, sami.Config(lr=0.4)) == 0.4


@pytest.mark.parametrize("infonce, error, too_little", [
    (0.48, 0.05, False), (0.09, 0.04, True), (-0.1, 0.02, True), (0.104, 0.026, False)])
def test_whether_there_is_anything_to_amplify(infonce, error, too_little, monkeypatch, capsys):
    """Told of the base alone; standard errors decide: the toy learns although it has few nats."""
    means = dict(infonce=infonce, infonce_se=error, infonce_cap=0.69)
    monkeypatch.setattr(sami, "heldout_information", lambda *args: (means, []))
    monkeypatch.setattr(sami, "record", lambda cfg, row: None)
    sami.measure(None, None, None, 0, sami.Config(n=2))
    out = capsys.readouterr().out
    assert f"there to amplify: {infonce:.2f} ± {error:.2f} of 0.69 nats" in out
    assert ("too little" in out) is too_little
    sami.measure(None, None, None, 1, sami.Config(n=2))
    assert not capsys.readouterr().out


def test_gradient_clipping(examples, monkeypatch):
    """The optimizer sees at most this norm, by default 1; the log holds what it was before."""
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            seen.append(float(torch.cat([g.flatten() for g in grads]).norm()))
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    norms = [trained(examples, 1, grad_clip=c)[1][0]["grad_norm"] for c in (0.0, 0.01)]
    assert norms[0] == norms[1] == pytest.approx(seen[0]) and norms[0] > 0.02
    assert seen[1] == pytest.approx(0.01, rel=1e-3)
    assert sami.Config().grad_clip == 1.0
    # RMSprop's first step is lr * g / (|g| / 10 + 1e-8): only next to nothing moves less
    little, plain = (moved(examples, optimizer="rmsprop", grad_clip=c) for c in (1e-8, 0.0))
    assert little < 0.5 * plain


def test_the_papers_step_vanishes_in_bf16_weights_and_not_in_fp32_ones(examples):
    """bfloat16 has 8 bits: next to 0.1 its numbers lie 0.0005 apart, and a step is 5e-7."""
    one = torch.tensor([0.1, 1.0])
    assert torch.equal(one.bfloat16() - 5e-7, one.bfloat16()) and not torch.equal(one - 5e-7, one)

    def changed(dtype):
        """The share of the layers' weights that one step changes."""
        model = tiny.model().to(dtype)
        before = copy.deepcopy(model.state_dict())
        after, _ = trained(examples, 1, model, lr=5e-7)
        differ = [(after[k] != before[k]).flatten() for k in before if "layers" in k]
        return torch.cat(differ).float().mean()

    assert changed(torch.bfloat16) < 0.01 and changed(torch.float32) > 0.95


def test_held_out_information_is_bounded_and_repeatable(tmp_path):
    tiny.folder(tmp_path)
    task = sami.load_task(tmp_path / "task")

    def held(**flags):
        cfg = sami.Config(n=2, eval_queries=5, max_new_tokens=8, **flags)
        return sami.heldout_information(tiny.model(), tiny.tokenizer(), task, cfg)

    (first, scored), (again, _) = (held(temperature=0.0, top_p=0.3) for _ in range(2))
    assert first == again and first["infonce"] <= first["infonce_cap"]
    assert first["infonce_cap"] == pytest.approx(0.6931, abs=1e-4)
    assert [e.query for e, _, _ in scored] == [q["query"] for q in task.test[:5]]
    for e, logp, values in scored:
        with torch.no_grad():
            cells = sami.score(tiny.model(), e.prompts, [e.ids] * 2)
        assert torch.allclose(logp, sami.as_matrix(cells, "mean"), atol=1e-5)
        want = float(sami.infonce(sami.as_matrix(cells, "sum")))
        assert values["infonce"] == pytest.approx(want, abs=1e-4)
    mean = sum(values["infonce"] for _, _, values in scored) / 5
    assert first["infonce"] == pytest.approx(mean)
    assert first == held()[0], "temperature 1 and all tokens, whatever is used for training"
