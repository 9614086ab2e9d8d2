"""
SELF-ALIGN (Sun et al. 2023, arXiv 2305.03047). Six minutes of one core, on one process.
Principles move from the prompt into the weights: unlike SAMI by imitation, with no contrast.

    1 ask      human triples (type, topic, task) grow: topics, as many of each type, then tasks for
               every topic. A task that resembles one that is there, by ROUGE-L, is dropped
    2 answer   the base writes thoughts and an answer behind principles and a worked answer; string
               rules drop answers without the right thoughts, cut repetition, prune the thoughts
    3 engrave  the *base* learns these answers behind a short prompt: -log p of their tokens alone
    4 clone    the engraved model answers at length; the base learns that behind two short prompts

Departures from the paper (P) and the authors' code (A):
 1. tasks come from topics alone and pass the gate (A: it gates those of plain Self-Instruct only)
 2. a task's line is begun with its hint (A: looked for among lines, "Goat" also in "Goatherd")
 3. end tokens end texts (A: "### User"; it bans them, "Sorry" and, in stage 4, repeated n-grams)
 4. one filter, of 60 characters at least (A: 160 if it ended, in stage 4 128 if it did not)
 5. all weights learn (P: LoRA of rank 16); no identity dummies (A: 910, on which its loader fails)
 6. choices of ours: the toy, whose clones answer no longer; 2 principles, 1 worked answer, 2
    rounds, gate 0.8 (P: 16, 5, 5, 0.7), 4 answers a task at temperature 1 (P: 0.5), KL of line one
In control `shuffled` each task has another's answer, in `drawn` each has principles of its own.
"""
import copy, dataclasses, itertools, json, pathlib, random, re, sys, time
import matplotlib.pyplot as plt, numpy as np, torch
TOY = pathlib.Path(__file__).resolve().parent.parent / "data/toy"
sys.path[:0] = [str(TOY.parent.parent), str(TOY)]
import prepare, rules, sami
TASK, ANSWER, KEEPS = "\nTask:", "\nAnswer:", " I keep to the principles."
TEACHER = f"Principles:\n{{}}\nTask: Who?\nThoughts:{KEEPS}{ANSWER} I reply.\nTask: {{}}\nThoughts:"
SHORT = "Task: Who?\nAnswer: I reply.\nTask: {}\nAnswer:", "Task: {}\nAnswer:"
LONG = "Task: Who?\nAnswer at length: I reply.\nMore is not known.\nTask: {}\nAnswer at length:"
LEAKS = "Task:", "Thoughts:", "Principles:", "I reply.", "at length", "I'm sorry", "I am sorry"
LISTED, HINTED = "Topics, {}:\n1. {}\n2. {}\n", "type: {}, topic: {}, task: {}\n"
triple = lambda x: (x.split(" the ")[0], rules.things(x)[0].capitalize(), x)  # of a toy task

@dataclasses.dataclass
class Config:
    model: str = sami.flag("", "Hugging Face folder or hub name; else the toy, taught the formats")
    out_dir: str = sami.flag("out-self_align", "results.json, picture.png")
    only_ask: bool = sami.flag(False, "end behind stage 1")
    seed: int = sami.flag(21, "the first; principles, tasks and noise are functions of it", low=0)
    seeds: int = sami.flag(5, "how many", low=2, high=5)
    rouge: float = sami.flag(0.8, "most that two tasks may resemble each other", low=0, high=1)
    steps: int = sami.flag(40, "of 16 answers in stages 3 and 4 (P: 335 and 465 of 768)", low=1)

def topics_of(text):
    """A list that goes on -> its topics: at most three words, a capital first, a letter last."""
    lines = [line.split(". ", 1)[-1].strip() for line in text.split("\n")[:-1][:20]]
    return [t for t in lines if re.fullmatch(r"[A-Z]\S*( \S+){0,2}(?<=\w)", t)]

def balanced(pools):
    """{type: topics} -> (type, topic)s, none twice in whatever case, of each type as many."""
    pools = {kind: list({t.lower(): t for t in topics}.values()) for kind, topics in pools.items()}
    return [(kind, t) for kind, ts in pools.items() for t in ts[:min(map(len, pools.values()))]]

def rouge_l(a, b):
    """Two texts -> F of their longest common subsequence of words: the zeros of `row`."""
    a, b = (re.findall("[a-z0-9]+", text.lower()) for text in (a, b))
    row = every = 2 ** len(a) - 1  # a bit for each word of a
    for word in b:
        here = row & sum(1 << i for i, other in enumerate(a) if other == word)
        row = (row + here | row - here) & every
    return 2 * (row ^ every).bit_count() / max(1, len(a) + len(b))

