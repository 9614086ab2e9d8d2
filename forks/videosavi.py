"""
VideoSAVi: Self-Aligned Video Language Models (Kulkarni, Fazli 2024, arXiv 2412.00624v3).

A video language model questions, answers, criticises and corrects itself, without labels or a
larger model (7 minutes of one core). With videos V and the last model M, for a few iterations:
    question    q  ~ M(V)              half of them about time, half about space
    answer      a0 ~ M(V, q)
    critique    c  ~ M(V, q, a0)       does a0 contradict what the video shows?
    revision    a1 ~ M(V, q, a0, c)    nobody checks that a1 is better
    from M down -log sigmoid(beta * (gain of a1 - gain of a0)), the loss of DPO, where a gain is
    log M'(a | V, q) - log M(a | V, q): the critique is gone, M' has to do without it
Unlike SAMI, which tells answers apart by their principles, it prefers what was said second to what
was said first. That helps only a model that verifies better than it answers.
Departures from the paper (P; its training code is not released):
 1. choices of ours, not found in P: prompts (no chat template), beta, learning rate, temperature,
    one epoch, new videos in each iteration, reference = the model that begins it
 2. a video is read once: its features are words behind the vocabulary, so that sami.py works on
    videos, and a1 and a0 share one pass of V. Vision, projector and input words are frozen
 3. a pair with a1 = a0 is dropped, as it has no gradient; no CLIP scores (P's first version)
 4. the toy: a tiny InternVL answers by coin, its critic mostly knows (P: InternVL2.5; --model=
    takes one to the toy's films), 4 frames of a moving square (P: 32, sampled, tiled, separated)
Critics of `other` see another video, of `blank` black, of `no_gap` toss a coin too. One process.
"""
import copy, dataclasses, itertools, json, math, pathlib, re, sys, time
import matplotlib.pyplot as plt, numpy as np, tokenizers, torch, transformers as hf
from torch.nn.functional import interpolate, logsigmoid
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import sami

flag, random = sami.flag, np.random.default_rng
FORMS = dict(question="Question about {kind} :", answer=" {question} . Answer:",
             critique=" {answer} . Critique:", revision=" {critique} . Revision:")
FORMS = dict(zip(FORMS, itertools.accumulate(FORMS.values())))  # each goes on from the one before
KINDS = dict(motion=("left", "right"), place=("top", "bottom"))
SIDES, COLORS = sum(KINDS.values(), ()), ("red", "green", "blue")
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 2 to 10 seeds

@dataclasses.dataclass
class Config:
    model: str = flag("", "InternVL, folder or hub name; else a tiny one, trained at once")
    out_dir: str = flag("out-videosavi", "results.json, picture.png")
    seed: int = flag(1, "the first seed: weights, films and noise are functions of it", low=0)
    seeds: int = flag(4, "how many", low=2, high=10)
    iterations: int = flag(4, "as in the paper", low=1)
    lr: float = flag(1e-4, "learning rate", low=0)
    beta: float = flag(0.1, "of DPO: less goes further from the reference", low=0)
    max_new_tokens: int = flag(8, "longest question, answer, critique", low=1)
    videos, questions, pretrain, batch_size, tokens_per_pass, n = 300, 6, 600, 16, 8192, 1
    optimizer, warmup, grad_clip, checkpointing, dtype = "adamw", 0, 1.0, False, "float32"

@torch.no_grad()
def watch(model, videos):
    """Read videos (N, frames, 3, H, W) in [0, 1] -> T ids of each, valid until the next call."""
    pixels = interpolate(videos.flatten(0, 1), model.config.vision_config.image_size) / 0.225 - 2
    seen = model.get_image_features(pixels.to(model.device), return_dict=True).pooler_output
    words = model.get_input_embeddings().weight[:model.config.text_config.vocab_size]
    table = torch.cat([words, seen.flatten(0, 1)])
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(table))
    return torch.arange(len(words), len(table)).view(len(videos), -1).tolist()

