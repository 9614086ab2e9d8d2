"""
Speed and memory as ratios against baselines that run in turn with sami.py's own functions, so that
a noisy machine touches both. Prints a table and writes bench.json.

    python tests/bench.py                every row, minutes on 2 CPU cores; on a GPU if it is there
    python tests/bench.py --only=matrix  rows whose name begins so
    python tests/bench.py --rounds=9     more rounds; a row is the median over rounds

Baselines, written here and independently of sami.py: (a) the authors' way, n x n sequences padded
on the right, all logits, log_softmax over everything; (b) n x n sequences with logits at response
positions only; (c) Hugging Face generate(); for a whole iteration (c) and (a) together.
"""
import contextlib
import dataclasses
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plan, sami  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Config:
    only: str = sami.flag("", "rows whose name begins with this")
    rounds: int = sami.flag(5, "interleaved rounds", low=1)
    out: str = sami.flag("bench.json", "where the figures go")
    peak: str = sami.flag("", "internal: run this once in a fresh process, print its peak memory")


def tiny_llama(vocabulary=10_000):
    """About 10M parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=256, intermediate_size=768,
                         num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
                         max_position_embeddings=2048)
    return LlamaForCausalLM(config).eval().to(DEVICE)


def random_ids(count, length, vocabulary=10_000, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count, length), generator=g).tolist()


# ---------------------------------------------------------------------------- baselines (a) and (b)


def matrix_all_logits(model, prompts, responses):
    """(a) every pair a full sequence, all logits, log_softmax over everything."""
    rows = [p + y for p in prompts for y in responses]
    ids = torch.tensor(rows, device=DEVICE)
    logp = model(ids, use_cache=False).logits.float().log_softmax(-1)
    token = logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    start, n = len(prompts[0]) - 1, len(prompts)
    return token[:, start:].mean(1).view(n, n)


def matrix_response_logits(model, prompts, responses):
    """(b) every pair a full sequence, logits where they are needed."""
    rows = [p + y for p in prompts for y in responses]
    ids = torch.tensor(rows, device=DEVICE)
    length, n = len(responses[0]), len(prompts)
    logits = model(ids, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
    token = logits.float().log_softmax(-1).gather(2, ids[:, -length:, None])[..., 0]
    return token.mean(1).view(n, n)


MATRIX = dict(ours=sami.logp_matrix, a=matrix_all_logits, b=matrix_response_logits)


def matrix_step(which, n):
    """One forward and backward pass of the loss of one query: prompt 512, response 64."""
    model, prompts, responses = tiny_llama(), random_ids(n, 512), random_ids(n, 64, seed=1)
    # the check against plain scoring comes once a run
    model.shares_prompts = sami.can_share(model, [[1, 2]], [[[3, 4], [5]]])

    def step():
        loss = sami.sami_loss(MATRIX[which](model, prompts, responses))
        loss.backward()
        model.zero_grad()
        return loss.item()
    return step


# ------------------------------------------------------------------------ output head, fused or not


def head_inputs():
    torch.manual_seed(0)
    h, w = torch.randn(4096, 512, device=DEVICE), torch.randn(32_000, 512, device=DEVICE) / 512**0.5
    return h.requires_grad_(), w.requires_grad_(), torch.randint(0, 32_000, (4096,), device=DEVICE)


HEAD = {
    "ours": lambda h, w, t: sami.head_logps(h, w, None, t),
    "reference": lambda h, w, t: (h @ w.T).log_softmax(-1).gather(1, t[:, None])[:, 0],
    "torch": lambda h, w, t: -torch.nn.functional.linear_cross_entropy(h, w, t, reduction="none"),
}


def head_step(which):
    h, w, t = head_inputs()

    def step():
        logp = HEAD[which](h, w, t)
        logp.backward(torch.linspace(-1, 1, len(logp), device=DEVICE))
        out = logp.detach(), h.grad, w.grad
        h.grad = w.grad = None
        return out
    return step


# ------------------------------------------------------------------------------------- (c) sampling


def sampling(which, prompts, new, eos=(), samples=1):
    """Tokens a second of a batch, useful tokens only: those up to the end of each response."""
    model = tiny_llama()
    eos = list(eos)

    def ours():
        rows = [p for p in prompts for _ in range(samples)]
        out = sami.sample(model, rows, max_new_tokens=new, temperature=1.0, eos_ids=eos, seed=1)
        return sum(map(len, out))

    @torch.no_grad()
    def generate():
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=DEVICE)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, num_return_sequences=samples, pad_token_id=0,
            eos_token_id=eos or None)
        return int((out[:, width:] != 0).sum())
    return dict(ours=ours, generate=generate)[which]


def ragged_prompts():
    constitution, queries = random_ids(1, 256)[0], random_ids(64, 24, seed=2)
    return [constitution + q[:16 + i % 9] for i, q in enumerate(queries)]


SAMPLERS = {
    "equal lengths": dict(prompts=random_ids(64, 128), new=64),
    "8 samples a prompt": dict(prompts=random_ids(8, 128), new=64, samples=8),
    # an untrained model is close to uniform over its 10,000 tokens: 417 end ids end a response
    # after 24 on average
    "ragged finish": dict(prompts=random_ids(64, 128), new=64, eos=range(3, 420)),
    "one constitution": dict(prompts=ragged_prompts(), new=32),
}


# ------------------------------------------------------------------------------- a whole iteration

# name: queries, n, tokens of a prompt, tokens of a response
ITERATIONS = {"45 + 48 tokens, n=2": (8, 2, 45, 48), "45 + 48 tokens, n=4": (4, 4, 45, 48),
              "400 + 80 tokens, n=2": (4, 2, 400, 80)}
ONE = dict(lr=1e-4, beta=0.1, temperature=0.0, dtype="float32", tokens_per_pass=4096)


def chat_model():
    """A random Llama of the shape of SmolLM2-135M."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49_152, hidden_size=576, intermediate_size=1536,
                         num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                         max_position_embeddings=8192, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval().to(DEVICE)


