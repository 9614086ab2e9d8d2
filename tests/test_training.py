"""The loop: sample with the last iteration's model, start again from the base, take a few steps, save."""
import copy, json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaAttention

import sami, tiny

CPU = torch.device("cpu"), torch.float32


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Three iterations, greedy, two constitutions; what `train` was given at the start of each is kept."""
    path, starts, real = tmp_path_factory.mktemp("run"), [], sami.train

    def spy(model, *args):
        starts.append({k: v.clone() for k, v in model.state_dict().items()})
        return real(model, *args)

    sami.train = spy
    try:
        flags = tiny.folder(path) + ["--iterations=3", "--steps=1,2,3", "--eval_queries=3", "--lr=3e-3"]
        code, out, err = tiny.command(*flags)
    finally:
        sami.train = real
    assert code == 0, err
    return dict(path=path, out=path / "out", printed=out, starts=starts, log=lines(path / "out" / "log.jsonl"),
                samples=[lines(path / "out" / "samples" / f"iteration-{k}.jsonl") for k in (1, 2, 3)])


def test_restart_really_restarts(ran):
    base = weights(ran["path"] / "base")
    assert len(ran["starts"]) == 3 and all(same(start, base) for start in ran["starts"])
    assert not same(weights(ran["out"] / "iteration-1"), base), "training does change the weights"


def test_without_restart_an_iteration_continues_with_the_last(tmp_path):
    starts, real = [], sami.train
    sami.train = lambda model, *args: (starts.append(copy.deepcopy(model.state_dict())), real(model, *args))
    try:
        for beta in (0.1, 0):  # with a KL the base is loaded in between
            flags = tiny.folder(tmp_path / str(beta)) + ["--iterations=2", "--restart=False", f"--beta={beta}"]
            code, _, err = tiny.command(*flags)
            assert code == 0, err
            assert same(starts[-1], weights(tmp_path / str(beta) / "out" / "iteration-1"))
            assert same(starts[-2], weights(tmp_path / str(beta) / "base"))
    finally:
        sami.train = real


def test_each_iteration_samples_with_the_model_of_the_one_before(ran):
    """Greedy responses of samples/iteration-K.jsonl are what Hugging Face generates with the folder iteration-(K-1)."""
    task, tokenizer = sami.load_task(ran["path"] / "task"), tiny.tokenizer()
    folders = [ran["path"] / "base", ran["out"] / "iteration-1", ran["out"] / "iteration-2"]
    models = [AutoModelForCausalLM.from_pretrained(f) for f in folders]

    def say(model, x, c):
        prompt = tokenizer(task.sampling_prompt(x, c), return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=0)[0]
        return task.clean(tokenizer.decode(ids[prompt.input_ids.shape[1]:], skip_special_tokens=True))

    for k, rows in enumerate(ran["samples"]):
        pairs = [(row["query"], c, y) for row in rows for c, y in zip(row["constitutions"], row["responses"])]
        assert all(say(models[k], x, c) == y for x, c, y in pairs)
        others = [m for i, m in enumerate(models) if i != k]
        assert all(any(say(m, x, c) != y for x, c, y in pairs) for m in others), "and no other model says the same"


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
        assert 4 * steps <= sum(row["dropped"] is None for row in rows) < 4 * steps + 4, "batch_size for each step"
        for row in rows:
            assert len(row["constitutions"]) == len(row["responses"]) == len(row["sides"]) == 2
            assert row["dropped"] == task.drop(row["responses"])
            for ids, text in zip(row["ids"], row["responses"]):
                assert tiny.tokenizer().decode(ids).strip() == text, "the ids spell the response"
            for c, chosen in zip(row["constitutions"], row["sides"]):
                said = {p["positive" if chosen[p["name"]] else "negative"] for p in tiny.PRINCIPLES
                        if p["name"] in chosen}
                assert {line.split(". ")[1] for line in c.splitlines()} == said


def test_log_has_a_line_per_step(ran):
    assert [(r["iteration"], r["step"]) for r in ran["log"]] == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
    for r in ran["log"]:
        assert all(r[key] >= 0 for key in ("loss", "kl", "grad_norm", "tokens_per_second", "seconds"))
        assert all(0 <= r[key] <= 1 for key in ("row_accuracy", "col_accuracy", "changed")) and r["diagonal"] < 0
    printed = [line for line in ran["printed"].splitlines() if "| loss" in line]
    assert len(printed) == 6 and all("eta" in line and "changed" in line and "tok/s" in line for line in printed)


def test_the_kl_is_zero_at_the_start_of_each_iteration_and_then_grows(ran):
    for r in ran["log"]:
        assert abs(r["kl"]) < 1e-6 if r["step"] == 1 else r["kl"] > 1e-5


def test_what_a_run_says_about_itself(ran):
    about = json.loads((ran["out"] / "sami.json").read_text())
    assert about["config"]["lr"] == 3e-3 and about["config"]["steps"] == "1,2,3" and about["config"]["restart"] is True
    assert about["versions"]["torch"] == torch.__version__ and about["world_size"] == 1 and "git_commit" in about
    assert "infonce" in ran["printed"] and "0.693" in ran["printed"], "held-out information with its cap, log 2"
    assert not list(ran["out"].rglob("*.tmp"))


def test_a_checkpoint_is_a_plain_model_folder_in_fp32(ran):
    for k in (1, 2, 3):
        folder = ran["out"] / f"iteration-{k}"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert AutoTokenizer.from_pretrained(folder)("ab c").input_ids == tiny.tokenizer()("ab c").input_ids


def test_an_earlier_run_is_moved_aside_never_overwritten(tmp_path):
    flags = tiny.folder(tmp_path)
    for k in range(3):
        code, printed, err = tiny.command(*flags, f"--seed={k}", "--steps=1")
        assert code == 0, err
    seeds = {p.name: json.loads((p / "sami.json").read_text())["config"]["seed"] for p in tmp_path.glob("out*")}
    assert seeds == {"out.1": 0, "out.2": 1, "out": 2}
    assert all((tmp_path / name / "iteration-1").is_dir() for name in seeds)
    assert "out.2" in printed


def test_an_iteration_of_an_earlier_run_can_be_the_base_of_the_next(tmp_path):
    """--model=out/iteration-1 while --out_dir=out: that folder must not be moved away before it is read."""
    flags = tiny.folder(tmp_path)
    assert tiny.command(*flags, "--steps=1")[0] == 0
    code, _, err = tiny.command(*flags, f"--model={tmp_path}/out/iteration-1", "--iterations=2", "--steps=1")
    assert code == 0 or code == 2 and (tmp_path / "out" / "iteration-1").is_dir(), err


def test_same_seed_same_weights(tmp_path):
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = tiny.folder(tmp_path / name)
        assert tiny.command(*flags, f"--seed={seed}", "--temperature=0.8", "--iterations=2", "--steps=1")[0] == 0
        states.append(weights(tmp_path / name / "out" / "iteration-2"))
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_the_shipped_task_runs(tmp_path, monkeypatch):
    """The flags' defaults: data/toy with the base model that lies beside it."""
    monkeypatch.chdir(sami.Path(sami.__file__).parent)
    code, _, err = tiny.command(f"--out_dir={tmp_path}/out", "--iterations=1", "--steps=1", "--batch_size=2",
                                "--eval_queries=2")
    assert code == 0, err
    [row] = lines(tmp_path / "out" / "log.jsonl")
    assert 0 < row["loss"] < 3


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """8 usable examples of the tiny task, sampled cold from the tiny model, with the base's log-probs."""
    path = tmp_path_factory.mktemp("task")
    tiny.folder(path)
    cfg, model = sami.Config(n=2, temperature=0.5, max_new_tokens=8), tiny.model()
    got = sami.collect(model, tiny.tokenizer(), sami.load_task(path / "task"), cfg, 1, 8)
    got = [e for e in got if e["dropped"] is None][:8]  # a round samples a whole batch at least
    sami.add_base_logps(model, got, cfg, *CPU)
    assert len(got) == 8
    return got


