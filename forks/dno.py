"""
DNO: Direct Nash Optimization (Rosset et al. 2024, arXiv 2404.03715). Six minutes of one core.

With P(y > y' | x) a preference, maybe one that goes in circles, and pi_1 the base: for t = 1 ... T:
    for each query x of part t: sample K responses of pi_t, add one of a teacher
    points of a response: 1 + how many of the K others it beats, by an oracle asked in both orders
    pairs: a winner of `floor` points, a loser 2 points below; 1 where the winner is pi_t's own
    replay queries of iterations t - 1, t - 2, ...: at most 30, 15, ... % of the new ones
    delta = eta * (log pi(y+) / pi_t(y+) - log pi(y-) / pi_t(y-)), summed over tokens    (Eq. 13)
    pi_t+1: a few steps from pi_t down -log sigmoid(delta); return the best on validation queries

This is DPO whose sampler and reference are the *current* iterate. With all pairs and soft labels
(Eq. 8) its optimum is pi_t exp(r_t / eta), r_t the win rate against pi_t (Eq. 9): the average over
t finds the Nash point of P, the last one circles unless P ranks, or tau > 0 (appendix A).
Unlike SAMI an oracle says what is better: one constitution a query, the contrast is of responses.

Departures from the paper (P), which came without code:
 1. the oracle compares two texts by rules; points are wins, and few have 5 where most are good, so
    floor is 4 (P: GPT-4-Turbo grades all six from 1 to 6, floor 5; grades never go in circles)
 2. a query's responses are scored once, its loss is the mean of its pairs (P: batches of 64 pairs)
 3. the teacher is the best of 16 random answers of the toy's grammar (P: GPT-4-Turbo)
 4. choices of ours: a fixed number of steps (P: up to an epoch), what a loop is, replay in queries
    with a share that halves on, lr_decay (P: "lower"), no "alpha 0.005", which P does not explain
`offline` is DPO on as many samples of the base; oracle and teacher of `stranger` read another
query's constitution, so that there is nothing to learn. It runs on one process.
"""
import collections, dataclasses, itertools, json, math, pathlib, sys, time
import matplotlib.pyplot as plt, numpy as np
from torch.nn.functional import logsigmoid
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import evaluate, sami

flag, random = sami.flag, np.random.default_rng
CIRCLE = np.array([[.5, 0, 1], [1, .5, 0], [0, 1, .5]])  # rock, paper, scissors: P(row > column)
ARMS = dict(dno=(0, 1), offline=(0, 2), stranger=(1, 1))  # whose constitution, how many models
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 2 to 10 seeds

@dataclasses.dataclass
class Config:
    model: str = flag("data/toy/base", "pi_1: Hugging Face folder or hub name")
    out_dir: str = flag("out-dno", "results.json, picture.png")
    seed: int = flag(21, "first seed, of draws and noise; those to 13 chose iterations", low=0)
    seeds: int = flag(5, "how many", low=2, high=10)
    iterations: int = flag(3, "T", low=1, high=10)
    queries: int = flag(80, "new ones in an iteration", low=1, high=98)
    eta: float = flag(0.1, "pull of the reference: the beta of DPO", low=1e-6)
    lr: float = flag(2.5e-4, "learning rate of the first iteration", low=0)
    eval_queries: int = flag(100, "test queries", low=1)
    k, temperature, top_p, floor, lr_decay, device, dtype = 5, 0.7, 0.95, 4, 0.9, "auto", "auto"
    steps, batch_size, max_new_tokens, sample_batch, tokens_per_pass = 5, 16, 40, 128, 8192
    n, warmup, optimizer, grad_clip, checkpointing, parallel = 1, 0, "adamw", 1.0, False, "auto"

def regression_loss(delta, target=1.0):
    """delta, target = sigmoid of the gap in win rate (Eq. 8) or 1 (Eq. 13) -> nats, same shape."""
    return -target * logsigmoid(delta) - (1 - target) * logsigmoid(-delta)

def objective(example, cells, cfg):
    """In place of sami.objective: cells[0] holds token log-probs of a query's m responses."""
    gain = sami.as_matrix(cells, "sum")[0] - sami.as_matrix(example.base, "sum")[0]  # (m,)
    winner, loser = map(list, zip(*example.pairs))
    return dict(loss=regression_loss(cfg.eta * (gain[winner] - gain[loser])).mean())

def next_policy(pi, P, eta, tau=0.0, ref=1.0):
    """Exact iteration: pi (A,), P (A, A) -> (A,). tau > 0 pulls sampler and reference to ref."""
    behind = pi ** (1 - tau / eta) * ref ** (tau / eta)
    new = behind * np.exp(P @ behind / behind.sum() / eta)
    return new / new.sum()