class Plain:
    """An iteration as most would write it: generate() in batches, then n x n full sequences."""

    def sample(model, prompts, n, new):
        flat = torch.tensor([p for ps in prompts for p in ps], device=DEVICE)
        with torch.no_grad():
            out = torch.cat([model.generate(
                part, attention_mask=torch.ones_like(part), max_new_tokens=new, do_sample=False,
                pad_token_id=0, eos_token_id=None) for part in flat.split(64)])
        ids = out[:, flat.shape[1]:].tolist()
        return [ids[k:k + n] for k in range(0, len(ids), n)]

    def score(model, prompts, responses):
        """(n * n, length) log-probs of one query's responses under each of its prompts."""
        rows = torch.tensor([p + y for p in prompts for y in responses], device=DEVICE)
        logp = model(rows, use_cache=False).logits.float().log_softmax(-1)
        token = logp[:, :-1].gather(2, rows[:, 1:, None])[..., 0]
        return token[:, len(prompts[0]) - 1:]

    def base(model, prompts, responses, cfg):
        with torch.no_grad():
            return [Plain.score(model, p, y) for p, y in zip(prompts, responses)]

    def update(model, prompts, responses, base, cfg):
        optimizer, total = torch.optim.AdamW(model.parameters(), lr=cfg.lr, foreach=False), 0
        target = torch.arange(cfg.n, device=DEVICE)
        for p, y, old in zip(prompts, responses, base):
            logp = Plain.score(model, p, y)
            m, r = logp.mean(1).view(cfg.n, cfg.n), old - logp
            ce = torch.nn.functional.cross_entropy
            loss = (ce(m, target) + ce(m.T, target)) / 2 + cfg.beta * (r.exp() - 1 - r).mean()
            (loss / len(prompts)).backward()
            total += loss.item() / len(prompts)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip, foreach=False)
        optimizer.step()
        return total


class Ours:
    def sample(model, prompts, n, new):
        ids = sami.sample(model, [p for ps in prompts for p in ps], max_new_tokens=new,
                          temperature=0, eos_ids=[], seed=1)
        return [ids[k:k + n] for k in range(0, len(ids), n)]

    def base(model, prompts, responses, cfg):
        examples = [sami.Example(i, "", [], [], prompts=p, ids=y)
                    for i, (p, y) in enumerate(zip(prompts, responses))]
        sami.add_base_logps(model, examples, cfg)
        return examples

    def update(model, prompts, responses, examples, cfg):
        with tempfile.TemporaryDirectory() as out_dir:
            sami.train(model, examples, 1, 1, dataclasses.replace(cfg, out_dir=out_dir))
            return json.loads((Path(out_dir) / "log.jsonl").read_text())["loss"]


