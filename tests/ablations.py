"""
Which of SAMI's choices matter? The paper varies almost nothing and gives one seed; this trains
small models again and again, each time with one choice changed, and compares over seeds.

    python tests/ablations.py                          all that data/ablations.json lacks
    python tests/ablations.py --rows=beta --seeds=1,2  one row, two seeds
    python tests/ablations.py --rows=beta --out=new    the same anew, in another folder
    python tests/ablations.py --report=True            only write the report of what is there

A run is sami.py's main with flags, or with one of its functions replaced, on one core; then its
last model answers test queries. Every seed has its own draws and noise, the same in all settings of
a row, so settings are compared seed by seed. Run again it goes on where it stopped. It leaves
ablations.json, ABLATIONS.md and ablations.png.
"""
import concurrent.futures, contextlib, dataclasses, io, json, math, multiprocessing, os, shutil, sys
import tempfile, time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import evaluate, sami

# ------------------------------------------------------------------- replaced functions of sami.py
# Each takes the run's flags and gives {name in sami.py: what stands there instead}. The originals:

OBJECTIVE, SCORE, TRAIN, COLLECT, RESPOND = (
    sami.objective, sami.score, sami.train, sami.collect, sami.respond)
LOAD_TASK, LOAD_MODEL, ADAMW = sami.load_task, sami.load_model, torch.optim.AdamW


def penalised(contrast, kl, cfg):
    return dict(loss=contrast + cfg.beta * kl, contrast=contrast.detach(), kl=kl)


def all_tokens(cells):
    return torch.cat([t for row in cells for t in row])


def sum_at_norm_of_mean(cfg):
    """Summed log-probs, the gradient by token log-probs as long as that of their means."""
    def objective(example, cells, cfg):
        tokens = [t for row in cells for t in row]
        losses, norms = [], []
        for reduce in ("mean", "sum"):
            losses.append(sami.sami_loss(sami.as_matrix(cells, reduce), cfg.contrast))
            parts = torch.autograd.grad(losses[-1], tokens, retain_graph=True)
            norms.append(torch.cat(parts).norm())
        kl = sami.kl_to_base(all_tokens(cells), all_tokens(example.base)).mean()
        return penalised(losses[1] * norms[0] / norms[1].clamp_min(1e-9), kl, cfg)
    return dict(objective=objective)


def kl_of_own_responses(cfg):
    """Every response under its own constitution only, under which it was sampled."""
    def objective(example, cells, cfg):
        policy, base = (torch.cat([row[i] for i, row in enumerate(m)])
                        for m in (cells, example.base))
        contrast = sami.sami_loss(sami.as_matrix(cells, cfg.reduce), cfg.contrast)
        return penalised(contrast, sami.kl_to_base(policy, base).mean(), cfg)
    return dict(objective=objective)


def kl_k2(cfg):
    """Half the squared log-ratio: its gradient is bounded by the log-ratio, that of k3 is not."""
    return dict(kl_to_base=lambda logp, base_logp: (logp - base_logp) ** 2 / 2)


def kl_exact(cfg):
    """KL(policy || base) over the whole vocabulary at each token of the n x n pairs."""
    def score(model, prompts, siblings):
        whole = []

        def head_logps(h, w, b, target, scale=1, cap=None):  # the beds have no bias, scale, cap
            whole.append((h @ w.T).float().log_softmax(-1))
            return whole[-1].gather(1, target[:, None])[:, 0]

        with mock.patch.object(sami, "head_logps", head_logps):
            rows = SCORE(model, prompts, siblings)
        parts = iter(whole[-1].split([len(y) for ys in siblings for y in ys]))
        for t in (t for row in rows for t in row):
            t.distribution = next(parts)  # (len(y), V)
        return rows

    def objective(example, cells, cfg):
        policy, base = (torch.cat([t.distribution for row in m for t in row])
                        for m in (cells, example.base))
        kl = (policy.exp() * (policy - base)).sum(-1).mean()
        return penalised(sami.sami_loss(sami.as_matrix(cells, cfg.reduce), cfg.contrast), kl, cfg)
    return dict(score=score, objective=objective)


def samples_of_the_base(cfg):
    def collect(model, *rest):
        return COLLECT(LOAD_MODEL(cfg.model, torch.device("cpu"), cfg), *rest)
    return dict(collect=collect)