def circle(steps, eta=10.0, tau=0.0):
    """What the best opponent wins above 1/2, against the average and the last: (2, steps + 1)."""
    pi = [np.array([0.7, 0.2, 0.1])]
    for _ in range(steps):
        pi.append(next_policy(pi[-1], CIRCLE, eta, tau))
    average = np.cumsum(pi, 0) / np.arange(1, steps + 2)[:, None]
    return (np.array([average, pi]) @ CIRCLE.T).max(-1) - 0.5

def preferences(judge, item, rows, columns):
    """Texts -> (R, C): P(row beats column), 0.5 = undecided. In both orders: first is no merit."""
    asked = [(item, a, b) for a in rows for b in columns]
    first, then = (np.array([dict(A=1, B=0).get(v, 0.5) for v in judge(shown)])
                   for shown in (asked, [(i, b, a) for i, a, b in asked]))
    return ((first + 1 - then) / 2).reshape(len(rows), len(columns))

def win_rate(judge, *items_ours_theirs):
    return float(np.mean([preferences(judge, *e).mean() for e in zip(*items_ours_theirs)]))

def make_pairs(P, ids, floor):
    """P (m, m), ids: m lists of which the last is the teacher's -> [(winner, loser)]."""
    points = 1 + 5 * (P.sum(1) - P.diagonal()) / (len(P) - 1)  # (m,) from 1 to 6
    fours = [collections.Counter(zip(y, y[1:], y[2:], y[3:])) for y in ids]
    points[[max(c.values(), default=0) > 2 for c in fours]] = 0  # a loop: it loses to every winner
    return [(i, j) for i, j in itertools.permutations(range(len(ids)), 2) if ids[i] != ids[j] and
            points[i] >= floor and points[i] - points[j] >= (2 if i == len(ids) - 1 else 1)]

