"""
SAR: Self-Aligned Reward (Han et al. 2025, arXiv 2509.05489). Six minutes of one core.

A policy learns to be right *and* brief, with no target for length. With a question q, an answer a,
v_j = log pi(a_j | q, a_<j) - log pi(a_j | a_<j) is what q tells of token j. At each step:

    sample n answers to each of a batch of questions, with the current policy at temperature 1
    score each answer twice: behind its question, and behind the empty question
    R_SA = (ppl(a) - ppl(a | q)) / ppl(a) = 1 - exp(-mean_j v_j), at least -1
    R = R_VR + alpha * R_SA             R_VR: is the last number in the text the right one?
    A = R - mean of the n R             GRPO; not divided by their spread
    descend, in `updates` parts: clipped policy gradient + kl * KL to the base, summed over tokens

Unlike SAMI it has a verifier, and contrasts one answer with and without its context. An echo of q
may earn more than a brief right answer. Departures from the paper (P) and the authors' code (A):
 1. R_SA in log space: no exp of a large number, no inf / inf = nan (A: two perplexities, + 1e-9)
 2. a question runs once for its n answers, nothing is padded to 1024 (A: a row each, both times)
 3. sums over tokens are divided by the longest length and by answers (A: by the former)
 4. the empty question keeps its frame, as in A; a fifth of the toy's pretraining rows have none
 5. choices of ours: the toy; lr 1e-3 (A: 1e-6); 50 batches of 16 (A: 500 of 128); alpha 0.15,
    chosen on other seeds (P: 0.2, tried from 0.05 to 0.3), and the same in `alone`
 6. GRPO only (A: PPO too)
Controls: `grpo` is R_VR alone, `alone` R_SA alone. `shuffled` adds the R_SA of another question's
answers: noise as large, from which nothing is to be learned. All arms of a seed start from one base
and see the same questions, so their differences are taken in pairs. It runs on one process.
"""
import copy, dataclasses, itertools, json, random, re, sys, time
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np, tokenizers, torch, transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sami

# the weights of R_VR and of alpha * R_SA; 1 = the R_SA of the neighbour in the batch
ARMS = dict(base=(0, 0, 0), grpo=(1, 0, 0), sar=(1, 1, 0), alone=(0, 1, 0), shuffled=(1, 1, 1))
PAIRS = [pair.split("-") for pair in  # whose mean is taken from whose, seed by seed
         ("sar-grpo", "shuffled-grpo", "sar-shuffled", "alone-grpo", "grpo-base")]
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 2 to 10 seeds
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
FILLER = "let me think .", "well now .", "step by step .", "here we go .", "good question ."

@dataclasses.dataclass
class Config:
    model: str = sami.flag("", "Hugging Face folder or hub name; else a tiny one, trained at once")
    out_dir: str = sami.flag("out-sar", "results.json, picture.png")
    seed: int = sami.flag(1, "the first seed: weights, data and noise are functions of it", low=0)
    seeds: int = sami.flag(7, "how many", low=2, high=10)
    pretrain: int = sami.flag(600, "steps on worked sums, brief and verbose", low=1)
    steps: int = sami.flag(50, "batches of questions", low=1)
    batch_size: int = sami.flag(16, "questions a batch", low=2, high=300)
    n: int = sami.flag(6, "answers to a question", low=2)
    updates: int = sami.flag(2, "optimizer steps on a batch", low=1, high=2)
    alpha: float = sami.flag(0.15, "weight of R_SA", low=0)
    clip: float = sami.flag(0.2, "how far a token's probability moves on a batch", low=0)
    kl: float = sami.flag(0.001, "weight of the KL to the base", low=0)
    lr: float = sami.flag(1e-3, "learning rate, constant", low=0)
    max_new_tokens: int = sami.flag(40, "longest answer", low=1)

def self_aligned(asked, alone):
    """One answer's token log-probs behind its question and without it, (L,) nats each -> R_SA."""
    return (-torch.expm1(-(asked - alone).double().mean())).clamp(min=-1)