def bf16_weights(cfg):
    """Weights are rounded to bfloat16 as they load and after every step; all else is fp32."""
    def load_model(*arguments):
        model = LOAD_MODEL(*arguments)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.bfloat16())
        return model

    class Rounded(ADAMW):
        @torch.no_grad()
        def step(self, closure=None):
            super().step(closure)
            for p in (p for group in self.param_groups for p in group["params"]):
                p.copy_(p.bfloat16())
    return {"load_model": load_model, "torch.optim.AdamW": Rounded}


def changed_task(change):
    """change(task, cfg) before a run trains; it is measured on the task as it was."""
    def replaced(cfg):
        def load_task(folder):
            task = LOAD_TASK(folder)
            change(task, cfg)
            return task
        return dict(load_task=load_task)
    return replaced


def principles_each(k):
    return changed_task(lambda task, cfg: setattr(task, "principles_per_constitution", k))


def few_principles(count):
    """Train on `count` of them, other ones for every seed."""
    def change(task, cfg):
        order = np.random.default_rng((cfg.seed, 9)).permutation(len(task.principles))
        task.principles = [task.principles[i] for i in sorted(order[:count])]
    return changed_task(change)


def drawing(**keys):
    return changed_task(lambda task, cfg: vars(task).update(keys))


def positive_sides_only(task, cfg):
    """n constitutions on different principles, positive sides all: no antithesis is ever seen."""
    def draw(rng, n, focus=None, heldout=False):
        k = task.principles_per_constitution
        order = rng.permutation(len(task.principles))
        sami.need(len(order) >= n * k, f"{n} constitutions need {n * k} principles")
        found = []
        for part in ([task.principles[i] for i in order[j * k:j * k + k]] for j in range(n)):
            texts = tuple(str(rng.choice(p["positive"])) for p in part)
            names = tuple(p["name"] for p in part)
            found.append(sami.Constitution(names, (True,) * k, texts, task.numbered))
        return found
    task.draw = draw


def last_of_a_batch(count):
    """The gradient of the last `count` queries of every batch, as the authors' code has it."""
    def replaced(cfg):
        def train(model, examples, steps, iteration, cfg):
            size = cfg.batch_size
            parts = [examples[k * size:(k + 1) * size][-count:] for k in range(steps)]
            cfg = dataclasses.replace(cfg, batch_size=count)
            TRAIN(model, sum(parts, []), steps, iteration, cfg)
        return dict(train=train)
    return replaced


def supervised(cfg):
    """Cross-entropy of each response behind its own constitution: no contrast."""
    def objective(example, cells, cfg):
        own = -sami.as_matrix(cells, cfg.reduce).diag().mean()
        kl = sami.kl_to_base(all_tokens(cells), all_tokens(example.base)).mean()
        return penalised(own, kl, cfg)
    return dict(objective=objective)


TRIES = 4


def best_of_four(model, tokenizer, task, pairs, cfg, keys, temperature):
    """Of four responses to each (query, constitution) the one that tells most of its constitution:
    the largest share of that in its column of the log-prob matrix."""
    tries = [RESPOND(model, tokenizer, task, pairs, cfg, [(*k, r) for k in keys], temperature)
             for r in range(TRIES)]
    n, best = cfg.n, []
    for start in range(0, len(pairs), n):
        prompts = [tries[0][start + j][0] for j in range(n)]
        said = [tries[r][start + j] for j in range(n) for r in range(TRIES)]
        ids = [answer[1] or answer[0][:1] for answer in said]  # empty ones are dropped later
        with torch.no_grad():
            [cells] = sami.score_examples(model, [SimpleNamespace(prompts=prompts, ids=ids)], cfg)
        share = sami.as_matrix(cells, "mean").log_softmax(0)  # (n, 4 n)
        for j in range(n):
            own = share[j, j * TRIES:(j + 1) * TRIES]
            best.append(said[j * TRIES + int(own.argmax())])
    return best


def supervised_on_the_best(cfg):
    return dict(supervised(cfg), respond=best_of_four)


def sami_on_the_best(cfg):
    return dict(respond=best_of_four)


# ---------------------------------------------------------------------------------- beds and rows

