"""
DNO: Direct Nash Optimization (Rosset et al. 2024, arXiv 2404.03715). Seven minutes of one core.

A policy learns which of its own responses win. P(y > y' | x) is any preference, also one that goes
round in circles, which no reward can express. With pi_1 the base model, for t = 1 ... T:

    for each query x of part t: sample K responses of pi_t, add one of a teacher
    points of a response: 1 + how many of the K others it beats, by an oracle asked in both orders
    pairs: a winner of `floor` points, a loser 2 points below; 1 where the winner is pi_t's own
    replay queries of iterations t - 1, t - 2, ...: at most 30, 15, ... % of the new ones
    delta = eta * (log pi(y+) / pi_t(y+) - log pi(y-) / pi_t(y-)), summed over tokens    (Eq. 13)
    pi_t+1: a few steps from pi_t down -log sigmoid(delta); return the best on validation queries

This is DPO whose sampler and reference are the *current* iterate. With all pairs and soft labels
(Eq. 8) its optimum is pi_t exp(r_t / eta), r_t the win rate against pi_t (Eq. 9): the average over
t finds the Nash point of P, the last one circles unless P ranks or tau > 0 (appendix A).
Unlike SAMI an oracle says what is better: one constitution a query, the contrast is of responses.

Departures from the paper (P), which came without code:
 1. the oracle compares two texts by rules; points are wins, and few have 5 where most are good, so
    floor is 4 (P: GPT-4-Turbo grades all six from 1 to 6, floor 5; grades never go in circles)
 2. a query's responses are scored once, its loss is the mean of its pairs (P: batches of 64 pairs)
 3. choices of ours: a fixed number of steps (P: up to an epoch), what a loop is, replay in queries
    with a share that halves on, lr_decay (P: "lower"), no "alpha 0.005", which P does not explain
 4. the teacher is the best of 16 random answers of the toy's grammar (P: GPT-4-Turbo); else none

`offline` is DPO with the base as sampler and reference, equal queries and steps; the oracle of
`stranger` reads another constitution, so there is nothing to learn. It runs on one process.
"""
import collections, dataclasses, itertools, json, math, sys, time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from torch.nn.functional import logsigmoid

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate, sami
from sami import flag, need

random = np.random.default_rng
CIRCLE = np.array([[.5, 0, 1], [1, .5, 0], [0, 1, .5]])  # rock, paper, scissors: does row beat column?
ARMS = dict(dno=("sides", True), offline=("sides", False), stranger=("other", True))
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 2 to 10 seeds

@dataclasses.dataclass
class Config:
    model: str = flag(f"{ROOT}/data/toy/base", "pi_1: Hugging Face folder or hub name")
    task: str = flag(f"{ROOT}/data/toy", "folder of a task with a rules.py, the oracle")
    out_dir: str = flag("out-dno", "results.json, picture.png, the best iterate of each run")
    seed: int = flag(1, "the first seed: draws and noise are functions of it", low=0)
    seeds: int = flag(4, "how many", low=2, high=10)
    iterations: int = flag(4, "T", low=1)
    queries: int = flag(80, "new ones in an iteration", low=1)
    k: int = flag(5, "K, the policy's responses to a query", low=2)
    max_new_tokens: int = flag(40, "longest response", low=1)
    floor: float = flag(4.0, "a winner's fewest points")
    eta: float = flag(0.1, "pull of the reference: the beta of DPO", low=1e-6)
    steps: int = flag(5, "gradient steps of an iteration, if there are pairs enough", low=1)
    batch_size: int = flag(16, "queries a step", low=1)
    lr: float = flag(2.5e-4, "learning rate of the first iteration", low=0)
    eval_queries: int = flag(80, "test queries; a quarter as many choose the best iterate", low=4)
    principles, temperature, top_p, lr_decay = 4, 0.7, 0.95, 0.9
    # what sami.py asks for besides; n: one prompt a query
    n, warmup, optimizer, grad_clip, checkpointing, parallel = 1, 0, "adamw", 1.0, False, "auto"
    device, dtype, sample_batch, tokens_per_pass = "auto", "auto", 128, 8192

