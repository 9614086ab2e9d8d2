"""
Speed and memory as ratios against baselines that run in turn with sami.py's own functions, so that
a noisy machine touches both. Prints a table and writes bench.json.

    python tests/bench.py                every row, minutes on 2 CPU cores; on a GPU if it is there
    python tests/bench.py --only=matrix  rows whose name begins so
    python tests/bench.py --rounds=9     more rounds; a row is the median over rounds

Baselines, written here and independently of sami.py: (a) the authors' way, n x n sequences padded
on the right, all logits, log_softmax over everything; (b) n x n sequences with logits at response
positions only; (c) Hugging Face generate().
"""
import dataclasses
import gc
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
    for which in ("plain", "checkpointing") if wanted("plan") else ():
        measured = peak(f"plan:{which}")
        row(f"plan, {which}: planned against measured peak memory", planned(which) / measured,
            "0.9 to 1.1")
    figures = dict(device=DEVICE, torch=torch.__version__, rows=rows)
    Path(cfg.out).write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sami.run(main)