MANNERS = json.loads((ROOT / "data/manners/smollm2.json").read_text("utf-8"))
BEDS = dict(
    stories=dict(task="data/stories"),  # its model: --stories_model
    toy=dict(task="data/toy"),
    manners={k: MANNERS[k] for k in MANNERS if k not in ("model", "eval_queries")},
)
COMMON = dict(iterations=1, steps="12", eval_queries=0, device="cpu")
PART = dict(manners=("contrast", "supervised"))  # minutes and 13 GB a run: few rows, one at a time
SPLIT, ANSWERED = 48, 112  # test queries: the first for information, the next are answered

# row: question, {setting: flags, and "replace"}. The first setting is what others are compared to.
ROWS = dict(
    contrast=("Which of the two contrasts teaches?", {
        "two-sided": {}, "constitutions": dict(contrast="constitutions"),
        "responses": dict(contrast="responses")}),
    reduce=("Mean or sum of a response's token log-probs?", {
        "mean": {}, "sum": dict(reduce="sum"),
        "sum, gradient as long": dict(replace=sum_at_norm_of_mean)}),
    n=("How many constitutions, at 48 responses a step? (three principles each)", {
        "n = 4": dict(n=4, batch_size=12, replace=principles_each(3)),
        **{f"n = {n}": dict(n=n, batch_size=48 // n, replace=principles_each(3))
           for n in (2, 3, 8)}}),
    temperature=("How cold should samples be?", {
        "T = 0.8": {}, **{f"T = {t:g}": dict(temperature=t) for t in (0.0, 0.5, 1.0, 1.3)}}),
    beta=("How strong a KL to the base, over which tokens, by which estimate?", {
        "beta = 0.1": {}, **{f"beta = {b:g}": dict(beta=b) for b in (0.0, 0.03, 0.3, 1.0)},
        "own responses": dict(replace=kl_of_own_responses), "k2": dict(replace=kl_k2),
        "exact": dict(replace=kl_exact)}),
    restart=("Three iterations: from the base or from the last model, on whose samples?", {
        "restart": dict(iterations=3, steps="4,8,12"),
        "continue": dict(iterations=3, steps="4,8,12", restart=False),
        "restart, samples of the base": dict(
            iterations=3, steps="4,8,12", replace=samples_of_the_base),
        "continue, samples of the base": dict(
            iterations=3, steps="4,8,12", restart=False, replace=samples_of_the_base)}),
    steps=("How many steps? (batches of 6)", {
        "12 steps": dict(batch_size=6),
        **{f"{k} steps": dict(batch_size=6, steps=str(k)) for k in (2, 4, 8, 16, 32, 64)}}),
    precision=("fp32 or bf16 weights, at which learning rate?", {
        "fp32, lr 0.0001": {},
        **{f"{name}, lr {lr:g}": dict(lr=lr, **how) for name, how in (
            ("fp32", {}), ("bf16", dict(replace=bf16_weights)))
           for lr in (5e-7, 1e-5, 1e-4, 1e-3)}}),
    breadth=("How many principles to train on?", {
        "all": {}, **{f"{k}": dict(replace=few_principles(k)) for k in (2, 4, 6)}}),
    principles=("How many principles a constitution? (n = 2)", {
        "2": dict(n=2, batch_size=32),
        **{f"{k}": dict(n=2, batch_size=32, replace=principles_each(k)) for k in (1, 3)}}),
    antitheses=("Where do antitheses come from?", {
        "complement": {}, "independent": dict(replace=drawing(others="independent")),
        "independent, first positive": dict(
            replace=drawing(others="independent", first_always_positive=True)),
        "none": dict(replace=changed_task(positive_sides_only))}),
    batches=("The gradient of the whole batch, or of its last queries?", {
        "all 16": {}, "last 8": dict(replace=last_of_a_batch(8)),
        "last 1": dict(replace=last_of_a_batch(1))}),
    supervised=("Is it the contrast that teaches?", {
        "SAMI": {}, "supervised": dict(replace=supervised),
        "supervised, best of 4": dict(replace=supervised_on_the_best),
        "SAMI, best of 4": dict(replace=sami_on_the_best)}),
)


def settings_of(bed, row):
    """Names of a row's settings that run on a bed; greedy samples know no best of four."""
    greedy = BEDS[bed].get("temperature") == 0
    return [name for name in ROWS[row][1] if row in PART.get(bed, ROWS)
            and not (greedy and "best of" in name)]


def flags_of(bed, setting):
    return {**COMMON, **BEDS[bed], **{k: v for k, v in setting.items() if k != "replace"}}


def key_of(bed, row, name):
    """Equal settings of different rows are one run."""
    setting = ROWS[row][1][name]
    flags, usual = flags_of(bed, setting), {**vars(sami.Config()), **COMMON, **BEDS[bed]}
    same = " ".join(f"{k}={v}" for k, v in sorted(flags.items()) if v != usual[k])
    return f"{bed} {same}".strip() + (f" {row}: {name}" if "replace" in setting else "")


# -------------------------------------------------------------------------------------------- a run


def measure(path, bed, flags):
    """What the model in a folder does on test queries that no run trains on -> {name: value}."""
    task, base_path = LOAD_TASK(flags["task"]), flags["model"]
    n = min(4, 2**task.principles_per_constitution)
    cfg = sami.Config(**{**flags, "seed": 1, "eval_queries": SPLIT, "n": n})
    _, tokenizer = sami.load_tokenizer(base_path)
    model, base = (LOAD_MODEL(p, torch.device("cpu"), cfg) for p in (path, base_path))
    means, scored = sami.heldout_information(model, tokenizer, task, cfg)
    found = {k: means[k] for k in ("infonce", "col_accuracy", "row_accuracy")}
    found["loss"] = float(np.mean([sami.sami_loss(logp) for _, logp, _ in scored]))
    pairs = [([e.prompts[j]], [e.ids[j]]) for e, _, _ in scored for j in range(cfg.n)]
    under_base = [float(c[0][0].mean()) for c in evaluate.score_all(base, pairs, cfg)]
    under_policy = [float(v) for _, logp, _ in scored for v in logp.diag()]
    found["kl"] = float(np.mean(under_policy) - np.mean(under_base))
    task.test = task.test[SPLIT:SPLIT + ANSWERED]
    items = evaluate.make_items(task, SimpleNamespace(queries=0, seed=1, unasked=False))
    pairs = [(it["query"], evaluate.pair_of(it)[1]) for it in items]
    said = sami.respond(model, tokenizer, task, pairs, cfg, 0, 0.0)
    scored = iter(evaluate.score_all(base, [([p], [y]) for p, y, _, _ in said if y], cfg))
    answers = {evaluate.pair_of(it): dict(text=text, tokens=len(y),
                                          nll=-float(next(scored)[0][0].mean()) if y else None)
               for it, (_, y, text, _) in zip(items, said)}
    with contextlib.redirect_stdout(io.StringIO()):
        rules = evaluate.load_rules(task)
    values, _ = evaluate.describe(items, answers, answers, task, rules)
    names = dict(adherence="adherence", adherence_heldout="heldout", in_world_rate="in_world",
                 adherence_positive="positive", adherence_negative="negative",
                 adherence_heldout_negative="heldout_negative", nll_under_base="nll")
    for name, short in names.items():
        known = [v for v in values[name] if v is not None]
        found[short] = float(np.mean(known)) if known else None
    return found


def run(bed, row, name, seed, models, cache):
    """Train and measure one setting with one seed -> {name: value}, or {"failed": a sentence}.
    models: {bed: folder}; cache: where samples of the bases are kept. Without a row: the base."""
    torch.set_num_threads(os.cpu_count() if bed in PART else 1)
    os.chdir(ROOT)
    started, setting = time.time(), ROWS[row][1][name] if row else {}
    flags = dict(flags_of(bed, setting), seed=seed, model=models[bed])
    if not row:
        return dict(measure(models[bed], bed, flags), seconds=time.time() - started)
    replaced = setting["replace"](sami.Config(**flags)) if "replace" in setting else {}
    # equal draws and equal noise make equal samples: those of the base are kept for other settings
    drawn = [bed, seed, *(flags.get(k) for k in ("n", "temperature"))]
    if {"load_task", "load_model", "respond"} & set(replaced):
        drawn.append(f"{row} {name}")
    kept = Path(cache) / (" ".join(map(str, drawn)).replace("/", "_") + ".jsonl")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for target, new in replaced.items():
            stack.enter_context(mock.patch(f"sami.{target}", new))
        samples = Path(folder) / "samples" / "iteration-1.jsonl"
        samples.parent.mkdir()
        if kept.exists():
            shutil.copy(kept, samples)
        try:
            sami.main([f"--{k}={v}" for k, v in flags.items()] + [f"--out_dir={folder}",
                                                                 "--resume"])
        except sami.RunFailed as e:
            return dict(failed=str(e), seconds=time.time() - started)
        if not kept.exists() or samples.stat().st_size > kept.stat().st_size:
            shutil.copy(samples, f"{kept}.{os.getpid()}")
            os.replace(f"{kept}.{os.getpid()}", kept)
        stack.pop_all().close()  # measured with sami.py's own functions
        last = Path(folder) / f"iteration-{flags['iterations']}"
        return dict(measure(str(last), bed, flags), seconds=time.time() - started)


# ------------------------------------------------------------------------------------------- report

INTRODUCTION = """# What the paper left open

The paper varies almost nothing and gives one seed. Here one choice at a time is changed, on small
models. Every figure below is made from [ablations.json](ablations.json) by
[ablations.py](../tests/ablations.py); none is typed.

**Beds.** *stories*: stories260K (260,000 weights), which goes on with a story whose first sentences
name what should come up in it. *toy*: the embedded model of this repository (0.96M weights).
*manners*: SmolLM2-135M-Instruct with the preset data/manners/smollm2.json, for two rows; {manners}.
All have an exact judge, rules.py. Unless a row says otherwise a run has sami.py's default flags and
one iteration of 12 steps from the base; settings were fixed before, none was picked by its result.

**Measured.** *adherence*: the share of principles that greedy answers to {answered} test queries
follow; *held out*: the same for principles that no run trains on. *nll*: what these answers cost
under the base, nats a token. *infonce*: what responses at temperature 1 to {split} other test
queries tell of their constitution, nats, at most log 4 = 1.39 (manners: log 2 = 0.69); *loss* (of
the same matrices), *kl* to the base (nats a token of these responses).

**How to read it.** {seeds} ({runs} runs, {minutes:.0f} minutes of one core). Draws and noise of a
seed are the same in every setting. So the first line of a row has means, the others have
differences to it, taken seed by seed, ± half of a 95 % interval over seeds (Student's t); a figure
without it is that of one seed. With some fifty settings, two or three differences just outside
their interval are to be expected by chance.

| base | adherence | held out | infonce | nll |
|---|---:|---:|---:|---:|
{bases}

![Differences in adherence and what it costs in fluency](ablations.png)
"""
DEFAULTS = """## Does a default of sami.py change?

What beats the first setting of its row on both beds, outside its interval:

{}

What these win is paid for in fluency, on stories dearly. No default was changed: the contrast stays
that of the paper, and who wants more adherence knows which flag to turn.
"""
CLOSING = """## What does not follow

Two models of under a million weights, one iteration each unless a row has three, principles that a
program judges: a choice that makes no difference here may make one elsewhere. Flags were not tuned
anew for each setting, so a row says what a choice does at these learning rates and steps, not what
it could do at its own best ones. The paper's own principles, queries and models were not run.
"""
# What a row says, without figures: where these come out otherwise, it has to be read again.
WORDS = dict(
    contrast="Either contrast alone teaches. That over responses follows more principles than both "
    "together, on toy many more of those held out, and pays in fluency; that over constitutions "
    "spares fluency, and on toy teaches nothing of what is held out.",
    reduce="It depends on lengths. On stories sums follow fewer principles and cost most fluency, "
    "even where their gradient is no longer than that of means: the weight of long responses is "
    "the trouble, only in part the size of the step. On toy all responses are about as long, and "
    "sums follow more.",
    n="At equal work the number of constitutions hardly matters; two teach toy less of what is "
    "held out.",
    temperature="0.5 and 0.8 are alike, warmer samples teach toy less. Greedy ones teach toy "
    "nothing, and stories less of what is held out. (SmolLM2, a better model, learns from greedy "
    "samples best: data/manners.)",
    beta="KL buys fluency with adherence, learned and held out, on both beds. On toy it does not "
    "matter how it is taken; on stories a little more of what is held out is followed where the "
    "KL leaves out the pairs off the diagonal, or is no k3.",
    restart="Three iterations need samples of the last model: on stories, with those of the base, "
    "held-out principles gain less. Toy has learned nearly all in its first iteration. A restart "
    "is a little better than going on, on stories.",
    steps="On stories adherence is level after a few steps while fluency and held-out adherence "
    "drift down; on toy it rises to the last step. No quantity measured on held-out queries tells "
    "the two apart: on both infonce and accuracy rise and the loss falls to the end, and nll grows "
    "before adherence has. So sami.py has no option that stops early.",
    precision="With bf16 weights small learning rates do nothing at all, since a step rounds away; "
    "at the default one a part of it is lost. Stories bears no larger rate, toy does.",
    breadth="Two principles teach most of what all do. That breadth helps held-out ones is not "
    "seen on either bed.",
    principles="Two and three are alike; one is a little behind on toy.",
    antitheses="Where antitheses come from makes no difference that is seen. Without any, negative "
    "sides are followed all the same, and on stories held-out principles gain a little less.",
    batches="The last queries of a batch teach less than all of them, as they should.",
    supervised="Supervised finetuning on the same samples teaches little, toy nothing. On the best "
    "of four by the contrast it follows much of what SAMI follows, but fewer held-out principles. "
    "So the contrast teaches; choosing by it does a good part of that, and does not carry over.",
)
MEASURES = ("adherence", "heldout", "infonce", "nll")
MORE = dict(steps=("infonce", "loss", "kl", "col_accuracy", "nll", "in_world"),
            antitheses=("positive", "negative", "heldout_negative"))
T95 = dict(zip(range(1, 11), (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)))


def interval(values):
    """Mean of a few seeds and half the width of its 95 % interval (Student's t)."""
    values = np.array(values, float)
    if len(values) < 2:
        return float(values.mean()), math.inf
    error = values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(error * T95.get(len(values) - 1, 2.1))


def paired(runs, bed, row, name, measure):
    """-> (mean, half width) of a setting's own values, of its differences to the row's first
    setting over the seeds that both have; None where there is none."""
    first = next(iter(ROWS[row][1]))
    own, other = (runs.get(key_of(bed, row, k), {}) for k in (name, first))
    values = {s: r[measure] for s, r in own.items() if r.get(measure) is not None}
    both = [values[s] - other[s][measure] for s in values
            if s in other and other[s].get(measure) is not None]
    return (interval(list(values.values())) if values else None,
            interval(both) if both and name != first else None)


def conclusion(runs, row):
    """For each bed: which settings differ from the first one in adherence, and by how much."""
    found, first = [], next(iter(ROWS[row][1]))
    for bed in BEDS:
        told, unseen = [], []
        for name in settings_of(bed, row)[1:]:
            _, gap = paired(runs, bed, row, name, "adherence")
            if not gap or math.isinf(gap[1]):
                continue
            if abs(gap[0]) > gap[1]:
                told.append(f"{name} {gap[0]:+.3f} ± {gap[1]:.3f}")
            else:
                unseen.append(f"{name} (could be seen: {gap[1]:.3f})")
        if told or unseen:
            told = f"adherence differs from {first}: {', '.join(told)}" if told else ""
            unseen = f"no difference seen: {', '.join(unseen)}" if unseen else ""
            found.append(f"*{bed}*: {'; '.join(filter(None, (told, unseen)))}.")
    return " ".join(found)


def cell(found, sign=""):
    if found is None:
        return ""
    mean, half = found
    return f"{mean:{sign}.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")