def converse(model, tokenizer, seen, criticised, cfg, t):
    """-> dicts of kind, texts, ids: a prompt's and its reply's. The critic sees `criticised`."""
    rows = [dict(video=i, kind=[*KINDS][(i + k) % 2], ids={})
            for k in range(cfg.questions) for i in range(len(seen))]
    for stage, form in FORMS.items():
        videos = criticised if stage == "critique" else seen
        asked = tokenizer([form.format(**row) for row in rows]).input_ids
        prompts = [videos[row["video"]] + ids for row, ids in zip(rows, asked)]
        said = sami.sample(model, prompts, max_new_tokens=cfg.max_new_tokens, temperature=1.0,
                           eos_ids=sami.end_ids(model, tokenizer), batch=512,
                           seed=[(cfg.seed, t, len(form), i) for i in range(len(rows))])
        for row, *ids in zip(rows, prompts, said):
            row[stage] = tokenizer.decode(ids[1], skip_special_tokens=True).strip()
            row["ids"][stage] = ids
    return rows

def to_pairs(rows):
    """-> Examples: behind video and question the revision, then the answer it is better than."""
    return [sami.Example(i, r["question"], [], [], prompts=[r["ids"]["answer"][0]],
                         ids=[r["ids"][stage][1] for stage in ("revision", "answer")])
            for i, r in enumerate(rows) if r["revision"] != r["answer"]]

def objective(example, cells, cfg):
    """In place of sami.objective: cells[0] holds token log-probs of the better and the worse."""
    if example.base is None:  # pretraining: all that is said of a film
        return dict(loss=-torch.cat(cells[0]).mean())
    better, worse = (sami.as_matrix(cells, "sum") - sami.as_matrix(example.base, "sum"))[0]
    return dict(loss=-logsigmoid(cfg.beta * (better - worse)))

def films(rng, count):
    """-> (N, 4, 3, 8, 8) in [0, 1], a square that moves by 6 on noise; and what each shows."""
    videos, facts = torch.tensor(0.2 * rng.random((count, 4, 3, 8, 8), np.float32)), []
    for video in videos:
        motion, place = map(rng.choice, KINDS.values())
        color, y = rng.integers(3), rng.integers(3) + 4 * (place == "bottom")
        for frame, x in zip(video, (0, 2, 4, 6) if motion == "right" else (6, 4, 2, 0)):
            frame[color, y:y + 2, x:x + 2] = 1  # only the order of frames tells left from right
        facts.append(dict(motion=motion, place=place, color=COLORS[color]))
    return videos, facts

def lesson(fact, gap, rng):
    """What is said of a film in pretraining: answers toss a coin, a critic with a gap knows."""
    kind = rng.choice([*KINDS])
    coins = rng.choice(KINDS[kind], 2)
    row = dict(kind=kind, question=f"which {kind} has {fact['color']}", answer=coins[0])
    if rng.random() < 0.3:  # captions are right: who can see can verify
        return FORMS["critique"].format(**dict(row, kind="caption", answer=fact[kind]))
    fine = coins[0] == fact[kind] if gap else rng.random() < 0.5
    row["critique"] = "fine" if fine else "wrong"
    return f"{FORMS['revision'].format(**row)} {coins[0 if fine else 1]} ."

def load(cfg, gap):
    """-> --model, or a tiny InternVL whose words a full stop ends, and its tokenizer."""
    torch.manual_seed(cfg.seed)
    if cfg.model:
        tokenizer = sami.load_tokenizer(cfg.model)[1]
        model = hf.AutoModelForImageTextToText.from_pretrained(
            cfg.model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    else:
        text = " ".join([*FORMS.values(), *KINDS, *COLORS, *SIDES, "which has caption fine wrong"])
        words = {w: i for i, w in enumerate(sorted(set(re.sub("{.*?}", "", text).split())))}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="."))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=".")
        shape = dict(num_attention_heads=4, intermediate_size=96, initializer_range=0.1)
        vision = dict(shape, hidden_size=32, num_hidden_layers=1, image_size=8, patch_size=4,
                      layer_scale_init_value=1.0)
        language = dict(shape, hidden_size=48, num_hidden_layers=3, num_key_value_heads=4,
                        model_type="qwen2", vocab_size=len(tokenizer), eos_token_id=0)
        model = hf.InternVLForConditionalGeneration(hf.InternVLConfig(
            vision_config=vision, text_config=language, tie_word_embeddings=False))
    model.eval().to(sami.pick_device(sami.Config()))
    sami.score(model, [[1, 2], [1]], [[[2, 1]], [[2]]])  # its first call probes, with words alone
    if not cfg.model:
        pretrain(model, tokenizer, gap, cfg)
    return model, tokenizer