def advantages(correct, gain, verifier, alpha):
    """R_VR and R_SA (Q, n) and their weights -> (Q, n), rows of mean 0."""
    rewards = verifier * correct + alpha * gain
    return rewards - rewards.mean(1, keepdim=True)  # over their spread, R_SA would outgrow R_VR

def token_loss(new, old, base, advantage, cfg):
    """Log-probs under policy, sampler and base, and advantages, of K tokens: (K,) -> (K,)."""
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * advantage)
    return cfg.kl * sami.kl_to_base(new, base) - gain

def right(text, result):
    """R_VR: is the last number anywhere in the text, a word or digits, the result?"""
    found = re.findall(rf"\b(?:\d+|{'|'.join(NUMBERS)})\b", text.lower())
    return found[-1:] in ([NUMBERS[result]], [str(result)])

def ask(tokenizer, x):
    """A question, or "" -> prompt ids."""
    chat = [dict(role="system", content="Reason, then answer."), dict(role="user", content=x)]
    return sami.encode(tokenizer, chat if tokenizer.chat_template else f"Question: {x}\nAnswer:")[0]

@torch.no_grad()
def collect(model, base, tokenizer, sums, arm, cfg, key):
    """-> of each question its prompt, n answers, n times log-probs under sampler and base and the
    advantage of each token (L,); the answers' mean accuracy and length."""
    (verifier, aligned, shift), n = ARMS[arm], cfg.n
    prompts = [ask(tokenizer, x) for x, *_ in sums]
    keys, ends = [(*key, i) for i in range(n * len(sums))], sami.end_ids(model, tokenizer)
    flat = sami.sample(model, [p for p in prompts for _ in range(n)], temperature=1.0, batch=512,
                       max_new_tokens=cfg.max_new_tokens, eos_ids=ends, seed=keys)
    ids = [flat[k:k + n] for k in range(0, len(flat), n)]  # with their end ids
    texts = tokenizer.batch_decode(flat, skip_special_tokens=True)
    correct = torch.tensor([float(right(t, sums[i // n][-1])) for i, t in enumerate(texts)])
    old, before = sami.score(model, prompts, ids), sami.score(base, prompts, ids)
    alone = sami.score(model, [ask(tokenizer, "")] * len(ids), ids)
    gain = torch.tensor([list(map(self_aligned, *rows)) for rows in zip(old, alone)])
    advantage = advantages(correct.view(-1, n), gain.roll(shift, 0), verifier, cfg.alpha * aligned)
    each = [[a.to(t).expand(len(t)) for a, t in zip(*rows)] for rows in zip(advantage, old)]
    shown = float(correct.mean()), np.mean([len(y) for y in flat])
    return list(zip(prompts, ids, old, before, each)), shown

def descend(model, optimizer, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

def improve(model, optimizer, batch, cfg):
    """`updates` optimizer steps, each on its part of a batch's questions."""
    for k in range(cfg.updates):
        prompts, ids, *known = zip(*batch[k::cfg.updates])
        tokens = (torch.cat(sum(rows, [])) for rows in (sami.score(model, prompts, ids), *known))
        loss = token_loss(*tokens, cfg).sum() / cfg.max_new_tokens / sum(map(len, ids))
        descend(model, optimizer, loss)

def all_sums():
    """-> [(question, steps, result)], such as "one plus four minus two", "... is three .", 3."""
    then = lambda b: f"{'plus' if b > 0 else 'minus'} {NUMBERS[abs(b)]}"
    step = lambda a, b: f"{NUMBERS[a]} {then(b)} is {NUMBERS[a + b]} ."
    return [(f"{NUMBERS[a]} {then(b)} {then(c)}", f"{step(a, b)} {step(a + b, c)}", a + b + c)
            for a, b, c in itertools.product(range(1, 7), range(-6, 7), range(-6, 7))
            if b * c and 0 <= a + b <= 12 and 0 <= a + b + c <= 12]

def load(sums, cfg, seed, device):
    """-> --model, or a small Llama, mostly right, that chats when it is done; its tokenizer."""
    if cfg.model:
        return sami.load_model(cfg.model, device, sami.Config()), sami.load_tokenizer(cfg.model)[1]
    text = " ".join([*FILLER, *NUMBERS, "plus minus is so the answer Question: Answer:"])
    words = dict(zip(["<eos>", *sorted(set(text.split()))], itertools.count()))
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=True, initializer_range=0.1, eos_token_id=0))
    optimizer, rng = torch.optim.AdamW(model.parameters()), random.Random(seed)
    for step in range(cfg.pretrain):
        prompts, ids = [], []
        for x, steps, result in rng.choices(sums, k=16):
            said = [steps] * (rng.random() < 0.8) + ["so the answer is"] * (rng.random() < 0.5)
            said += [NUMBERS[result], ".", *rng.choices(FILLER, k=rng.randrange(6))]
            prompts.append(ask(tokenizer, "" if rng.random() < 0.2 else x))
            ids.append([tokenizer(" ".join(said)).input_ids + [0]])
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, step / 30) * (1 - step / cfg.pretrain)
        descend(model, optimizer, -sami.plain_logps(model, prompts, ids).mean())
    return model.to(device), tokenizer

def figures(found):
    """(seeds, 2) -> for accuracy and tokens the mean, its 95 % interval, each seed's value."""
    error = T95[len(found) - 2] * found.std(0, ddof=1) / len(found) ** 0.5
    return {name: dict(mean=m, low=m - e, high=m + e, seeds=list(v)) for name, m, e, v in zip(
        ("accuracy", "tokens"), found.mean(0), error, found.T)}

def draw(found, path):
    figure, axes = plt.subplots(layout="constrained")
    pair = np.stack([found["grpo"], found["sar"]])  # (2, seeds, 2): a line from one to the other
    axes.plot(pair[..., 1], pair[..., 0], color="lightgrey")
    for arm, of in found.items():
        axes.plot(of[:, 1], of[:, 0], "o", label=arm)
    axes.set(xlabel="tokens an answer", ylabel="share of right answers to new sums")
    axes.legend()
    figure.savefig(path, dpi=150)

def main(argv):
    cfg, started, found, sums = sami.parse(Config, argv), time.time(), [], all_sums()
    sami.need(sami.WORLD == 1, "it runs on one process: start it without torchrun")
    device, seeds = sami.pick_device(sami.Config()), list(range(cfg.seed, cfg.seed + cfg.seeds))
    (out := Path(cfg.out_dir)).mkdir(parents=True, exist_ok=True)
    random.Random(0).shuffle(sums)
    for seed, arm in itertools.product(seeds, ARMS):
        if arm == "base":
            base, tokenizer = load(sums[150:], cfg, seed, device)
        model = copy.deepcopy(base)
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
        for step in range(cfg.steps if arm != "base" else 0):
            asked = random.Random(f"{seed} {step}").sample(sums[150:], cfg.batch_size)
            batch, _ = collect(model, base, tokenizer, asked, arm, cfg, (seed, 1, step))
            improve(model, optimizer, batch, cfg)
        found.append(collect(model, base, tokenizer, sums[:150], arm, cfg, (seed, 2))[1])
        eta = (time.time() - started) * (cfg.seeds * len(ARMS) / len(found) - 1)
        print("%d %-8s right %.3f tokens %.1f eta %.0fs" % (seed, arm, *found[-1], eta), flush=True)
    found = dict(zip(ARMS, np.reshape(found, (len(seeds), -1, 2)).swapaxes(0, 1)))
    level = {arm: figures(of) for arm, of in found.items()}
    level |= {f"{a}_minus_{b}": figures(found[a] - found[b]) for a, b in PAIRS}
    for name, both in level.items():
        print(f"{name:19}", *("{} {mean:6.3f} [{low:.3f}, {high:.3f}] ".format(k, **f)
                              for k, f in both.items()))
    draw(found, out / "picture.png")
    results = dict(before=level.pop("base"), after=level.pop("sar"),
                   effect=level.pop("sar_minus_grpo"), controls=level, seeds=seeds,
                   minutes=(time.time() - started) / 60)
    (out / "results.json").write_text(json.dumps(results, indent=1))

if __name__ == "__main__":
    sami.run(main)
