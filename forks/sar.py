"""
SAR: Self-Aligned Reward (Han et al. 2025, arXiv 2509.05489). Five minutes of one core.

A policy learns to be right *and* brief, with no target for length. With a question q, an answer a,
v_j = log pi(a_j | q, a_<j) - log pi(a_j | a_<j) is what q tells of token j. At each step:

    sample n answers to each of a batch of questions, with the current policy at temperature 1
    score each answer twice: behind its question, and behind the empty question
    R_SA = (ppl(a) - ppl(a | q)) / ppl(a) = 1 - exp(-mean_j v_j), at least -1
    R = R_VR + alpha * R_SA             R_VR: is the last number in the text the right one?
    A = R - mean of the n R             GRPO; not divided by their spread
    descend, in `updates` parts: clipped policy gradient + kl * KL to the base, summed over tokens

k telling tokens of c nats among L - k of filler (v = 0) give 1 - exp(-k c / L). An echo of q gives
more than a brief right answer: R_SA knows no truth. Unlike SAMI there is a verifier, and the
contrast is of one answer with and without its context.

Departures from the paper (P) and from the authors' code (A):
 1. R_SA in log space: no exp of a large number, no inf / inf = nan (A: two perplexities, + 1e-9)
 2. a question runs once for its n answers, nothing is padded to 1024 (A: a row each, both times)
 3. sums over tokens are divided by the longest length and by answers (A: by the former)
 4. the empty question keeps its frame, as in A (a chat template with an empty user turn); the toy's
    pretraining shows "Question: Answer:" in a fifth of its rows, so that it means something
 5. choices of ours: the toy; 48k weights, 48 tokens (P: 1B to 4B, 4096); learning rate 1e-3, 60
    batches of 16 (A: 1e-6, 500 of 128); R_SA alone with weight alpha

Controls: `grpo` is R_VR alone, `alone` R_SA alone; `shuffled` takes R_SA behind another question of
the batch. All start from one base and see the same questions. It runs on one process.
"""
import copy, dataclasses, itertools, json, random, re, sys, time
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np, tokenizers, torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sami
from sami import flag

# the weights of R_VR and of alpha * R_SA, and how many places on the question that R_SA reads lies
ARMS = dict(base=(0, 0, 0), grpo=(1, 0, 0), sar=(1, 1, 0), alone=(0, 1, 0), shuffled=(1, 1, 1))
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 2 to 10 seeds
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
FILLER = "let me think .", "well now .", "step by step .", "here we go .", "good question ."


@dataclasses.dataclass
class Config:
    model: str = flag("", "Hugging Face folder or hub name; else a tiny one, trained at once")
    out_dir: str = flag("out-sar", "results.json, picture.png")
    seed: int = flag(1, "the first seed: weights, data and noise are functions of it", low=0)
    seeds: int = flag(5, "how many", low=2, high=10)
    pretrain: int = flag(600, "steps on worked sums, brief and verbose", low=1)
    steps: int = flag(60, "batches of questions", low=1)
    batch_size: int = flag(16, "questions a batch", low=2, high=300)
    n: int = flag(6, "answers to a question", low=2)
    updates: int = flag(2, "optimizer steps on a batch", low=1, high=2)
    alpha: float = flag(0.2, "weight of R_SA", low=0)
    clip: float = flag(0.2, "how far a token's probability moves on a batch", low=0)
    kl: float = flag(0.001, "weight of the KL to the base", low=0)
    lr: float = flag(1e-3, "learning rate, constant", low=0)
    max_new_tokens: int = flag(48, "longest answer", low=1)
    device: str = flag("auto", "where it runs", "auto", "cpu", "cuda", "mps")


def self_aligned(asked, alone):
    """One answer's token log-probs behind its question and without it, (L,) nats each -> R_SA."""
    return (-torch.expm1(-(asked - alone).double().mean())).clamp(min=-1)


def advantages(correct, gain, verifier, alpha):
    """R_VR and R_SA of n answers a row, (Q, n) each, and their weights -> (Q, n), rows of mean 0."""
    rewards = verifier * correct + alpha * gain
    return rewards - rewards.mean(1, keepdim=True)  # a spread would make R_SA as heavy as R_VR