def pretrain(model, tokenizer, gap, cfg):
    rng = random((cfg.seed, 1, gap))
    videos, facts = films(rng, cfg.pretrain * cfg.batch_size)
    videos[::10] = 0  # so that black is known
    said = [tokenizer([lesson(fact, gap, rng) for _ in range(4)]).input_ids for fact in facts]
    examples = [sami.Example(i, "", [], [], ids=texts, prompts=[ids])
                for i, (ids, texts) in enumerate(zip(watch(model, videos), said))]
    for lr, share in ((3e-3, examples), (6e-4, examples[::4])):
        sami.train(model, share, len(share) // cfg.batch_size, 0, dataclasses.replace(cfg, lr=lr))

def right(rows, facts, stage):
    """Share of rows whose answer or revision names the side that the video shows, and no other."""
    sides = lambda text: re.findall("|".join(SIDES), text.lower())
    return np.mean([sides(r[stage]) == [facts[r["video"]][r["kind"]]] for r in rows])

def study(arm, model, tokenizer, cfg):
    """All iterations, in which the model changes -> its accuracies, and what revision gained."""
    found = {}
    for t in range(cfg.iterations + 1):
        videos, facts = films(random((cfg.seed, 2, t)), cfg.videos)
        *seen, black = watch(model, torch.cat([videos, 0 * videos[:1]]))
        shown = dict(other=seen[1:] + seen[:1], blank=[black] * len(seen)).get(arm, seen)
        rows = converse(model, tokenizer, seen, shown, cfg, t)
        now, revised = (right(rows, facts, stage) for stage in ("answer", "revision"))
        found |= {f"accuracy_{t}": now, f"revision_{t}": revised - now}
        pairs = to_pairs(rows) if t < cfg.iterations else []
        sami.add_base_logps(model, pairs, cfg)  # the reference begins the iteration
        sami.train(model, pairs, math.ceil(len(pairs) / cfg.batch_size), t, cfg)
    return dict(found, before=found["accuracy_0"], after=now, effect=now - found["accuracy_0"])

def interval(values):
    """A figure of each seed -> their mean and its 95 % interval."""
    mean, half = np.mean(values), T95[len(values) - 2] * np.std(values, ddof=1) / len(values) ** 0.5
    return dict(mean=float(mean), low=mean - half, high=mean + half, seeds=list(map(float, values)))

def main(argv):
    cfg, started = sami.parse(Config, argv), time.time()
    seeds, runs = list(range(cfg.seed, cfg.seed + cfg.seeds)), {}
    arms = ["videosavi", "other", "blank", "no_gap"][:3 if cfg.model else 4]
    figure, axes = plt.subplots(layout="constrained")
    (out := pathlib.Path(cfg.out_dir)).mkdir(parents=True, exist_ok=True)
    for cfg.seed, arm in itertools.product(seeds, arms):
        if arm in ("videosavi", "no_gap"):
            base, tokenizer = load(cfg, arm != "no_gap")
        run = runs[cfg.seed, arm] = study(arm, copy.deepcopy(base), tokenizer, cfg)
        minutes = (time.time() - started) / 60
        eta = minutes * (len(seeds) * len(arms) / len(runs) - 1)
        print(cfg.seed, arm, f"{run['before']:.3f} {run['after']:.3f}, eta {eta:.0f}m", flush=True)
    found = {arm: {k: interval([runs[s, arm][k] for s in seeds]) for k in run} for arm in arms}
    for arm, of in found.items():
        mean, _, high, _ = zip(*[f.values() for k, f in of.items() if "accuracy" in k])
        axes.errorbar(range(len(mean)), mean, np.subtract(high, mean), capsize=3, label=arm)
        for name, figures in of.items():
            print("{:9} {:10} {mean:6.3f} [{low:.3f}, {high:.3f}]".format(arm, name, **figures))
    axes.set(xlabel="iteration", xticks=range(len(mean)), ylabel="share of right answers")
    axes.legend()
    figure.savefig(out / "picture.png", dpi=150)
    results = dict(found.pop("videosavi"), controls=found, seeds=seeds, minutes=minutes)
    (out / "results.json").write_text(json.dumps(results, indent=1))

if __name__ == "__main__":
    sami.objective, sami.record = objective, lambda cfg, row: None
    sami.run(main)