def trained(examples, steps, **flags):
    """A fresh tiny model after `steps` steps, each on all examples -> its weights and what was reported."""
    model, reports = tiny.model(), []
    cfg = sami.Config(**{**dict(n=2, batch_size=len(examples), lr=1e-3), **flags})
    sami.train(model, examples * steps, steps, cfg, *CPU, lambda step, row, optimizer: reports.append(row))
    return model.state_dict(), reports


@pytest.mark.parametrize("contrast", ["two-sided", "constitutions", "responses"])
def test_the_loss_falls(examples, contrast):
    _, reports = trained(examples, 20, contrast=contrast, lr=3e-3)
    assert reports[-1]["loss"] < reports[0]["loss"] - 0.3
    assert reports[-1]["col_accuracy"] + reports[-1]["row_accuracy"] > 1.8


def test_the_kl_term_holds_the_model_back(examples):
    kl = [trained(examples, 10, beta=beta, lr=3e-3)[1][-1]["kl"] for beta in (0.01, 10.0)]
    assert kl[1] < 0.3 * kl[0]


def test_the_reported_loss_is_the_mean_over_queries(examples):
    model = tiny.model()
    _, [report] = trained(examples, 1, beta=0.0)
    with torch.no_grad():
        losses = [sami.sami_loss(sami.logp_matrix(model, e["prompts"], e["ids"])).item() for e in examples]
    assert report["loss"] == pytest.approx(sum(losses) / 8, abs=1e-5)