def token_loss(new, old, base, advantage, cfg):
    """Log-probs under policy, sampler and base, and advantages, of K tokens: (K,) -> (K,)."""
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * advantage)
    return cfg.kl * sami.kl_to_base(new, base) - gain


def right(text, result):
    """R_VR: is the last number anywhere in the text, a word or digits, the result?"""
    found = [w for w in re.findall(r"\d+|[a-z]+", text.lower()) if w in NUMBERS or w.isdigit()]
    return bool(found) and found[-1] in (NUMBERS[result], str(result))


def ask(tokenizer, x):
    """A question, or "" -> prompt ids."""
    chat = [dict(role="system", content="Reason, then answer."), dict(role="user", content=x)]
    text = " ".join(["Question:", *x.split(), "Answer:"])
    return sami.encode(tokenizer, chat if tokenizer.chat_template else text)[0]


@torch.no_grad()
def collect(model, base, tokenizer, sums, arm, cfg, key):
    """-> of each question: prompt, n answers, their K tokens' log-probs under sampler and base and
    advantages, (K,) each; and the answers' mean accuracy and length."""
    (verifier, aligned, shift), n, ends = ARMS[arm], cfg.n, sami.end_ids(model, tokenizer)
    prompts = [ask(tokenizer, x) for x, *_ in sums]
    flat = sami.sample(model, [p for p in prompts for _ in range(n)], temperature=1.0, batch=512,
                       max_new_tokens=cfg.max_new_tokens, eos_ids=ends, seed=[
                           (*key, i) for i in range(n * len(sums))])
    ids = [flat[k:k + n] for k in range(0, len(flat), n)]  # with their end ids
    texts = tokenizer.batch_decode(flat, skip_special_tokens=True)
    correct = torch.tensor([float(right(t, sums[i // n][-1])) for i, t in enumerate(texts)])
    old, before = sami.score(model, prompts, ids), sami.score(base, prompts, ids)
    asked = sami.score(model, prompts[shift:] + prompts[:shift], ids) if shift else old
    alone = sami.score(model, [ask(tokenizer, "")] * len(ids), ids)
    gain = torch.tensor([list(map(self_aligned, *rows)) for rows in zip(asked, alone)])
    each = advantages(correct.view(-1, n), gain, verifier, cfg.alpha * aligned)
    each = [[a.to(t).expand(len(t)) for a, t in zip(*rows)] for rows in zip(each, old)]
    known = [[torch.cat(row) for row in rows] for rows in (old, before, each)]
    return list(zip(prompts, ids, *known)), (float(correct.mean()), sum(map(len, flat)) / len(flat))


def descend(model, optimizer, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def improve(model, optimizer, batch, cfg):
    """`updates` optimizer steps, each on its part of a batch's questions."""
    for k in range(cfg.updates):
        prompts, ids, *known = zip(*batch[k::cfg.updates])
        new = torch.cat(sum(sami.score(model, prompts, ids), []))  # (K,)
        loss = token_loss(new, *map(torch.cat, known), cfg).sum()
        descend(model, optimizer, loss / cfg.max_new_tokens / sum(map(len, ids)))


def all_sums():
    """-> [(question, steps, result)], such as "one plus four minus two", "... is three .", 3."""
    signed, most = [*range(-6, 0), *range(1, 7)], len(NUMBERS)
    then = lambda b: f"{'plus' if b > 0 else 'minus'} {NUMBERS[abs(b)]}"
    step = lambda a, b: f"{NUMBERS[a]} {then(b)} is {NUMBERS[a + b]} ."
    return [(f"{NUMBERS[a]} {then(b)} {then(c)}", f"{step(a, b)} {step(a + b, c)}", a + b + c)
            for a, b, c in itertools.product(range(1, 7), signed, signed)
            if a + b in range(most) and a + b + c in range(most)]


def worked(x, steps, result, rng):
    """A right answer, verbose by chance: filler, the question again, steps, a closing phrase."""
    filler = [(0.5, text) for text in rng.choices(FILLER, k=4)]
    parts = [*filler[1:], (0.5, f"we want {x} ."), (0.7, steps), filler[0],
             (0.5, "so the answer is"), (1, NUMBERS[result])]
    return " ".join(text for share, text in parts if rng.random() < share)


def load(sums, cfg, seed, device):
    """-> --model, or a small Llama that works out sums, right in about half of them; tokenizer."""
    if cfg.model:
        return sami.load_model(cfg.model, device, cfg), sami.load_tokenizer(cfg.model)[1]
    text = " ".join([*FILLER, *NUMBERS, "plus minus is so the answer we want Question: Answer:"])
    words = {w: i for i, w in enumerate(["<eos>", *sorted(set(text.split()))])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.1, bos_token_id=0, eos_token_id=0)).eval().to(device)
    optimizer, rng = torch.optim.AdamW(model.parameters()), random.Random(seed)
    for step in range(cfg.pretrain):
        rows = rng.choices(sums, k=24)
        prompts = [ask(tokenizer, "" if rng.random() < 0.2 else x) for x, *_ in rows]
        ids = [[tokenizer(worked(*row, rng)).input_ids + [0]] for row in rows]
        optimizer.param_groups[0]["lr"] = 8e-3 * min(1, step / 30) * (1 - step / cfg.pretrain)
        descend(model, optimizer, -sami.plain_logps(model, prompts, ids).mean())
    return model, tokenizer


def figures(found):
    """(seeds, 2) -> for accuracy and tokens the mean, its 95 % interval, each seed's value."""
    error = T95[len(found) - 2] * found.std(0, ddof=1) / len(found) ** 0.5
    return {name: dict(mean=m, low=m - e, high=m + e, seeds=list(v)) for name, m, e, v in zip(
        ("accuracy", "tokens"), found.mean(0), error, found.T)}


def main(argv):
    cfg, started, found, sums = sami.parse(Config, argv), time.time(), [], all_sums()
    sami.need(sami.WORLD == 1, "it runs on one process: start it without torchrun")
    device, seeds = sami.pick_device(cfg), list(range(cfg.seed, cfg.seed + cfg.seeds))
    random.Random(0).shuffle(sums)
    test, train = sums[:150], sums[150:]
    for seed, arm in itertools.product(seeds, ARMS):
        if arm == "base":
            base, tokenizer = load(train, cfg, seed, device)
        model = copy.deepcopy(base)
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
        for step in range(cfg.steps if arm != "base" else 0):
            asked = random.Random(f"{seed} {step}").sample(train, cfg.batch_size)
            batch, _ = collect(model, base, tokenizer, asked, arm, cfg, (seed, 1, step))
            improve(model, optimizer, batch, cfg)
        found.append(collect(model, base, tokenizer, test, arm, cfg, (seed, 2))[1])
        eta = (time.time() - started) * (cfg.seeds * len(ARMS) / len(found) - 1)
        print("seed %d  %-8s  accuracy %.3f  tokens %4.1f  eta %.0f s" % (seed, arm, *found[-1], eta),
              flush=True)
    found = dict(zip(ARMS, np.reshape(found, (len(seeds), -1, 2)).swapaxes(0, 1)))  # arm: (seeds, 2)
    against = lambda arm, other: figures((found[arm] - found[other]) * (1, -1))  # gained, saved
    level = {arm: figures(values) for arm, values in found.items()}
    controls = {arm: dict(level[arm], effect=against(arm, "grpo")) for arm in ("alone", "shuffled")}
    results = dict(
        before=level["base"], after=level["sar"], effect=against("sar", "grpo"), seeds=seeds,
        effect_on_base=against("sar", "base"), minutes=(time.time() - started) / 60,
        controls=dict(controls, grpo=dict(level["grpo"], effect=against("grpo", "base"))))
    folder = Path(cfg.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    plt.figure(figsize=(7, 4.5))
    for arm, f in level.items():
        plt.plot(*found[arm].T[::-1], "o", label=arm)
        print(f"{arm:8}", *("  %s %.3f [%.3f, %.3f]" % (k, v["mean"], v["low"], v["high"]) for k,v in f.items()))
    plt.xlabel("tokens an answer"), plt.ylabel("accuracy on held-out sums"), plt.legend()
    plt.title("")
    plt.savefig(folder / "picture.png", dpi=150)


if __name__ == "__main__":
    sami.run(main)