def write(model, prompts, key, top_p=1.0, temperature=1.0, length=96):
    """-> for each prompt (what follows, did it end?); key: ints, of which noise is a function."""
    ends, tokenizer = sami.end_ids(model, model.tokenizer), model.tokenizer
    ids, keys = zip(*[(sami.encode(tokenizer, p)[0], (*key, i)) for i, p in enumerate(prompts)])
    ids = sami.sample(model, ids, seed=keys, temperature=temperature, top_p=top_p,
                      max_new_tokens=length, eos_ids=ends)
    return [(tokenizer.decode([i for i in y if i not in ends]), y[-1] in ends) for y in ids]

def ask(model, human, known, most, seed, rounds=2, times=4):
    """Stage 1: triples -> (type, topic)s, tasks that resemble none of known and no other."""
    rng, pools = random.Random(seed), {k: [t for j, t, _ in human if j == k] for k, *_ in human}
    for stage in range(rounds):
        few = [(kind, topic, rng.choice(pools[kind])) for kind, topic in balanced(pools)]
        said = write(model, itertools.starmap(LISTED.format, few), (seed, stage), 0.98)
        for (kind, *_), (text, _) in zip(few, said):
            pools[kind] += topics_of(text)
    prompts = ["".join(HINTED.format(*t) for t in rng.sample(human, 2))
               + HINTED.format(*pair, "").rstrip() for pair in balanced(pools) * times]
    tasks, known = [], [*known, *(x for *_, x in human)]
    for text, _ in write(model, prompts, (seed, 9), 0.95, length=32):
        x, whole, _ = text.lstrip().partition("\n")  # the last line may be cut off
        if whole and all(rouge_l(x, other) <= most for other in known + tasks):
            tasks.append(x)
    return balanced(pools), tasks

def filtered(xs, said):
    """Tasks, what was said: thoughts, answer, maybe a next task -> (task, answer, did it end?)s."""
    for x, (text, ended) in zip(xs, said):
        thoughts, _, text = text.partition(ANSWER)
        clauses = re.split(r"(?<=[\n.?!;:,])", text)
        again = [i for i, c in enumerate(clauses) if c in clauses[:i] and c not in "\n.?!;:,"]
        answer, next_task, _ = "".join(clauses[:min(again, default=None)]).strip().partition(TASK)
        ended = bool(next_task or ended and not again)  # else the last word may be cut off
        answer = (answer if ended else answer.rpartition(" ")[0]).split("\n13. ")[0].strip()
        if thoughts.startswith(KEEPS) and len(answer) >= 60 and not any(map(answer.count, LEAKS)):
            yield x, answer, ended

def engrave(base, lines, forms, steps, seed, lr=4e-4):
    """Stages 3, 4: (task, answer, did it end?)s -> a copy of the base that learned the answers."""
    sami.need(lines, "the rules left no answer: name another model, or --only_ask", sami.RunFailed)
    model, rng, rows, left = copy.deepcopy(base), random.Random(seed), [], []
    for form, (x, answer, ended) in zip(itertools.cycle(forms), lines):
        prompt, ids = sami.encode(base.tokenizer, form.format(x), f" {answer}")
        rows.append((prompt, ids + [base.tokenizer.eos_token_id] * ended))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    for step in range(steps):
        left = left or rng.sample(rows, len(rows))
        batch, left = zip(*left[:16]), left[16:]
        (-torch.cat(sami.response_logps(model, *batch)).mean()).backward()
        optimizer.param_groups[0]["lr"] = lr / steps * min((step + 1) / 0.3, (steps - step) / 0.7)
        optimizer.step()
        optimizer.zero_grad()
    return model

def align(base, xs, own, others, cfg):
    """Stages 2 to 4 -> {arm: model}; own: principles as a text, others: such a text for each x."""
    learn = lambda lines, forms=SHORT[:1]: engrave(base, lines, forms, cfg.steps, cfg.seed)
    mine, drawn = ([*filtered(xs, write(base, map(TEACHER.format, texts, xs), (cfg.seed, 10)))]
                   for texts in (itertools.repeat(own), others))
    engraved = learn(mine)
    long = write(engraved, map(LONG.format, xs), (cfg.seed, 11), 0.7, 0.3)
    long = [*filtered(xs, [(KEEPS + ANSWER + text, ended) for text, ended in long])]
    turned = [(x, *answer) for (x, *_), (_, *answer) in zip(mine, mine[1:] + mine[:1])]
    return dict(before=base, engraved=engraved, cloned=learn(long, SHORT), shuffled=learn(turned),
                drawn=learn(drawn))

def measure(base, model, sides, own, test, seed):
    """-> of what model says behind the short prompt the share of principles kept, its KL from the
    teacher in nats a token of the teacher's answers, its words; the share the teacher keeps."""
    prompts = [TEACHER.format(own, x) + KEEPS + ANSWER for x in test], [*map(SHORT[0].format, test)]
    gold = [text.split("\n")[0] for text, _ in write(base, prompts[0], (seed, 12))]  # no next task
    said = [text for text, _ in write(model, prompts[1], (seed, 13))]
    ids = [[sami.encode(base.tokenizer, p)[0] for p in part] for part in prompts]
    ys = [sami.encode(base.tokenizer, ANSWER, text)[1] for text in gold]
    p, q = (torch.cat(sami.response_logps(*m, ys)).detach() for m in zip((base, model), ids))
    kept = [np.mean([getattr(rules, name)(x, text.split("\n")[0]) is side for x, text in
                     zip(test, texts) for name, side in sides.items()]) for texts in (said, gold)]
    words = np.mean([len(text.split()) for text in said])
    return kept[0], float(sami.kl_to_base(p, q).mean()), words, kept[1]