def test_how_a_batch_is_cut_into_passes_changes_nothing(examples):
    (one, [r1]), (many, [r2]) = (trained(examples, 1, tokens_per_pass=t, lr=1e-4) for t in (10**6, 1))
    assert r1["loss"] == pytest.approx(r2["loss"], abs=1e-6)
    assert r1["grad_norm"] == pytest.approx(r2["grad_norm"], rel=1e-5)
    assert max((one[k] - many[k]).abs().max() for k in one) < 1e-6
    groups = [group for group, weight in sami.passes(examples, sami.Config(n=2, tokens_per_pass=300)) if weight == 1]
    assert 1 < len(groups) < 8, "and here are passes of several queries"
    assert sorted(e["number"] for g in groups for e in g) == sorted(e["number"] for e in examples)


@pytest.mark.parametrize("flag", ["checkpointing", "compile"])
def test_memory_and_speed_flags_change_nothing(examples, flag, monkeypatch):
    """Activations computed again in the backward pass, or layers compiled: the same weights after two steps."""
    runs, compiled, forward, compile = [], [], LlamaAttention.forward, torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append(self) or
                        compile(self, backend="eager", **how))  # traced as ever, without the wait for g++
    plain, [_, p2] = trained(examples, 2, lr=1e-4)
    monkeypatch.setattr(LlamaAttention, "forward", lambda *a, **k: runs.append(1) or forward(*a, **k))
    flagged, [_, f2] = trained(examples, 2, lr=1e-4, **{flag: True})
    assert p2["loss"] == pytest.approx(f2["loss"], abs=1e-6)
    assert max((plain[k] - flagged[k]).abs().max() for k in plain) < 1e-6
    assert len(compiled) == (2 if flag == "compile" else 0)
    if flag == "checkpointing":
        assert len(runs) == 2 * 2 * 2 + 4, "2 layers, 2 steps, forward twice; and the comparison with plain scoring"


def test_one_adamw_step_by_hand(examples):
    """A first AdamW step is lr times the sign of the gradient, after a decay of lr * 0.01: one matrix, by autograd."""
    model, lr = tiny.model(), 1e-3
    name, p = "model.layers.0.mlp.up_proj.weight", dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    loss = sum(sami.sami_loss(sami.logp_matrix(model, e["prompts"], e["ids"])) for e in examples) / 8
    g = torch.autograd.grad(loss, p)[0]
    after, _ = trained(examples, 1, beta=0.0, lr=lr)
    firm = g.abs() > 1e-5  # far above AdamW's epsilon of 1e-8
    want = p.detach() * (1 - lr * 0.01) - lr * g.sign()
    assert firm.float().mean() > 0.9 and torch.allclose(after[name][firm], want[firm], atol=2e-6)


def moved(examples, **flags):
    """How far one step moves the weight that it moves most."""
    before, (after, _) = tiny.model().state_dict(), trained(examples, 1, **flags)
    return max((after[k] - before[k]).abs().max().item() for k in before)


def test_warmup_rises_from_lr_over_warmup(examples):
    assert moved(examples, warmup=4, lr=4e-3) == pytest.approx(moved(examples, lr=1e-3), rel=1e-3)
    assert moved(examples, lr=4e-3) > 3.9 * moved(examples, lr=1e-3)


def test_gradient_clipping(examples):
    """RMSprop's first step is lr * g / (|g| / 10 + 1e-8), so only a gradient clipped to next to nothing moves less."""
    assert moved(examples, optimizer="rmsprop", grad_clip=1e-8) < 0.5 * moved(examples, optimizer="rmsprop")
    _, [report] = trained(examples, 1, grad_clip=0.01)
    assert report["grad_norm"] > 0.01, "what is reported is the norm before clipping"


def test_a_step_that_bfloat16_cannot_see_changes_nothing_there(examples):
    """fp32 weights keep what a step of 1e-9 adds; the share that the forward pass would see changed is reported."""
    _, [report] = trained(examples, 1, lr=1e-9)
    assert report["changed"] < 0.5 < trained(examples, 1, lr=1e-2)[1][0]["changed"]


def test_held_out_information_is_bounded_and_repeatable(tmp_path):
    tiny.folder(tmp_path)
    task = sami.load_task(tmp_path / "task")

    def held(**flags):
        cfg = sami.Config(n=2, eval_queries=5, max_new_tokens=8, **flags)
        return sami.heldout_information(tiny.model(), tiny.tokenizer(), task, cfg, *CPU)

    first, again = (held(temperature=0.0, top_p=0.3) for _ in range(2))
    assert first["infonce"] == again["infonce"] <= first["infonce_cap"] == pytest.approx(0.6931, abs=1e-4)
    assert {e["query"] for e in first["examples"]} <= {q["query"] for q in task.test}
    assert first["infonce"] == held()["infonce"], "temperature 1 and all tokens, whatever is used for training"