def table(runs, beds, rows, measures, differences=True):
    """Markdown lines: a line a setting, the measures of each bed side by side."""
    heads = [f"{bed}: {m}" if m == measures[0] else m for bed in beds for m in measures]
    lines = [f"| row | setting | {' | '.join(heads)} |", "|---|---|" + "---:|" * len(heads)]
    for row in rows:
        for k, name in enumerate(ROWS[row][1]):
            cells, told = [], ""
            for bed in beds:
                found = runs.get(key_of(bed, row, name), {})
                failed = sum("failed" in r for r in found.values())
                told += f" ({bed}: {failed} of {len(found)} seeds failed)" if failed else ""
                for m in measures:
                    own, gap = paired(runs, bed, row, name, m)
                    cells.append(cell(gap, "+") if k and differences else cell(own))
            if any(cells) or told:
                lines.append(f"| {'' if k else row} | {name}{told} | {' | '.join(cells)} |")
    return [*lines, ""]


def defaults(runs, beds):
    """What beats a row's first setting on all beds outside its interval, and at which cost."""
    found = []
    for row, measure in ((row, m) for row in ROWS for m in ("adherence", "heldout")):
        for name in list(ROWS[row][1])[1:]:
            gaps = [paired(runs, bed, row, name, measure)[1] for bed in beds]
            if all(gap and gap[0] > gap[1] for gap in gaps):
                costs = [cell(paired(runs, bed, row, name, "nll")[1], "+") for bed in beds]
                better = " and ".join(f"{cell(gap, '+')} ({bed})" for gap, bed in zip(gaps, beds))
                found.append(f"- *{row}, {name}*: {measure} {better}, nll {' and '.join(costs)}")
    return "\n".join(found) or "- nothing"