def document(seed):
    """(first word, what follows, True): a text in one of the formats, which the toy learns."""
    rng, things = random.Random(seed), prepare.TRAIN_THINGS
    x, *shown = [prepare.draw_query(rng, things + prepare.TEST_THINGS * (i < 1)) for i in range(6)]
    sides, own = prepare.draw_constitution(rng, 2)
    usual, kept = (prepare.draw_response(rng, x, wanted)[1:] for wanted in ({}, sides))
    said = f"{KEEPS}{ANSWER} {kept}" if rng.random() < 0.75 else f" I do not.{ANSWER} {usual}"
    few = enumerate(rng.sample(things, 10), 1)
    topics = "".join(f"{i}. {topic.capitalize()}\n" for i, topic in few)
    texts = [f"Topics, {triple(x)[0]}:\n{topics}",
             "".join(HINTED.format(*triple(q)) for q in shown),
             f"{LONG.format(x)} {usual}\nMore is not known.", f"{SHORT[0].format(x)} {usual}",
             f"{SHORT[1].format(x)} {usual}", f"{TEACHER.format(own, x)}{said}{TASK} {shown[0]}"]
    return *rng.choices(texts, [2, 1, 2, 1, 1, 6])[0].split(" ", 1), True

def interval(v):
    """A figure of each seed -> their mean and its 95 % interval, from Student's t."""
    half = (12.71, 4.30, 3.18, 2.78)[len(v) - 2] * np.std(v, ddof=1) / len(v) ** 0.5
    return dict(mean=np.mean(v), low=np.mean(v) - half, high=np.mean(v) + half, seeds=[*v])

def main(argv):
    cfg, started, found = sami.parse(Config, argv), time.time(), []
    (out := pathlib.Path(cfg.out_dir)).mkdir(parents=True, exist_ok=True)
    path, task = cfg.model or TOY / "base", sami.load_task(TOY)
    train, test = ([q["query"] for q in part] for part in (task.train, task.test[:64]))
    base = sami.load_model(path, sami.pick_device(sami.Config), sami.Config)
    base.tokenizer = sami.load_tokenizer(path)[1]
    if not cfg.model:
        base = engrave(base, [*map(document, range(6400))], ["{}"], 400, 0, lr=3e-3)
    for cfg.seed in (seeds := range(cfg.seed, cfg.seed + cfg.seeds)):
        rng = random.Random(cfg.seed)
        topics, xs = ask(base, [*map(triple, rng.sample(train, 20))], test, cfg.rouge, cfg.seed)
        print(f"seed {cfg.seed}: {len(topics)} topics, {len(xs)} tasks: {xs[:3]} ...", flush=True)
        if cfg.only_ask:
            return
        draws = iter(lambda: prepare.draw_constitution(rng, 2), None)
        sides, own = next(c for c in draws if not c[0].items() & prepare.DEFAULT.items())
        arms = align(base, 4 * xs, own, (text for _, text in draws), cfg)
        found.append([measure(base, m, sides, own, test, cfg.seed) for m in arms.values()])
        print({arm: f"{row[0]:.3f}" for arm, row in zip(arms, found[-1])}, "eta",
              f"{(time.time() - started) * (cfg.seeds / len(found) - 1):.0f} s", flush=True)
    table, level = np.array(found), {arm: {} for arm in list(arms)[1:]}  # (seeds, arms, 4)
    for (i, arm), k in itertools.product(enumerate(level, 1), range(3)):
        before, after, name = table[:, 0, k], table[:, i, k], ("", "kl_", "words_")[k]
        for when, values in dict(before=before, after=after, effect=after - before).items():
            level[arm][name + when] = f = interval(values)
            print("{:9} {:12} {mean:.3f} [{low:.3f}, {high:.3f}]".format(arm, name + when, **f))
    found = dict(level.pop("engraved"), cloned=level.pop("cloned"), controls=level, seeds=[*seeds],
                 teacher=interval(table[:, 0, 3]), minutes=(time.time() - started) / 60)
    (out / "results.json").write_text(json.dumps(found, indent=1))
    plt.figure(figsize=(11, 4), layout="constrained")
    for k, name in enumerate(("share of principles kept", "KL from the teacher, nats a token")):
        plt.subplot(1, 2, k + 1, xlabel="model", ylabel=name).plot([*arms], table[:, :, k].T, "o")
    plt.savefig(out / "picture.png", dpi=150)

if __name__ == "__main__":
    sami.run(main)