def iteration(way, model, prompts, new, cfg):
    """-> seconds of sampling, the base's pass, the update; the loss. The model is as it was."""
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    started = time.perf_counter()
    responses = way.sample(model, prompts, cfg.n, new)
    sampled = time.perf_counter()
    base = way.base(model, prompts, responses, cfg)
    scored = time.perf_counter()
    loss = way.update(model, prompts, responses, base, cfg)
    done = time.perf_counter()
    model.load_state_dict(weights), model.zero_grad()
    return [sampled - started, scored - sampled, done - scored, done - started], loss


def iteration_limit(model, n, prompt, response):
    """Of scoring and update by counting weights times tokens: what of the body's and of the head's
    work sharing a prompt leaves over."""
    head = model.lm_head.weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head
    plain = (body + head) * n**2 * (prompt + response)
    return plain / (body * n * (prompt + n * response) + head * n**2 * response)


# --------------------------------------------------------------------------------- plan.py, held to

PLAN = dict(batch_size=8, n=2, tokens_per_pass=4096, beta=0.0, lr=1e-4, dtype="float32")


def plan_model():
    """About 38M parameters."""
    return LlamaConfig(vocab_size=10_000, hidden_size=512, intermediate_size=1792,
                       num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
                       max_position_embeddings=2048)


def plan_step(which):
    """Load a model and train it two steps, as sami.py does; which: plain or checkpointing."""
    cfg = sami.Config(**PLAN, checkpointing=which == "checkpointing")
    examples = [sami.Example(i, "", [], [], prompts=random_ids(2, 382, seed=i),
                             ids=random_ids(2, 65, seed=i)) for i in range(16)]

    def step():
        model = LlamaForCausalLM(plan_model()).to(DEVICE).eval()
        model.shares_prompts = sami.can_share(model, [[1, 2]], [[[3, 4], [5]]])
        with tempfile.TemporaryDirectory() as out_dir:  # for log.jsonl
            sami.train(model, examples, 2, 1, dataclasses.replace(cfg, out_dir=out_dir))
    return step


def planned(which):
    """Bytes that plan.py foretells of it."""
    cfg = sami.Config(**PLAN, checkpointing=which == "checkpointing")
    return sum(plan.memory(cfg, plan.empty_model(plan_model()), torch.float32, 1).values())


# ------------------------------------------------------------------------------------------ measure


def in_turn(steps, rounds):
    """Median seconds of each function, run one after the other in every round, after a first."""
    seconds = {name: [] for name in steps}
    for round in range(rounds + 1):
        for name, step in steps.items():
            gc.collect()
            torch.cuda.synchronize() if DEVICE == "cuda" else None
            start = time.perf_counter()
            step()
            torch.cuda.synchronize() if DEVICE == "cuda" else None
            if round:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def build(name):
    kind, which, n = (name.split(":") + ["0"])[:3]
    matrix = lambda which: matrix_step(which, int(n))
    return dict(head=head_step, plan=plan_step).get(kind, matrix)(which)