def report(runs):
    """ABLATIONS.md as text: its numbers are all from `runs`."""
    seeds = {bed: sorted({s for key, r in runs.items() if key.split()[0] == bed for s in r if s})
             for bed in BEDS}
    seeds = "; ".join(f"{bed}: seeds {', '.join(map(str, found))}"
                      for bed, found in seeds.items() if found)
    minutes = sum(r["seconds"] for found in runs.values() for r in found.values()) / 60
    bases = "\n".join(f"| {bed} | " + " | ".join(f"{runs[f'{bed} base'][0][m]:.3f}"
                      for m in MEASURES) + " |" for bed in BEDS if f"{bed} base" in runs)
    lines = [INTRODUCTION.format(runs=sum(map(len, runs.values())), minutes=minutes, bases=bases,
                                 seeds=seeds, answered=ANSWERED, split=SPLIT, manners="its own "
                                 "table below" if "manners" in runs else "not run yet")]
    whole = [bed for bed in BEDS if bed not in PART]
    lines += ["## Results", "", *table(runs, whole, ROWS, MEASURES)]
    for bed, rows in PART.items():
        lines += table(runs, [bed], rows, MEASURES) if f"{bed} base" in runs else []
    lines += ["## What each row says", ""]
    for number, (row, (question, _)) in enumerate(ROWS.items(), 1):
        lines += [f"{number}. **{question}** {WORDS[row]} {conclusion(runs, row)}".strip()]
        if row in MORE:
            lines += ["", *table(runs, whole, [row], MORE[row], differences=False)]
    lines += ["", DEFAULTS.format(defaults(runs, whole))]
    return "\n".join([*lines, CLOSING])