def regression_loss(delta, target=1.0):
    """delta, target = sigmoid of the gap in win rate (Eq. 8) or 1 (Eq. 13) -> nats, same shape."""
    return -target * logsigmoid(delta) - (1 - target) * logsigmoid(-delta)

def objective(example, cells, cfg):
    """In place of sami.objective: cells[0] holds token log-probs of a query's m responses."""
    gain = sami.as_matrix(cells, "sum")[0] - sami.as_matrix(example.base, "sum")[0]  # (m,)
    winner, loser = map(list, zip(*example.pairs))
    return dict(loss=regression_loss(cfg.eta * (gain[winner] - gain[loser])).mean())

def next_policy(pi, P, eta, tau=0.0, ref=None):
    """Exact iteration: pi (A,), P (A, A) -> (A,). tau > 0 pulls sampler and reference to ref."""
    behind = pi if tau == 0 else pi ** (1 - tau / eta) * ref ** (tau / eta)
    new = behind * np.exp(P @ behind / behind.sum() / eta)
    return new / new.sum()

def circle(steps, eta=10.0, tau=0.0):
    """Exploitability of the average and of the last policy, (steps + 1,) each: how often beyond
    half of the time their best opponent wins. 0 at the Nash point."""
    pi = [np.array([0.7, 0.2, 0.1])]
    for _ in range(steps):
        pi.append(next_policy(pi[-1], CIRCLE, eta, tau, np.ones(3) / 3))
    average = np.cumsum(pi, 0) / np.arange(1, steps + 2)[:, None]
    return [(policies @ CIRCLE.T).max(1) - 0.5 for policies in (average, np.array(pi))]

def preferences(judge, item, rows, columns):
    """Texts -> (R, C): P(row beats column), 0.5 = undecided. Both orders are asked: some judges
    favour what comes first."""
    asked = [(item, a, b) for a in rows for b in columns]
    first, then = (np.array([dict(A=1, B=0).get(v, 0.5) for v in judge(shown)])
                   for shown in (asked, [(i, b, a) for i, a, b in asked]))
    return ((first + 1 - then) / 2).reshape(len(rows), len(columns))

def win_rate(judge, items, ours, theirs):
    return float(np.mean([preferences(judge, *e).mean() for e in zip(items, ours, theirs)]))

def make_pairs(P, ids, teacher, floor):
    """P (m, m), ids: m lists, teacher: its place if it is there -> [(winner, loser)]."""
    points = 1 + 5 * (P.sum(1) - P.diagonal()) / (len(P) - 1)  # (m,) from 1 to 6
    for i, y in enumerate(ids):  # four tokens in a row come three times: it loses to every winner
        if max(collections.Counter(zip(y, y[1:], y[2:], y[3:])).values(), default=0) > 2:
            points[i] = 0
    return [(i, j) for i, j in itertools.permutations(range(len(ids)), 2) if ids[i] != ids[j]
            and points[i] >= floor and points[i] - points[j] >= (2 if i == teacher else 1)]