def peak(name):
    """Peak extra memory of one step, in bytes, measured in a fresh process."""
    # what is freed goes back at once and is not counted
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536")
    command = [sys.executable, __file__, f"--peak={name}"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return int(out.stdout.split()[-1])


def print_peak(name):
    step = build(name)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        print(torch.cuda.max_memory_allocated() - before)
        return

    def kib(field):  # not getrusage, whose peak has that of the parent process in it
        status = open("/proc/self/status")
        return int(next(line for line in status if line.startswith(field)).split()[1])

    before = kib("VmRSS")
    step()
    print((kib("VmHWM") - before) * 1024)


def main(argv):
    cfg = sami.parse(Config, argv)
    if cfg.peak:
        return print_peak(cfg.peak)
    rows = []

    def row(name, value, goal, unit="x"):
        rows.append(dict(name=name, value=value, goal=goal, unit=unit))
        print(f"{name:<58} {value:10.3g} {unit:<3} goal {goal}", flush=True)

    wanted = lambda name: name.startswith(cfg.only)
    print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"medians of {cfg.rounds} rounds")
    for n, goal_a, goal_b in ((2, 2.5, 1.5), (4, 5, 2.6), (8, 7, 4.5)):
        if wanted("matrix"):
            rounds = cfg.rounds if n < 8 else max(1, cfg.rounds // 2)
            s = in_turn({k: matrix_step(k, n) for k in MATRIX}, rounds)
            row(f"matrix n={n}: speed against (a) all logits", s["a"] / s["ours"], f">= {goal_a}")
            row(f"matrix n={n}: speed against (b) response logits", s["b"] / s["ours"],
                f">= {goal_b}")
    if wanted("matrix"):
        p = {k: peak(f"matrix:{k}:8") for k in MATRIX}
        row("matrix n=8: peak extra memory against (a)", p["ours"] / p["a"], "<= 0.25")
        row("matrix n=8: peak extra memory against (b)", p["ours"] / p["b"], "<= 0.5")
    if wanted("head"):
        known = hasattr(torch.nn.functional, "linear_cross_entropy")
        kinds = [k for k in HEAD if k != "torch" or known]
        s = in_turn({k: head_step(k) for k in kinds}, cfg.rounds)
        p = {k: peak(f"head:{k}") for k in kinds}
        ours, reference = head_step("ours")(), head_step("reference")()
        row("head: time against log_softmax + gather", s["ours"] / s["reference"], "<= 1")
        row("head: peak extra memory against it", p["ours"] / p["reference"], "<= 0.125")
        worst = float((ours[0] - reference[0]).abs().max())
        row("head: largest difference of a log-prob", worst, "<= 3e-6", "nat")
        if "torch" in kinds:
            row("head: time against torch linear_cross_entropy", s["ours"] / s["torch"], "none")
            row("head: peak extra memory against it", p["ours"] / p["torch"], "none")
    for (name, setting), goal in zip(SAMPLERS.items(), (1.0, 1.25, 1.7, 1.25)):
        if wanted("sampler"):
            tokens = {k: sampling(k, **setting)() for k in ("ours", "generate")}
            s = in_turn({k: sampling(k, **setting) for k in tokens}, cfg.rounds)
            speed = {k: tokens[k] / s[k] for k in s}
            row(f"sampler, {name}: tokens/s against generate()",
                speed["ours"] / speed["generate"], f">= {goal}")
            row(f"sampler, {name}: tokens/s", speed["ours"], "none", "/s")
    for name, (queries, n, prompt, new) in ITERATIONS.items() if wanted("iteration") else ():
        model, how = chat_model(), sami.Config(**ONE, n=n, batch_size=queries)
        model.shares_prompts = sami.can_share(model, [[1, 2]], [[[3, 4], [5]]])
        ids = iter(random_ids(queries * n, prompt, 49_152))
        prompts = [[next(ids) for _ in range(n)] for _ in range(queries)]
        with contextlib.redirect_stdout(io.StringIO()):
            ran = [[iteration(way, model, prompts, new, how) for way in (Ours, Plain)]
                   for _ in range(min(3, cfg.rounds) + 1)][1:]  # the first is slower
        losses = [loss for both in ran for _, loss in both]
        row(f"iteration, {name}: largest difference of a loss", max(losses) - min(losses),
            "<= 1e-4", "nat")
        limits = 1.0, *[iteration_limit(model, n, prompt, new)] * 2
        for k, part in enumerate(("sampling", "base's pass", "update", "all")):
            ours, plain = (statistics.median(both[way][0][k] for both in ran) for way in (0, 1))
            goal = f">= {0.9 * limits[k]:.2f}" if k < 3 else "none"
            row(f"iteration, {name}: {part}, plain way", plain, "none", "s")
            row(f"iteration, {name}: {part}, speed against it", plain / ours, goal)
    for which in ("plain", "checkpointing") if wanted("plan") else ():
        measured = peak(f"plan:{which}")
        row(f"plan, {which}: planned against measured peak memory", planned(which) / measured,
            "0.9 to 1.1")
    figures = dict(device=DEVICE, torch=torch.__version__, rows=rows)
    Path(cfg.out).write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sami.run(main)