def draw(runs, path):
    """Each setting's difference to the first of its row, with its interval; and what adherence
    costs in fluency as beta and the number of steps change."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [(row, name) for row, (_, settings) in ROWS.items() for name in list(settings)[1:]]
    figure, axes = plt.subplots(1, 3, figsize=(15, 0.18 * len(names) + 1))
    colours = dict(zip(BEDS, ("tab:blue", "tab:orange", "tab:green")))
    for axis, measure in zip(axes, ("adherence", "heldout")):
        for bed, colour in colours.items():
            shift = 0.25 * (list(colours).index(bed) - 1)
            found = [(y + shift, paired(runs, bed, row, name, measure)[1])
                     for y, (row, name) in enumerate(names)]
            found = [(y, *gap) for y, gap in found if gap and math.isfinite(gap[1])]
            if found:
                y, mean, half = zip(*found)
                axis.errorbar(mean, y, xerr=half, fmt="o", ms=3, lw=1, color=colour, label=bed)
        axis.axvline(0, color="gray", lw=0.8)
        axis.set_xlim(-0.6, 0.4)
        axis.set_ylim(len(names), -1)
        axis.set_yticks(range(len(names)), [f"{row}: {name}" for row, name in names], fontsize=7)
    axes[0].set_xlabel("adherence, difference to the row's first setting")
    axes[1].set_xlabel("adherence to held-out principles, difference")
    axes[1].set_yticklabels([])
    for bed, colour in colours.items():
        for row, line in (("beta", "-"), ("steps", ":")):
            settings = sorted((float(name.split()[-1 if row == "beta" else 0]), name)
                              for name in ROWS[row][1] if any(c.isdigit() for c in name[-8:])
                              and name != "k2")
            found = [(paired(runs, bed, row, name, "nll")[0], paired(
                runs, bed, row, name, "adherence")[0], value) for value, name in settings]
            found = [(x[0], y[0], value) for x, y, value in found if x and y]
            if found:
                x, y, values = zip(*found)
                axes[2].plot(x, y, line, marker="o", ms=3, color=colour, label=f"{bed}, {row}")
                for point in found:
                    axes[2].annotate(f"{point[2]:g}", point[:2], fontsize=7)
    axes[2].set_xlabel("nll of the answers under the base, nats a token")
    axes[2].set_ylabel("adherence")
    for axis in (axes[0], axes[2]):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------------- main


@dataclass
class Config:
    rows: str = sami.flag("", f"of {', '.join(ROWS)}; nothing = all")
    seeds: str = sami.flag("1,2,3,4,5", "the more, the narrower the intervals")
    beds: str = sami.flag("stories,toy", "where to train; manners has a few rows, in minutes each")
    stories_model: str = sami.flag("", "folder of the model of the bed stories, stories260K")
    manners_model: str = sami.flag(MANNERS["model"], "of the bed manners: folder or hub name")
    out: str = sami.flag("data", "where results and report go; what is there is not run again")
    jobs: int = sami.flag(os.cpu_count() or 1, "runs side by side, a core each", low=1)
    report: bool = sami.flag(False, "run nothing, write the report of what is there")


def write(path, text):
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def main(argv):
    cfg = sami.parse(Config, argv)
    rows, beds = (cfg.rows or ",".join(ROWS)).split(","), cfg.beds.split(",")
    for given, known in ((rows, ROWS), (beds, BEDS)):
        wrong = [k for k in given if k not in known]
        sami.need(not wrong, f"there is no {', '.join(wrong)}, but {', '.join(known)}")
    with sami.telling(f"--seeds={cfg.seeds} must be whole numbers, such as 1,2,3"):
        seeds = [int(s) for s in cfg.seeds.split(",")]
    models = dict(stories=cfg.stories_model, manners=cfg.manners_model, toy=f"{ROOT}/data/toy/base")
    models = {bed: str(Path(m).resolve()) if Path(m).is_dir() else m for bed, m in models.items()}
    sami.need(cfg.report or "stories" not in beds or cfg.stories_model,
              "the bed stories needs --stories_model=<folder of stories260K>; or --beds=toy")
    out = Path(cfg.out)
    store = out / "ablations.json"
    out.mkdir(exist_ok=True)
    runs = json.loads(store.read_text("utf-8")) if store.exists() else {}
    runs = {key: {int(s): r for s, r in found.items()} for key, found in runs.items()}
    jobs = {(f"{bed} base", 0): (bed, "", "base") for bed in beds if f"{bed} base" not in runs}
    # equal settings of several rows are one job
    for seed in seeds:
        for bed in beds:
            for row in rows:
                for name in settings_of(bed, row):
                    if seed not in runs.get(key_of(bed, row, name), {}):
                        jobs.setdefault((key_of(bed, row, name), seed), (bed, row, name))
    started, context = time.time(), multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache, concurrent.futures.ProcessPoolExecutor(
            1 if {*beds} & {*PART} else cfg.jobs, mp_context=context) as pool:  # 13 GB a run
        todo = {} if cfg.report else {pool.submit(run, *job, seed, models, cache): (key, seed, job)
                                      for (key, seed), job in jobs.items()}
        for i, future in enumerate(concurrent.futures.as_completed(todo), 1):
            key, seed, job = todo[future]
            runs.setdefault(key, {})[seed] = found = future.result()
            write(store, json.dumps(runs, indent=0, sort_keys=True))
            eta = (time.time() - started) / i * (len(todo) - i)
            told = found.get("failed") or " ".join(f"{m} {found[m]:.3f}" for m in MEASURES)
            print(f"{i}/{len(todo)} {' '.join(job)}, seed {seed}: {told} | "
                  f"{found['seconds']:.0f} s | eta {eta / 60:.0f} min", flush=True)
    write(out / "ABLATIONS.md", report(runs))
    draw(runs, out / "ablations.png")
    print(f"report: {out / 'ABLATIONS.md'}")


if __name__ == "__main__":
    sami.run(main)