def replay(past, count, rng):
    """past: Examples of iterations t - 1, t - 2, ... -> of each 30, 15, ... % of count at most."""
    picks = [rng.permutation(len(old))[:count * 3 // (10 * 2**age)] for age, old in enumerate(past)]
    return [old[i] for old, pick in zip(past, picks) for i in pick]

def teach(rules, item, rng):
    """Of 16 random answers of the toy's world the one that follows most: all in two thirds."""
    words = dict(rules.SLOTS, verb=rules.VERBS.values())  # {slot: lists of words}
    words["first"], words["second"] = ([[thing]] for thing in rules.things(item["text"]))
    draw = lambda: {slot: rng.choice(sum(lists, [])) for slot, lists in words.items()}
    texts = [rules.TEMPLATE.format(**draw()) for _ in range(16)]
    return max(texts, key=lambda text: sum(evaluate.follows(rules, item, text).values()))

def pose(task, number, q, seed):
    """A query with its constitution, and the sides that another one takes."""
    draw = lambda k: task.draw(random((seed, number, k)), 1, q.get("focus"))[0]
    sides, other = (dict(zip(c.names, c.sides)) for c in (draw(0), draw(1)))
    return dict(number=number, query=q["query"], text=task.flat(q["query"]), constitution=draw(0),
                sides=sides, other=other)

def respond(model, task, items, count, t, cfg):
    """-> for each item `count` of (prompt's ids, ids with their end, text)."""
    asked, end = [(i["query"], i["constitution"]) for i in items for _ in range(count)], task.end
    keys = [(cfg.seed, t, i["number"], j) for i in items for j in range(count)]
    found = sami.respond(model, task.tokenizer, task, asked, cfg, keys, cfg.temperature)
    found = [(prompt, ids + end * ended, text) for prompt, ids, text, ended in found]
    return [found[k:k + count] for k in range(0, len(found), count)]

def collect(model, task, judge, items, t, cfg):
    """Sample, rank and pair -> Examples with .pairs, those that have any."""
    examples = []
    for item, found in zip(items, respond(model, task, items, cfg.k, t, cfg)):
        if hasattr(task.rules, "TEMPLATE"):
            text = teach(task.rules, item, random((cfg.seed, t, item["number"])))
            found.append(([], task.tokenizer(f" {text}").input_ids + task.end, text))
        prompts, ids, texts = zip(*found)
        e = sami.Example(item["number"], item["query"], [], texts, ids=ids, prompts=prompts[:1])
        e.pairs = make_pairs(preferences(judge, item, texts, texts), ids, cfg.k, cfg.floor)
        examples += [e] if e.pairs and all(ids) else []
    return examples

def improve(arm, judge, task, parts, cfg):
    """One arm of one seed -> what pi_1 ... pi_T+1 say to the test items, which of them is best."""
    load = lambda: sami.load_model(cfg.model, sami.pick_device(cfg), cfg)
    say = lambda items, t: [[f[2] for f in x] for x in respond(model, task, items, 3, t, cfg)]
    valid, fresh, test = parts
    model = load()
    behind = model if ARMS[arm][1] else load()  # who samples and is the reference
    said, first, past, best = [say(test, 0)], say(valid, 0), [], (0, 0)
    for t in range(1, cfg.iterations + 1):
        items, rng = fresh[(t - 1) * cfg.queries:t * cfg.queries], random((cfg.seed, t))
        new = collect(behind, task, judge, items, t, cfg)
        need(new, f"iteration {t} has no pairs; lower --floor", sami.RunFailed)
        batch = new + replay(past, len(new), rng)
        batch = [batch[i] for i in rng.permutation(len(batch))[:cfg.steps * cfg.batch_size]]
        sami.add_base_logps(behind, batch, cfg)  # replayed ones too: the reference has moved
        slower = dataclasses.replace(cfg, lr=cfg.lr * cfg.lr_decay ** (t - 1))
        sami.train(model, batch, math.ceil(len(batch) / cfg.batch_size), t, slower)
        past, said = [new, *past], [*said, say(test, t)]
        best = max(best, (win_rate(judge, valid, say(valid, t), first), t))
        if best[1] == t:
            model.save_pretrained(f"{cfg.out_dir}/{arm}-{cfg.seed}")
    return said, best[1]

def interval(values):
    """A figure of each seed -> their mean and its 95 % interval."""
    mean, half = np.mean(values), T95[len(values) - 2] * np.std(values, ddof=1) / len(values) ** 0.5
    return dict(mean=float(mean), low=mean - half, high=mean + half, seeds=list(values))

def draw(figures, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for arm, found in figures.items():
        points = [x for name, x in found.items() if name.startswith("over_base")]
        mean, low, high = ([x[k] for x in points] for k in ("mean", "low", "high"))
        left.plot(range(2, len(mean) + 2), mean, marker="o", label=arm)
        left.fill_between(range(2, len(mean) + 2), low, high, alpha=0.2)
    left.set(xlabel="iterate $\\pi_t$", ylabel="win rate over the base $\\pi_1$, by the rules")
    for tau in (0, 0.1):
        for name, values in zip(("average", "last"), circle(2000, tau=tau)):
            right.semilogx(values, label=f"{name} policy, $\\tau$ = {tau}")
    right.set(xlabel="t", ylabel="exploitability", title="rock, paper, scissors")
    left.legend(), right.legend()
    figure.savefig(path, dpi=150)

def main(argv):
    cfg = sami.parse(Config, argv)
    task, (config, tokenizer) = sami.load_task(cfg.task), sami.load_tokenizer(cfg.model)
    task.tokenizer, task.end, task.rules = tokenizer, [tokenizer.eos_token_id], evaluate.load_rules(task)
    task.principles_per_constitution, n = cfg.principles, cfg.eval_queries
    fewest = n // 4 + cfg.iterations * cfg.queries
    need(task.rules and len(task.train) >= fewest, f"{cfg.task} needs rules.py, {fewest} queries")
    task.check_lengths(config, tokenizer, cfg)
    by_rules = evaluate.rule_judge(task.rules)
    runs, started = {arm: [] for arm in ARMS}, time.time()
    for seed, arm in itertools.product(range(cfg.seed, cfg.seed + cfg.seeds), ARMS):
        items = [pose(task, i, q, seed) for i, q in enumerate(task.train + task.test[:n])]
        parts = items[:n // 4], items[n // 4:len(task.train)], items[len(task.train):]
        judge = lambda shown: by_rules([(dict(i, sides=i[ARMS[arm][0]]), a, b) for i, a, b in shown])
        said, best = improve(arm, judge, task, parts, dataclasses.replace(cfg, seed=seed))
        rate = lambda item, text: np.mean([*evaluate.follows(task.rules, item, text).values()])
        share = [np.mean([rate(i, y) for i, ys in zip(parts[2], x) for y in ys]) for x in said]
        run = dict(before=share[0], after=share[best], effect=share[best] - share[0], best=best,
                   words=np.mean([len(y.split()) for ys in said[best] for y in ys]))
        for t in range(1, len(said)):
            run[f"over_last_{t}"] = win_rate(by_rules, parts[2], said[t], said[t - 1])
        for t in range(1, len(said)):
            run[f"over_base_{t}"] = win_rate(by_rules, parts[2], said[t], said[0])
        runs[arm].append(run)
        minutes, done = (time.time() - started) / 60, sum(map(len, runs.values()))
        print(f"seed {seed} {arm}: follows {', '.join(f'{x:.3f}' for x in share)}, best {best} | eta "
              f"{minutes / done * (cfg.seeds * len(ARMS) - done):.1f} min", flush=True)
    figures = {arm: {k: interval([run[k] for run in of]) for k in of[0]} for arm, of in runs.items()}
    draw(figures, f"{cfg.out_dir}/picture.png")
    ahead = interval([a["after"] - b["after"] for a, b in zip(runs["dno"], runs["offline"])])
    ends = {f"{name}, tau {tau}": dict(mean=x[-1], low=x[1000:].min(), high=x[1000:].max()) for tau in (0, 0.1) for name, x in zip(("average", "last"), circle(2000, tau=tau))}
    results = figures.pop("dno")
    table = ...

if __name__ == "__main__":
    sami.objective, sami.record = objective, lambda cfg, row: None  # a run tells its own lines
    sami.run(main)