def replay(past, count, rng):
    """past: Examples of iterations t - 1, t - 2, ... -> of each 30, 15, ... % of count at most."""
    picks = [rng.permutation(len(old))[:count * 3 // (10 * 2**age)] for age, old in enumerate(past)]
    return [old[i] for old, pick in zip(past, picks) for i in pick]

def teach(rules, item, rng):
    """Of 16 random answers of the toy's world the one that follows most: all four in two thirds."""
    words = dict(rules.SLOTS, verb=rules.VERBS.values())  # {slot: lists of words}
    words["first"], words["second"] = ([[thing]] for thing in rules.things(item["text"]))
    fill = lambda: {slot: rng.choice(sum(lists, [])) for slot, lists in words.items()}
    texts = [rules.TEMPLATE.format(**fill()) for _ in range(16)]
    return max(texts, key=lambda text: sum(evaluate.follows(rules, item, text).values()))

def respond(model, task, items, count, t, cfg):
    """-> for each item `count` of (prompt's ids, ids with their end, text)."""
    asked = [(item["text"], item["c"]) for item in items for _ in range(count)]
    keys = [(cfg.seed, t, item["number"], j) for item in items for j in range(count)]
    found = [(prompt, ids + task.end * ended, text) for prompt, ids, text, ended in
             sami.respond(model, task.tokenizer, task, asked, cfg, keys, cfg.temperature)]
    return [found[k:k + count] for k in range(0, len(found), count)]

def collect(model, task, items, t, cfg):
    """Sample, rank and pair -> Examples with .pairs, those that have any."""
    examples = []
    for item, found in zip(items, respond(model, task, items, cfg.k, t, cfg)):
        text = teach(task.rules, item, random((cfg.seed, t, item["number"])))
        gold = task.tokenizer(f" {text}", add_special_tokens=False).input_ids + task.end
        prompts, ids, texts = zip(*found, ([], gold, text))
        e = sami.Example(item["number"], item["text"], [], texts, ids=ids, prompts=prompts[:1])
        e.pairs = make_pairs(preferences(task.judge, item, texts, texts), ids, cfg.floor)
        examples += [e] if e.pairs and all(ids) else []
    return examples

def improve(model, behind, task, fresh, valid, test, cfg):
    """`behind` samples and is the reference -> texts of pi_1 ... pi_T+1 on test items, the best."""
    say = lambda items, t: [[f[2] for f in x] for x in respond(model, task, items, 2, t, cfg)]
    said, first, past, best = [say(test, 0)], say(valid, 0), [], (0.5, 0)
    for t in range(1, cfg.iterations + 1):
        rng, mine = random((cfg.seed, t)), fresh[(t - 1) * cfg.queries:t * cfg.queries]
        new = collect(behind, task, mine, t, cfg)
        batch = new + replay(past, len(new), rng)
        batch = [batch[i] for i in rng.permutation(len(batch))[:cfg.steps * cfg.batch_size]]
        sami.add_base_logps(behind, batch, cfg)  # replayed ones too: the reference has moved
        slower = dataclasses.replace(cfg, lr=cfg.lr * cfg.lr_decay ** (t - 1))
        sami.train(model, batch, math.ceil(len(batch) / cfg.batch_size), t, slower)
        past, said = [new, *past], [*said, say(test, t)]
        best = max(best, (win_rate(task.judge, valid, say(valid, t), first), t))
    return said, best[1]

def interval(values):
    """A figure of each seed -> their mean and its 95 % interval."""
    mean, half = np.mean(values), T95[len(values) - 2] * np.std(values, ddof=1) / len(values) ** 0.5
    return dict(mean=float(mean), low=mean - half, high=mean + half, seeds=list(map(float, values)))

def draw(found, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for arm in ARMS:
        mean, low, high, _ = zip(*[x.values() for k, x in found[arm].items() if "over_base" in k])
        left.plot(range(2, len(mean) + 2), mean, label=arm)
        left.fill_between(range(2, len(mean) + 2), low, high, alpha=0.2)
    right.semilogx(circle(2000).T, label=["average policy", "last policy"])
    left.set(xlabel="iterate $t$", xticks=range(2, len(mean) + 2), ylabel="win rate over the base")
    right.set(xlabel="$t$", ylabel="exploitability", title="rock, paper, scissors by enumeration")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=150)

def main(argv):
    cfg, runs, started = sami.parse(Config, argv), {arm: [] for arm in ARMS}, time.time()
    (out := pathlib.Path(cfg.out_dir)).mkdir(parents=True, exist_ok=True)
    task, (_, tokenizer) = sami.load_task("data/toy"), sami.load_tokenizer(cfg.model)
    task.tokenizer, task.end, n = tokenizer, [tokenizer.eos_token_id], len(task.train)
    task.principles_per_constitution, task.rules = 4, evaluate.load_rules(task)
    task.judge, seeds = evaluate.rule_judge(task.rules), range(cfg.seed, cfg.seed + cfg.seeds)
    for cfg.seed, arm in itertools.product(seeds, ARMS):
        items, (shift, many) = [], ARMS[arm]
        for i, q in enumerate(task.train + task.test[:cfg.eval_queries]):
            c = task.draw(random((cfg.seed, i)), 1)[0]
            items.append(dict(number=i, text=q["query"], c=c, sides=dict(zip(c.names, c.sides))))
        read = [dict(item, sides=items[i - shift]["sides"]) for i, item in enumerate(items)]
        models = [sami.load_model(cfg.model, sami.pick_device(cfg), cfg) for _ in range(many)]
        parts, test = (read[:n - 20], read[n - 20:n], read[n:]), items[n:]
        said, best = improve(models[0], models[-1], task, *parts, cfg)
        share = [np.mean([[*evaluate.follows(task.rules, item, y).values()]
                          for item, ys in zip(test, answers) for y in ys]) for answers in said]
        run = dict(before=share[0], after=share[best], effect=share[best] - share[0])
        for name, others in dict(over_last=said, over_base=said[:1] * cfg.iterations).items():
            for t, (ours, theirs) in enumerate(zip(said[1:], others), 2):
                run[f"{name}_{t}"] = win_rate(task.judge, test, ours, theirs)
        runs[arm].append(run)
        minutes, done = (time.time() - started) / 60, sum(map(len, runs.values()))
        eta = minutes * (cfg.seeds * len(ARMS) / done - 1)
        print(f"seed {cfg.seed} {arm}: follows {np.round(share, 3)} eta {eta:.1f} min", flush=True)
    found = {arm: {k: interval([run[k] for run in of]) for k in of[0]} for arm, of in runs.items()}
    lead = interval([a["after"] - b["after"] for a, b in zip(runs["dno"], runs["offline"])])
    draw(found, out / "picture.png")
    games = [dict(mean=x[-1], low=x[1000:].min(), high=x[1000:].max()) for x in circle(2000)]
    controls = dict(found, lead_on_offline=lead, circle_average=games[0], circle_last=games[1])
    results = dict(controls.pop("dno"), controls=controls, seeds=list(seeds), minutes=minutes)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    for arm, name in itertools.product(ARMS, run):
        print("{:9} {:12} {mean:.3f} [{low:.3f}, {high:.3f}]".format(arm, name, **found[arm][name]))

if __name__ == "__main__":
    sami.objective, sami.record = objective, lambda cfg, row: None
    sami.run(main)
