"""
SAMI: Self-Supervised Alignment with Mutual Information (Fraenken et al. 2024, arXiv 2404.14313).

A pretrained language model learns to follow written principles from its own responses: no
preference labels, no demonstrations, no reward model. With x a query, c_1 ... c_n constitutions
(lists of principles) and y_j the response sampled under c_j, for a few iterations (Algorithm 1):

    for each query x: draw n constitutions, sample y_j given (x, c_j), with the last model
    start again from the base model, and for a few steps of `batch_size` queries:
        logp[i, j] = mean over tokens of log pi(y_j | x, c_i)     (n, n): rows i, columns j
        row = cross entropy of each row with its diagonal       which response to this constitution?
        col = cross entropy of each column with its diagonal    which constitution of this response?
        minimise (row + col) / 2 + beta * KL to the base        chance is log n nats

What is known about this objective (tests/test_information.py shows it by enumeration):
 1. With *summed* log-probs of samples at temperature 1, log n - E[col] is I(Y; C | x), C uniform
    among the n constitutions. `row` is no bound; with means over tokens, neither is.
 2. In that case E[gradient of col] is zero: the samples already carry the model's own posterior.
    The signal comes from sampling colder than the model, means, filters, another sampling prompt.
 3. Only differences of log-probs count. Pushed far, a model falls into gibberish while its loss
    still falls; few steps, a small learning rate, a restart from the base or beta > 0 prevent it.

Departures from the paper (P) and from the authors' code (A):
 1. any n >= 2 (A: two)
 2. the sampled ids are scored, behind those of the prompt (A: the joined text, tokenised anew)
 3. a step is the mean over all its queries (A, as run: the last 8 of 128; the first step at lr 0)
 4. fp32 weights (A: bf16, in which most of a step of 5e-7 rounds to nothing)
 5. held-out queries report InfoNCE, at most log n (P: a mean of logs, which is no bound)
 6. beta weighs a KL on response tokens, 0 in the paper's presets (A: prompt and padding counted)
 7. data order, draws and noise are functions of (seed, iteration, query)
"""
import argparse, contextlib, dataclasses, gc, hashlib, itertools, json, math, os, re, shutil
import subprocess, sys, time, types
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads: idle threads free the CPU

import filelock, jinja2, torch, transformers
import numpy as np
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# ------------------------------------------------------------------------------------------- config


def flag(default, text, *choices, low=-math.inf, high=math.inf):
    """A field of a Config: its default, what --help says of it, what it may be."""
    return dataclasses.field(default=default, metadata=dict(
        help=text, choices=choices or None, low=low, high=high))


@dataclass
class Config:
    preset: str = flag("", "JSON file of flags, such as data/tldr/mistral-7b.json; yours win")
    task: str = flag("data/toy", "folder with prompts, principles and queries")
    model: str = flag("data/toy/base", "base model: Hugging Face folder or hub name")
    out_dir: str = flag("out", "checkpoints, samples, log; an earlier run there is moved aside")
    iterations: int = flag(3, "rounds of sampling and training", low=1)
    steps: str = flag("4,8,12", "gradient steps: one number, or one for each iteration")
    batch_size: int = flag(16, "queries a step, over all processes", low=1)
    n: int = flag(4, "constitutions per query, one response each", low=2)
    lr: float = flag(1e-4, "learning rate", low=0)
    warmup: int = flag(0, "steps of an iteration before the learning rate is that", low=0)
    optimizer: str = flag("adamw", "rmsprop takes half the memory", "adamw", "rmsprop")
    grad_clip: float = flag(1.0, "largest gradient norm; 0 = no clipping", low=0)
    beta: float = flag(0.1, "weight of the KL to the base; 0 = none, as in the paper", low=0)
    contrast: str = flag("two-sided", "terms", "two-sided", "constitutions", "responses")
    reduce: str = flag("mean", "a response's log-prob, over its tokens", "mean", "sum")
    temperature: float = flag(0.8, "of sampling for training; 0 = greedy", low=0)
    top_p: float = flag(1.0, "sample from the fewest tokens with this share", low=1e-6, high=1)
    max_new_tokens: int = flag(32, "longest response", low=1)
    restart: bool = flag(True, "every iteration trains the base anew; False: the last model")
    eval_queries: int = flag(64, "test queries measured after each iteration; 0 = none", low=0)
    sample_batch: int = flag(64, "responses sampled side by side; less takes less memory", low=1)
    tokens_per_pass: int = flag(8192, "tokens scored at once; less takes less memory", low=1)
    checkpointing: bool = flag(False, "activations twice: less memory, a third more time")
    parallel: str = flag("auto", "the model on each GPU (ddp), cut over all (fsdp), or over those "
                         "of a node (hybrid)", "auto", "ddp", "fsdp", "hybrid")
    resume: bool = flag(False, "go on with the run in out_dir, as if it had never stopped")
    seed: int = flag(1, "data order, draws and sampling noise are functions of it", low=0)
    device: str = flag("auto", "where it runs", "auto", "cpu", "cuda", "mps")
    dtype: str = flag("auto", "of computation: bfloat16 on GPUs", "auto", "float32", "bfloat16")


class BadInput(Exception):
    """Wrong flags, files or data: exit code 2."""


class RunFailed(Exception):
    """What went wrong while running: exit code 1."""


def need(ok, sentence, error=BadInput):
    if not ok:
        raise error(sentence)


@contextlib.contextmanager
def telling(what, error=BadInput):
    """Tells whatever goes wrong inside in one sentence: what, and the reason."""
    try:
        yield
    except (BadInput, RunFailed):
        raise
    except Exception as e:
        reason = " ".join(str(e).split())[:300]
        raise error(f"{what}: {reason}" if reason else what)


def parse(Config, argv):
    """`--name=value` flags -> Config; a preset is flags before yours. Raises BadInput."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=formatter)
    parser.error = lambda message: need(False, f"{message}; --help lists the flags")
    for f in dataclasses.fields(Config):
        kind = dict(type=type(f.default), choices=f.metadata["choices"])
        if type(f.default) is bool:  # --resume alone is True
            truth = lambda text: dict(true=True, false=False).get(text.lower(), text)
            kind = dict(type=truth, choices=(True, False), nargs="?", const=True)
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"], **kind)
    given = parser.parse_args(argv)
    if getattr(given, "preset", ""):
        with telling(f"{given.preset} must be a JSON object of flags"):
            preset = json.loads(Path(given.preset).read_text("utf-8")).items()
        given = parser.parse_args([*(f"--{k}={v}" for k, v in preset), *argv])
    for f in dataclasses.fields(Config):
        value, low, high = getattr(given, f.name), f.metadata["low"], f.metadata["high"]
        need(isinstance(value, str) or low <= value <= high,
             f"--{f.name}={value} must lie between {low} and {high}")
    return Config(**vars(given))


# ------------------------------------------------------------------------------------ the objective


def sami_loss(logp, contrast="two-sided"):
    """(n, n) log-probs -> scalar, nats: log n at chance, 0 at best. log n - loss is paper Eq. 2."""
    target = torch.arange(len(logp), device=logp.device)  # (n,) the diagonal
    row = F.cross_entropy(logp, target)  # contrast over responses: each row sums to 1
    col = F.cross_entropy(logp.T, target)  # contrast over constitutions: each column sums to 1
    return {"two-sided": (row + col) / 2, "constitutions": col, "responses": row}[contrast]


def infonce(logp_sum):
    """(n, n) *summed* log-probs -> lower bound on I(Y; C | x), nats, at most log n. Paper Eq. 1."""
    target = torch.arange(len(logp_sum), device=logp_sum.device)
    return math.log(len(logp_sum)) - F.cross_entropy(logp_sum.T, target)


def kl_to_base(logp, base_logp):
    """Token log-probs under policy and base -> KL estimate of each token, nats (Schulman's k3).

    r - 1 - log r with r = base / policy: 0 where they agree, never negative, right on average; it
    needs the base's log-prob of the sampled token only."""
    log_r = base_logp - logp
    return log_r.exp() - 1 - log_r


def as_matrix(cells, reduce):
    """n lists of n tensors of token log-probs -> (n, n) nats."""
    # the mean keeps a long response from outweighing a short one; only sums are true log-probs
    return torch.stack([torch.stack([getattr(t, reduce)() for t in row]) for row in cells])


# ------------------------------------------------------------------------------------------ scoring
# siblings[b]: the responses behind prompts[b], all of them lists of token ids. Both ways to score
# return the log-probs of all K response tokens, in that order: (K,) nats.


def plain_logps(model, prompts, siblings):
    """The obvious way, right for every causal LM: a row a pair, all logits, log-softmax."""
    rows = [(p, y) for p, ys in zip(prompts, siblings) for y in ys]
    width = max(len(p + y) for p, y in rows)
    ids = torch.tensor([p + y + [0] * (width - len(p + y)) for p, y in rows], device=model.device)
    logits = model(ids, use_cache=False).logits[:, :-1]  # (B, T-1, V): each predicts the next token
    logp = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]  # (B, T-1)
    return torch.cat([logp[b, len(p) - 1:len(p + y) - 1] for b, (p, y) in enumerate(rows)])


def head_logps(h, w, b, target, scale=1, cap=None):
    """log softmax(cap * tanh(scale * (h W' + b) / cap)) at given tokens, without (K, V) logits.

    h (K, D), w (V, D), b (V,) or None, target (K,) -> (K,) fp32, nats. Logits exist for a few rows
    at a time; backward computes them again, since a token's weight in the loss is not known before
    the whole matrix is."""
    def part_logps(h, target):
        z = (h @ w.T).float()  # (rows, V)
        z = (z if b is None else z + b) * scale
        z = cap * torch.tanh(z / cap) if cap else z
        return -F.cross_entropy(z, target, reduction="none")

    rows = max(1, 2**23 // len(w))  # 32 MB of logits
    return torch.cat([checkpoint(part_logps, *part, use_reentrant=False, preserve_rng_state=False)
                      for part in zip(h.split(rows), target.split(rows))])


def sibling_mask(segment):
    """Additive attention mask (B, 1, S, S): a token sees its prompt and its response up to itself.

    segment (B, S): 0 = prompt, j = j-th response, -1 = padding."""
    same = (segment[:, :, None] == segment[:, None, :]) | (segment == 0)[:, None, :]  # (B, S, S)
    hidden = ~(same & torch.ones_like(same).tril())[:, None]  # (B, 1, S, S)
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, torch.finfo().min)


def shared_logps(model, prompts, siblings):
    """The fast way: a prompt runs once, its responses side by side behind it, blind to each other.

    Prompt "p q" with responses "a b c" and "d e" is one row. A response's last token predicts
    nothing and is left out; the prompt's last predicts the first of every response:

        ids        p  q    a  b  d
        segment    0  0    1  1  2
        position   0  1    2  3  2
        predicts      a,d  b  c  e
    """
    width = max(len(p) + sum(len(y) - 1 for y in ys) for p, ys in zip(prompts, siblings))
    several = max(map(len, siblings)) > 1
    if several:
        width += -width % 8  # attention with a mask likes multiples of 8
    ids, segment, position, source, target = [], [], [], [], []
    for b, (p, ys) in enumerate(zip(prompts, siblings)):
        row, seg, pos = list(p), [0] * len(p), list(range(len(p)))
        for j, y in enumerate(ys, 1):
            start = b * width + len(row)
            source += [b * width + len(p) - 1, *range(start, start + len(y) - 1)]
            target += y
            row += y[:-1]
            seg += [j] * (len(y) - 1)
            pos += range(len(p), len(p) + len(y) - 1)
        pad = width - len(row)
        ids.append(row + [0] * pad)
        segment.append(seg + [-1] * pad)
        position.append(pos + [0] * pad)
    ids, segment, position, source, target = (
        torch.tensor(x, device=model.device) for x in (ids, segment, position, source, target))
    layout = {}
    if several:  # with one response a row, causal attention and padding on the right need no mask
        layout = dict(attention_mask=sibling_mask(segment), position_ids=position)
    hidden = model.base_model(ids, use_cache=False, **layout).last_hidden_state  # (B, S, D)
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if type(head).forward is not torch.nn.Linear.forward:  # an adapter's share would be lost
        raise NotImplementedError("its output head is no plain linear layer")
    scale = 1 / (getattr(config, "logits_scaling", None) or 1)
    scale = getattr(config, "logit_scale", None) or scale
    cap = getattr(config, "final_logit_softcapping", None)
    # only the predicting positions reach the vocabulary
    hidden = hidden.flatten(0, 1)[source]  # (K, D)
    return head_logps(hidden, head.weight, head.bias, target, scale, cap)


def can_share(model, prompts, siblings):
    """Installs model.shared_logps. Does it give what the obvious way gives? Not where a layer does
    not heed the mask (ALiBi, convolution, linear attention) or the output head has an adapter."""
    model.shared_logps = types.MethodType(shared_logps, model)
    register_fsdp_forward_method(model, "shared_logps")  # brings weights together, as forward does
    kind = model.device.type
    # sharded weights compute in bfloat16 in any case, which puts single tokens far off
    coarse = isinstance(model, FSDPModule) and torch.is_autocast_enabled(kind)
    with torch.no_grad(), torch.autocast(kind, enabled=coarse):
        plain = plain_logps(model, prompts, siblings)
        try:
            off = (model.shared_logps(prompts, siblings) - plain).abs()
            worst, why = (off.mean() if coarse else off.max()).item(), "log-probs differ"
        except Exception as e:  # architectures refuse a mask in many ways
            worst, why = math.inf, str(e).split("\n")[0] or type(e).__name__
    bad = worst >= (5e-3 if coarse else 1e-4) * (1 + plain.abs().max().item())
    works = sum_processes([bad]) == [0]  # all get the same answer
    if not works:
        print(f"scoring every pair apart: responses cannot share a prompt in this model ({why})")
    return works


def score(model, prompts, siblings):
    """log pi of every response token: prompts[b] with each of siblings[b] -> [b][j] (len(y),) nats.

    All are lists of token ids, none empty (ValueError). The first call on a model compares the fast
    way with the obvious one."""
    if not (all(prompts) and all(y for ys in siblings for y in ys)):
        raise ValueError("cannot score an empty prompt or an empty response")
    row = max(len(p) + sum(map(len, ys)) for p, ys in zip(prompts, siblings))
    # the mask knows no windows: in a longer row, a layer would see more than it was trained to
    window = min([v for k, v in vars(model.config.get_text_config()).items() if type(v) is int
                  and v > 0 and re.search("(window|chunk)(_size)?$", k)], default=2 * row)
    if not hasattr(model, "shares_prompts"):
        # two halves of a text stand for a prompt and a response: all of that fits the window
        text = max((p + y for p, ys in zip(prompts, siblings) for y in ys), key=len)[:window // 2]
        first, second = text[:len(text) // 2], text[len(text) // 2:]
        probe = [first, first[:1]], [[second, second[::-1]], [second, first]]
        model.shares_prompts = can_share(model, *probe)
    fast = model.shares_prompts and row <= window
    logps = model.shared_logps(prompts, siblings) if fast else plain_logps(model, prompts, siblings)
    parts = iter(logps.split([len(y) for ys in siblings for y in ys]))
    return [[next(parts) for _ in ys] for ys in siblings]


def response_logps(model, prompts, responses):
    """Each response behind the prompt of its place -> list of tensors (len(response),), nats."""
    return [row[0] for row in score(model, prompts, [[y] for y in responses])]


def logp_matrix(model, prompts, responses, reduce="mean"):
    """Every response under every prompt -> (n, n) nats, rows i = prompts, columns j = responses."""
    return as_matrix(score(model, prompts, [responses] * len(prompts)), reduce)


# ----------------------------------------------------------------------------------------- sampling


def pick(logits, temperature, top_p, u):
    """A token a row by inverse CDF: logits (B, V), u (B,) in (0, 1] -> (B,). Argmax at 0."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1), None  # (B, V)
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = p * (p.cumsum(-1) - p < top_p)  # the smallest set of tokens that holds top_p
    cdf = p.cumsum(-1)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:])  # (B, 1): u > 0, so p > 0 there
    return (token if order is None else order.gather(1, token))[:, 0]


def prefill(model, prompts):
    """Run a batch of prompts -> cache, logits behind each (B, V), attention mask (B, T) or None."""
    distinct = sorted(set(map(tuple, prompts)))  # equal prompts run once
    index = torch.tensor([distinct.index(tuple(p)) for p in prompts], device=model.device)  # (B,)
    width, mask, layout = max(map(len, distinct)), None, {}
    if min(map(len, distinct)) < width:  # else no padding, on the left, and no mask: faster
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct],
                            device=model.device)
        layout = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        mask = mask[index]
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in distinct], device=model.device)
    out = model(ids, use_cache=True, logits_to_keep=1, **layout)
    out.past_key_values.batch_select_indices(index)  # rows: from distinct prompts to responses
    return out.past_key_values, out.logits[index, -1], mask


@torch.no_grad()
def sample(model, prompts, *, max_new_tokens, temperature, top_p=1.0, eos_ids, seed, batch=64,
           stop=None):
    """One response for each prompt: lists of ids of any lengths -> lists of <= max_new_tokens ids.

    A response that ended by itself keeps its end id. seed: an int, or a tuple of ints for each
    prompt; the noise of a response is a function of that key, not of the batch it is in. batch:
    rows side by side. stop(ids so far): asked every 8 tokens."""
    if not all(prompts):
        raise ValueError("cannot continue an empty prompt")
    responses = [[] for _ in prompts]
    keys = [(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else seed
    # 1. similar lengths side by side; the longest first, so that memory runs out at once or never
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
    batches = [order[k:k + batch] for k in range(0, len(order), batch)]
    for rows in tqdm(batches, desc="sampling", leave=False, disable=RANK > 0 or None):
        # 2. prefill, and all the noise of this batch: (B, max_new_tokens) in (0, 1]
        cache, logits, mask = prefill(model, [prompts[i] for i in rows])
        u = [np.random.default_rng(keys[i]).random(max_new_tokens, np.float32) for i in rows]
        u = 1 - torch.tensor(np.stack(u), device=model.device)
        # 3. decode: row b is the response to prompt running[b], or None when that has finished
        running = list(rows)
        for t in range(max_new_tokens):
            token = pick(logits, temperature, top_p, u[:, t])  # (B,)
            for b, (i, new) in enumerate(zip(running, token.tolist())):
                if i is not None:
                    responses[i].append(new)
                    ended = new in eos_ids or t + 1 == max_new_tokens
                    if ended or stop and t % 8 == 7 and stop(responses[i]):
                        running[b] = None
            left = [b for b, i in enumerate(running) if i is not None]
            if not left:
                break
            # 4. drop finished rows, a quarter of the batch at a time since that copies the cache
            if len(left) < 0.75 * len(running):
                running, left = [running[b] for b in left], torch.tensor(left, device=model.device)
                cache.batch_select_indices(left)
                token, u, mask = token[left], u[left], None if mask is None else mask[left]
            layout = {}
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=1)
                layout = dict(attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1)
            out = model(token[:, None], past_key_values=cache, use_cache=True, **layout)
            logits = out.logits[:, -1]
    return responses


# --------------------------------------------------------------------------------------------- task


@dataclass(frozen=True)
class Constitution:
    """One side of each of k principles, in an order. str() is what the model reads."""
    names: tuple  # k principle names
    sides: tuple  # k bools: True = the principle, False = its antithesis
    texts: tuple  # k wordings
    numbered: bool = True

    def __str__(self):
        lines = [f"{i}. {text}" for i, text in enumerate(self.texts, 1)]
        return "\n".join(lines) if self.numbered else " ".join(self.texts)

    def shuffled(self, rng):
        order = rng.permutation(len(self.names))
        fields = (tuple(f[i] for i in order) for f in (self.names, self.sides, self.texts))
        return Constitution(*fields, self.numbered)


TASK_KEYS = dict(  # what task.json may hold, and what counts where it holds nothing
    about="", sampling_prompt="", scoring_prompt="", chat=False, response_prefix="",
    answer_after="",  # a chain of thought comes before it
    stop=[], drop_if_contains=[], first_must_end_with="",  # see clean() and drop()
    principles_per_constitution=2, numbered=True,
    first_always_positive=True, others="independent",  # or "complement", see draw()
    principles="principles.json", train="train.jsonl", test="test.jsonl")


class Task:
    """A folder with task.json (TASK_KEYS), principles.json and two files of queries; or the path of
    another such .json file. Raises BadInput with file, line and fix."""

    def __init__(self, folder):
        path = Path(folder) if str(folder).endswith(".json") else Path(folder) / "task.json"
        with telling(path):
            spec = dict(json.loads(path.read_text("utf-8")))
            spec = {**TASK_KEYS, "scoring_prompt": spec.get("sampling_prompt", ""), **spec}
            for key, value in spec.items():
                need(key in TASK_KEYS, f"there is no key {key!r}, but {', '.join(TASK_KEYS)}",
                     ValueError)
                kind = type(TASK_KEYS[key])
                texts = value if isinstance(value, list) else []
                need(type(value) is kind and all(t and isinstance(t, str) for t in texts),
                     f"{key!r} must be a {kind.__name__}, any list one of texts, not {value!r}",
                     ValueError)
            for key in ("sampling_prompt", "scoring_prompt"):
                asked = "{query}" in spec[key]  # with "chat" the query is a message of its own
                need("{constitution}" in spec[key] and asked is not spec["chat"],
                     f"{key!r} needs {{constitution}}, and {{query}} unless 'chat' is true",
                     ValueError)
            need(spec["others"] in ("independent", "complement"),
                 "'others' must be independent or complement", ValueError)
        self.templates = spec.pop("sampling_prompt"), spec.pop("scoring_prompt")
        self.__dict__.update(spec, path=path, folder=path.parent)
        self.principles, self.heldout = self.read_principles(self.folder / spec["principles"])
        need(0 < self.principles_per_constitution <= len(self.principles), f"{path}: principles_per"
             f"_constitution must lie between 1 and the {len(self.principles)} to train on")
        self.train, self.test = (self.read_queries(spec[key]) for key in ("train", "test"))
        seen = {self.flat(q["query"]) for q in self.train}
        for q in self.test:
            text = self.flat(q["query"])
            need(text not in seen, f"{q['line']}: {text[:60]!r} is in {spec['train']} too; remove "
                 "it from one of them")

    def read_principles(self, path):
        """-> those to train on, those held out: dicts of name, positive and negative (lists of
        wordings), heldout."""
        with telling(path):
            rows, found = list(json.loads(path.read_text("utf-8"))), {}
        for i, p in enumerate(rows, 1):
            with telling(f"{path}: principle {i} needs a 'name' of its own, a 'positive' text (or "
                         "list of texts), as the 'negative' its antithesis, maybe 'heldout' (true "
                         f"or false), and nothing else: {p}"):
                p = {"heldout": False, **p}
                for side in ("positive", "negative"):
                    p[side] = [p[side]] if isinstance(p[side], str) else p[side]
                need(all(t.strip() for t in [p["name"], *p["positive"], *p["negative"]])
                     and len(p) == 4 and p["positive"] and p["negative"] and p["name"] not in found
                     and type(p["heldout"]) is bool
                     and not set(p["positive"]) & set(p["negative"]), "", ValueError)
            found[p["name"]] = p
        return [[p for p in found.values() if p["heldout"] is held] for held in (False, True)]

    @staticmethod
    def flat(x):
        """A query as one text: a dialogue becomes lines such as "user: Hello"."""
        return x if isinstance(x, str) else "\n".join(f"{m['role']}: {m['content']}" for m in x)

    def is_query(self, x):
        """A text; for a chat model also the messages of a dialogue, the user's first and last."""
        turns = x if self.chat and isinstance(x, list) else [dict(role="user", content=x)]
        roles = ["user", "assistant"] * len(turns)
        return len(turns) % 2 == 1 and all(m["role"] == role and m["content"].strip()
                                           for m, role in zip(turns, roles))

    def read_queries(self, name):
        """-> dicts: query, line (where it stands), and what else its line holds."""
        path, rows, names = self.folder / name, [], [None, *(p["name"] for p in self.principles)]
        with telling(f"{path} cannot be read; write it, or run python {self.folder}/prepare.py"):
            lines = path.read_bytes().rstrip().split(b"\n")  # no splitlines(): texts hold U+2028
        for i, line in enumerate(lines, 1):
            with telling(f'{path} line {i} must be {{"query": a text}}; with "chat" also a list of '
                         "messages {role, content}, user and assistant in turn, the user first and "
                         f'last; "focus" names a principle to train on: {line[:60]!r}'):
                row = json.loads(line)
                need(self.is_query(row["query"]) and row.get("focus") in names, "", ValueError)
            rows.append(dict(row, line=f"{path} line {i}"))
        return rows

    def draw(self, rng, n, focus=None, heldout=False):
        """n constitutions on the same k random principles, distinct in the sides they take.

        Sides are random, or every second constitution is the opposite of the one before it
        ("complement"). Of the principle `focus` all but the first take the other side. Raises
        BadInput when there are fewer than n."""
        pool, k = self.heldout if heldout else self.principles, self.principles_per_constitution
        most = 2 ** (k - 1) + 1 if focus else 2**k  # with a focus, k - 1 are free in the others
        most = most if k <= len(pool) else 0
        need(n <= most, f"{self.path}: {k} of {len(pool)} principles make at most {most} different "
             f"constitutions; lower --n, now {n}, or change principles_per_constitution")
        order = rng.permutation(len(pool))
        chosen = sorted(order, key=lambda i: pool[i]["name"] != focus)[:k]  # the focus first
        sides = []  # n tuples of k bools
        while len(sides) < n:
            new = tuple(bool(b) for b in rng.integers(0, 2, k))
            if not sides and self.first_always_positive:
                new = (True,) * k
            elif sides and focus:
                new = (not sides[0][0], *new[1:])
            elif self.others == "complement" and len(sides) % 2:
                new = tuple(not s for s in sides[-1])
            sides += [new] if new not in sides else []
        wording = lambda i, side: str(rng.choice(pool[i]["positive" if side else "negative"]))
        names = tuple(pool[i]["name"] for i in chosen)
        return [Constitution(names, s, tuple(map(wording, chosen, s)), self.numbered).shuffled(rng)
                for s in sides]

    def sampling_prompt(self, x, c):
        """What a response is sampled behind: a text, or with "chat" messages."""
        return self.fill(self.templates[0], x, c)

    def prompt(self, x, c):
        """What a response is scored behind."""
        return self.fill(self.templates[1], x, c)

    def fill(self, template, x, c):
        if self.chat:
            system = dict(role="system", content=template.replace("{constitution}", str(c)))
            return [system, *([dict(role="user", content=x)] if isinstance(x, str) else x)]
        # the query last, since it may itself hold the word {constitution}
        return x.join(s.replace("{constitution}", str(c)) for s in template.split("{query}"))

    def check_lengths(self, config, tokenizer, cfg):
        """Meet a prompt that is too long before weights load: every query, longest principles."""
        limit = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
        size, prefix = lambda text: len(tokenizer(text).input_ids), self.response_prefix
        every = self.principles + self.heldout
        texts = sorted((max(p["positive"] + p["negative"], key=size) for p in every), key=size)
        c = Constitution((), (), texts[-self.principles_per_constitution:], self.numbered)
        for q in self.train + self.test:
            prompts = self.prompt(q["query"], c), self.sampling_prompt(q["query"], c)
            longest = max(len(sum(encode(tokenizer, p, prefix), [])) for p in prompts)
            need(longest + cfg.max_new_tokens <= limit, f"{q['line']}: {longest} tokens of prompt "
                 f"and --max_new_tokens={cfg.max_new_tokens} are more than the context of {limit}; "
                 "shorten the query or the principles")

    def answer(self, text):
        """What is behind the reasoning; empty where that came to no answer."""
        return text.partition(self.answer_after)[2].lstrip() if self.answer_after else text

    def clean(self, text):
        """The response proper: its answer, up to the first stop string, stripped."""
        text = self.answer(text)
        return min((text.split(s)[0] for s in self.stop), key=len, default=text).strip()

    def drop(self, texts):
        """Why these n responses to one query are not trained on, or None."""
        end, bad = self.first_must_end_with, self.drop_if_contains
        reasons = [("empty response", not all(texts)),
                   ("identical responses", len(set(texts)) < len(texts)),
                   *((f"contains {s!r}", any(s in t for t in texts)) for s in bad),
                   (f"first response does not end with {end!r}", not texts[0].endswith(end))]
        return next((why for why, holds in reasons if holds), None)


load_task = Task


def render(tokenizer, messages):
    """Messages -> text by the model's chat template, up to where its answer begins. A template
    without a system role has that text at the start of the first message. Raises BadInput."""
    system, *turns = messages
    joined = [dict(m, content=f"{system['content']}\n\n{m['content']}") for m in turns[:1]]
    for said in (messages, joined + turns[1:]):
        with contextlib.suppress(jinja2.TemplateError, ValueError):
            text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            if system["content"].strip() in text:  # some leave it out without a word
                return text
    raise BadInput(f"--model={tokenizer.name_or_path} has no chat template that takes these "
                   "messages; choose a chat model, or leave out \"chat\"")


def encode(tokenizer, prompt, response=""):
    """Prompt, a text or messages -> its ids, with the model's start token and no end token; and
    those of a response, or of its opening, behind it. Raises BadInput like render.

    Control tokens come from the chat template alone: one spelled in a text is read as letters."""
    def ids_of(text, literal=True, **how):
        return tokenizer(text, split_special_tokens=literal, **how).input_ids

    if isinstance(prompt, str):
        ids, both = ids_of(prompt), ids_of(prompt + response)
        if ids[-1:] == [tokenizer.eos_token_id] != [tokenizer.bos_token_id]:  # no end token
            ids, both = ids[:-1], both[:-1]
    else:
        control = {re.escape(str(t)) for t in tokenizer.added_tokens_decoder.values() if t.special}
        control = re.compile("|".join(sorted(control, key=len, reverse=True)) or "(?!)")
        mark = lambda text: control.sub(r"\0\g<0>\0", text.replace("\0", ""))
        rendered = render(tokenizer, [dict(m, content=mark(m["content"])) for m in prompt])
        # odd parts are control tokens that a text spells, even ones hold those of the template
        ids, both = ([i for k, part in enumerate((rendered + mark(end)).split("\0"))
                      for i in ids_of(part, literal=k % 2 == 1, add_special_tokens=False)]
                     for end in ("", response))
    # behind the prompt where that leaves its ids as they are: some treat a text's first space apart
    same = both[:len(ids)] == ids
    return ids, both[len(ids):] if same else ids_of(response, add_special_tokens=False)


# ------------------------------------------------------------------------------ model and processes

# torchrun tells each process its place; without it there is one
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
NODE = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))  # processes on this node


def sum_processes(numbers):
    """Sums over all processes of each number in a list. Nobody goes on before all are there."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(numbers)
    return numbers.tolist()


def gather(mine):
    """A list on each process -> one list of all: process r had every WORLD-th from the r-th."""
    parts = [mine] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, mine)
    return [x for turn in itertools.zip_longest(*parts) for x in turn if x is not None]


def pick_device(cfg):
    """Where to run; several processes connect."""
    mps = torch.backends.mps.is_available() and WORLD == 1
    there = dict(cuda=torch.cuda.is_available(), mps=mps, cpu=True)
    best = next(d for d in there if there[d])
    name = best if cfg.device == "auto" else cfg.device
    need(there[name] and (WORLD == 1 or name == best),  # several share what the machine has
         f"--device={name}: there is none for this run; use --device={best}")
    device = torch.device(name, LOCAL_RANK if name == "cuda" else 0)
    if name == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
    return device


def in_half(cfg, device):
    return cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda"


def compute(model, cfg):
    """Matrix products in bfloat16 where that is wanted; the weights stay fp32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=in_half(cfg, model.device))


def load_tokenizer(path):
    """Model folder or hub name -> (config, tokenizer): small files, to meet bad input early."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with telling(f"--model={path} cannot be loaded; name a model folder or a hub name"):
        return [kind.from_pretrained(path, trust_remote_code=False)
                for kind in (AutoConfig, AutoTokenizer)]


def distribution(config, device, cfg):
    """How transformers lays the model out over processes: copies, or parts of it in each."""
    from transformers.distributed import DistributedConfig
    with torch.device("meta"):  # shapes and names alone
        skeleton = AutoModelForCausalLM.from_config(config)
    layers = {name.rpartition(".")[0] + ".*" for name, m in skeleton.named_modules()
              if type(m).__name__ in set(skeleton._no_split_modules or [])}  # model.layers.*
    gpu = device.type == "cuda"
    room = torch.cuda.get_device_properties(device).total_memory if gpu else math.inf
    # weights, gradients, AdamW's moments in fp32 and a bfloat16 copy; the rest for activations
    fits = 18 * sum(p.numel() for p in skeleton.parameters()) < 0.7 * room
    way = cfg.parallel if cfg.parallel != "auto" else "ddp" if fits else "fsdp"
    parts = dict(ddp=1, fsdp=WORLD, hybrid=NODE)[way]
    return DistributedConfig(
        fsdp_size=parts, dp_replicate_size=WORLD // parts,
        fsdp_mixed_precision=in_half(cfg, device),
        fsdp_plan=dict.fromkeys(layers, "free_full_weight"))  # whole while it runs, then freed


def weights_norm(model):
    """The norm of all weights, over all processes: not finite where one of them is not."""
    norm = torch.nn.utils.get_total_norm(list(model.parameters()), foreach=False)
    return float(norm.full_tensor() if WORLD > 1 else norm)


def load_model(path, device, cfg):
    """Model folder or hub name -> causal LM with fp32 weights. Of several processes each reads only
    what it will hold. Raises BadInput."""
    gc.collect()  # a model that nobody needs any more refers to itself
    with telling(f"--model={path} cannot be loaded; fetch the whole model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        for part in (config, config.get_text_config()):  # dropout would put noise into the contrast
            dropouts = [k for k, v in vars(part).items() if "drop" in k and type(v) is float]
            vars(part).update(dict.fromkeys(dropouts, 0.0))
        # the mask of scoring cannot be combined with soft-capped scores in the fused kernels
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, attn_implementation="eager" if capped else None,
            distributed_config=distribution(config, device, cfg) if WORLD > 1 else None)
        lost = sorted(info["missing_keys"])  # they would be random
        need(not lost, f"{len(lost)} weights are not there, such as {lost[:1]}", ValueError)
        model = model.eval() if WORLD > 1 else model.eval().to(device)  # a part is there already
    need(math.isfinite(weights_norm(model)), f"--model={path} has weights that are nan or infinite;"
         " fetch the model again", RunFailed)
    if WORLD > 1:
        model.set_reshard_after_forward(True)
    return model


def end_ids(model, tokenizer):
    """The token ids that end a text."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = tokenizer.eos_token_id if ids is None else ids
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


@contextlib.contextmanager
def weights_together(model):
    """Bring the weights of a sharded model together once, and not for every token that is sampled;
    each process may then take as many steps as its responses need."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for m in parts:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    yield
    for m in parts:
        m.set_reshard_after_forward(True, recurse=False)
        m.reshard()


def save_model(model, tokenizer, folder):
    """A Hugging Face folder with fp32 weights: there whole, or not there."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    tmp, weights = Path(f"{folder}.tmp"), None
    if WORLD > 1:  # all of them, on process 0
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=whole)
        for name in model.all_tied_weights_keys:  # else saved twice
            weights.pop(name, None)
        model.config.distributed_config = None  # else they are collected once more
    if RANK == 0:
        with telling(f"{folder} cannot be saved: make room, then go on with --resume", RunFailed):
            shutil.rmtree(tmp, ignore_errors=True)
            model.save_pretrained(tmp, state_dict=weights)
            tokenizer.save_pretrained(tmp)
            tmp.replace(folder)


# ------------------------------------------------------------------------------------ one iteration

DRAW, ORDER, NOISE = 1, 2, 3  # what random numbers are for: part of their key


@dataclass
class Example:
    """One query with all that belongs to it; a line of samples/iteration-K.jsonl."""
    number: int  # which training query: with seed and iteration the key of its draws and noise
    query: object  # text or messages
    constitutions: list  # n texts
    responses: list  # n texts, y_j sampled under c_j
    sides: list = None  # n dicts {principle: is it the positive side?}
    ids: list = None  # n lists of token ids: the responses as they were sampled
    prompts: list = None  # n lists of token ids: what the responses are scored behind
    dropped: str = None  # why it is not trained on
    base: list = None  # n lists of n tensors: token log-probs under the base, where beta > 0


def respond(model, tokenizer, task, pairs, cfg, keys, temperature):
    """Sample a response to each (query, constitution) -> for each its prompt's ids, its ids, its
    text, and did it end by itself? keys: as the seed of sample()."""
    ends = end_ids(model, tokenizer)
    stop = lambda ids: any(s in task.answer(tokenizer.decode(ids)) for s in task.stop)
    encoded = [encode(tokenizer, task.sampling_prompt(x, c), task.response_prefix)
               for x, c in pairs]
    with weights_together(model), compute(model, cfg):
        sampled = sample(model, [p + prefix for p, prefix in encoded], seed=keys, eos_ids=ends,
                         max_new_tokens=cfg.max_new_tokens, temperature=temperature,
                         top_p=cfg.top_p, batch=cfg.sample_batch, stop=stop)
    found = []
    for (prompt, prefix), ids in zip(encoded, sampled):
        ended = ids[-1] in ends
        ids = prefix + (ids[:-1] if ended else ids)
        text = task.clean(tokenizer.decode(ids))
        # the fewest ids that spell it: from the front goes the reasoning, from the back a stop
        # string, whose start may share a token with the response's end, and what follows
        while task.answer_after and ids and text in tokenizer.decode(ids[1:]):
            ids = ids[1:]
        while ids and text in tokenizer.decode(ids[:-1]):
            ids = ids[:-1]
        found.append((prompt, ids, text, ended))
    return found


def sample_examples(model, tokenizer, task, queries, cfg, iteration, temperature):
    """Draw n constitutions for each (number, query), sample a response under each -> Examples.
    Draws and noise are functions of (cfg.seed, iteration, number); processes share the work."""
    mine, n, rng = queries[RANK::WORLD], cfg.n, np.random.default_rng
    drawn = [task.draw(rng((cfg.seed, iteration, i, DRAW)), n, q.get("focus")) for i, q in mine]
    keys = [(cfg.seed, iteration, i, NOISE, j) for i, _ in mine for j in range(n)]
    pairs = [(q["query"], c) for (_, q), cs in zip(mine, drawn) for c in cs]
    found, examples = respond(model, tokenizer, task, pairs, cfg, keys, temperature), []
    for k, ((i, q), cs) in enumerate(zip(mine, drawn)):
        _, ids, texts, _ = map(list, zip(*found[k * n:(k + 1) * n]))
        # scored with the principles in another order, as in the paper
        again = rng((cfg.seed, iteration, i, ORDER))
        prompts = [encode(tokenizer, task.prompt(q["query"], c.shuffled(again)))[0] for c in cs]
        examples.append(Example(
            i, q["query"], constitutions=[str(c) for c in cs], responses=texts, ids=ids,
            sides=[dict(zip(c.names, c.sides)) for c in cs], prompts=prompts,
            dropped=task.drop(texts)))
    return gather(examples)


def read_examples(path, tokenizer, task, cfg):
    """The whole lines of a samples file, by a run that was stopped or by another program: where one
    has no ids, its responses are tokenised. Half a last line is cut off."""
    examples, data = [], path.read_bytes() if path.exists() else b""
    whole = data[:data.rfind(b"\n") + 1]
    if RANK == 0 and whole != data:
        os.truncate(path, len(whole))
    for i, line in enumerate(whole.split(b"\n")[:-1], 1):
        with telling(f"{path} line {i} must hold number, query, {cfg.n} constitutions and {cfg.n} "
                     "responses; mend it, or start again without --resume"):
            e = Example(**json.loads(line))
            need(len(e.constitutions) == len(e.responses) == cfg.n
                 and (e.dropped or e.ids is None or all(e.ids)), "", ValueError)
            prompts = [task.prompt(e.query, c) for c in e.constitutions]
            e.prompts = e.prompts or [encode(tokenizer, p)[0] for p in prompts]
            if e.ids is None:
                e.ids = [encode(tokenizer, p, y)[1] for p, y in zip(prompts, e.responses)]
                e.dropped = task.drop([y.strip() for y in e.responses])
        examples.append(e)
    return examples


def collect(model, tokenizer, task, cfg, iteration, wanted):
    """Sample this iteration's half of the training queries, a batch at a time, until `wanted`
    Examples pass the filters. What the samples file holds is not sampled again."""
    path, size = Path(cfg.out_dir) / "samples" / f"iteration-{iteration}.jsonl", cfg.batch_size
    examples = read_examples(path, tokenizer, task, cfg)
    half = np.arange((iteration - 1) % 2, len(task.train), 2)  # the last iteration had the others
    order = np.random.default_rng((cfg.seed, iteration)).permutation(half).tolist()
    while True:
        known, usable = {e.number for e in examples}, [e for e in examples if not e.dropped]
        todo, rest = [i for i in order if i not in known], -len(examples) % size
        if not todo or len(usable) >= wanted and not rest:
            break
        # whole batches, so that a file that was cut off grows to the bytes it would have had
        now = [(i, task.train[i]) for i in todo[:rest or size]]
        new = sample_examples(model, tokenizer, task, now, cfg, iteration, cfg.temperature)
        append(path, *({k: v for k, v in vars(e).items() if k != "base"} for e in new))
        examples += new
    why = [e.dropped for e in examples if e.dropped]
    print(f"iteration {iteration}: {len(examples)} queries sampled, {len(usable)} usable"
          + "".join(f", {why.count(w)} dropped: {w}" for w in sorted(set(why))), flush=True)
    need(usable, f"iteration {iteration}: all samples were filtered out, see {path}; loosen the "
         f"filters of {task.path}, or raise --temperature", RunFailed)
    return usable[:wanted]


def deal(examples, cfg):
    """Examples -> this process's scoring passes of at most cfg.tokens_per_pass tokens: list of
    (examples, weight). Sharded passes are collective: who runs out repeats one at weight 0."""
    width = lambda e: max(map(len, e.prompts)) + sum(map(len, e.ids))
    examples, shares = sorted(examples, key=width), [[] for _ in range(WORLD)]
    for r, share in enumerate(shares):
        for e in examples[r::WORLD]:
            if not share or (len(share[-1]) + 1) * cfg.n * width(e) > cfg.tokens_per_pass:
                share.append([])
            share[-1].append(e)
    spare = max(map(len, shares)) - len(shares[RANK])
    return [(group, 1) for group in shares[RANK]] + [(examples[:1], 0)] * spare


def score_examples(model, examples, cfg):
    """-> for each Example n lists of n tensors: token log-probs of every y_j under every c_i."""
    prompts, siblings = zip(*[(p, e.ids) for e in examples for p in e.prompts])
    with compute(model, cfg):
        rows = iter(score(model, prompts, siblings))
    return [[next(rows) for _ in e.prompts] for e in examples]


def measures(logp):
    """How often is the diagonal entry of (n, n) log-probs the largest of its row, its column?"""
    target = torch.arange(len(logp), device=logp.device)
    row, col = ((logp.argmax(dim) == target).float().mean() for dim in (1, 0))
    return dict(row_accuracy=row, col_accuracy=col, diagonal=logp.diag().mean())


def objective(example, cells, cfg):
    """What training minimises for one query: cells[i][j] = token log-probs of y_j under c_i -> dict
    of scalars, all logged, `loss` descended."""
    logp = as_matrix(cells, cfg.reduce)  # (n, n)
    found = dict(loss=sami_loss(logp, cfg.contrast), **measures(logp.detach()))
    if cfg.beta:  # over all n x n pairs: every response under every constitution
        policy, base = (torch.cat([t for row in m for t in row]) for m in (cells, example.base))
        found["kl"] = kl_to_base(policy, base).mean()
        found["loss"] = found["loss"] + cfg.beta * found["kl"]
    return found


def learning_rate(step, steps, cfg):
    """The learning rate of step 0 ... steps - 1 of an iteration."""
    return cfg.lr * min(1, (step + 1) / (cfg.warmup + 1))


def train(model, examples, steps, iteration, cfg):
    """Train `model` in place: `steps` steps, each on the next cfg.batch_size Examples."""
    params, size = [p for p in model.parameters() if p.requires_grad], cfg.batch_size
    if cfg.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers heeds it in this mode only; dropout is 0
    kind = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[cfg.optimizer]
    optimizer = kind(params, foreach=False)  # the default makes temporaries as large as the model
    fix = f"lower --lr, now {cfg.lr}; what was saved is kept"
    for step in range(steps):
        started, found, tokens = time.time(), {}, 0
        batch = examples[step * size:(step + 1) * size]
        for group, weight in deal(batch, cfg):
            total, share = 0, weight / len(batch)  # the batch's mean, however it is dealt out
            for e, cells in zip(group, score_examples(model, group, cfg)):
                values = objective(e, cells, cfg)
                total = total + share * values["loss"]
                found = {k: found.get(k, 0) + share * float(v.detach()) for k, v in values.items()}
                tokens += weight * (sum(map(len, e.prompts)) + cfg.n * sum(map(len, e.ids)))
            (total * WORLD).backward()  # gradients are averaged over processes
        *values, tokens = sum_processes([*found.values(), tokens])
        found = dict(zip(found, values))
        norm = torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf, foreach=False)
        norm = float(norm.full_tensor() if WORLD > 1 else norm)
        need(math.isfinite(found["loss"] + norm), f"step {step + 1}: the loss is {found['loss']}, "
             f"its gradient {norm}; {fix}", RunFailed)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, cfg)
        optimizer.step()
        optimizer.zero_grad()
        if WORLD > 1:  # FSDP pads uneven parts, of tied weights twice: loading nothing renews both
            model.load_state_dict({}, strict=False)
        seconds = time.time() - started
        record(cfg, dict(iteration=iteration, step=step + 1, steps=steps, **found, grad_norm=norm,
                         lr=lr, tokens_per_second=tokens / seconds, seconds=seconds))
    model.eval()
    need(math.isfinite(weights_norm(model)), f"the last step made weights too large; {fix}",
         RunFailed)


@torch.no_grad()
def add_base_logps(base, examples, cfg):
    """Keep the base's log-probs of all that will be scored: no second model stays in memory."""
    for start in range(0, len(examples), cfg.batch_size):  # dealt out as the steps will be
        for group, _ in deal(examples[start:start + cfg.batch_size], cfg):
            for e, cells in zip(group, score_examples(base, group, cfg)):
                e.base = cells


@torch.no_grad()
def heldout_information(model, tokenizer, task, cfg):
    """What test queries tell -> means: infonce (summed log-probs of responses sampled at
    temperature 1), accuracies, standard errors under <name>_se, infonce_cap = log n; and a list of
    (Example, logp (n, n), measures). Draws and noise are the same in every iteration."""
    cfg, mine = dataclasses.replace(cfg, top_p=1.0), []
    queries = list(enumerate(task.test[:cfg.eval_queries]))
    found = sample_examples(model, tokenizer, task, queries, cfg, iteration=0, temperature=1.0)
    found = [e for e in found if all(e.ids)]
    need(found, f"every held-out response is empty: change the prompts of {task.path}, or raise "
         "--max_new_tokens", RunFailed)
    for group, weight in deal(found, cfg):
        scores = score_examples(model, group, cfg)
        for e, cells in zip(group, scores) if weight else ():
            logp = as_matrix(cells, cfg.reduce)
            values = dict(infonce=infonce(as_matrix(cells, "sum")), **measures(logp))
            mine.append((e, logp.cpu(), {k: float(v) for k, v in values.items()}))
    scored = sorted(gather(mine), key=lambda s: s[0].number)
    means = dict(infonce_cap=math.log(cfg.n))
    for name in scored[0][2]:
        values = np.array([v[name] for _, _, v in scored])
        means[name] = float(values.mean())
        means[name + "_se"] = float(values.std(ddof=len(values) > 1) / len(values) ** 0.5)
    return means, scored


# ----------------------------------------------------------------------------------------- the loop


def append(path, *rows):
    if RANK == 0:
        with telling(f"{path} cannot be written: make room, then go on with --resume", RunFailed):
            with open(path, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)


def record(cfg, row):
    append(Path(cfg.out_dir) / "log.jsonl", row)
    log(row)


def log(row):
    """Print a line of log.jsonl: a step, or what was measured on held-out queries."""
    error = lambda k: f" ± {row[k + '_se']:.2g}" if k + "_se" in row else ""
    numbers = " | ".join(f"{k} {v:.4g}{error(k)}" for k, v in row.items()
                         if isinstance(v, float) and not k.endswith("_se"))
    if "step" in row:
        eta = row["seconds"] * (row["steps"] - row["step"])
        numbers = f"step {row['step']:2}/{row['steps']} | {numbers} | eta {eta:.0f} s"
    print(f"iteration {row['iteration']} {'' if 'step' in row else '| '}{numbers}", flush=True)


def measure(model, tokenizer, task, iteration, cfg):
    """Log what held-out queries tell; of the base also whether there is anything to amplify."""
    if cfg.eval_queries:
        means, _ = heldout_information(model, tokenizer, task, cfg)
        record(cfg, dict(iteration=iteration, **means))
        if iteration == 0:
            told, error = means["infonce"], means["infonce_se"]
            hint = ", too little: let the prompt show worked examples, choose other principles, " \
                   "a larger model" if told < 3 * error else ""
            print(f"there to amplify: {told:.2f} ± {error:.2f} of {math.log(cfg.n):.2f} nats that "
                  f"the base's responses tell of their constitution{hint}", flush=True)


MAY_CHANGE = "resume out_dir parallel checkpointing device sample_batch tokens_per_pass".split()


def open_out_dir(cfg, task):
    """Make cfg.out_dir this run's own -> its first iteration that is not there yet, and a lock that
    lasts while it is kept. Raises BadInput."""
    out_dir, about_path = Path(cfg.out_dir), Path(cfg.out_dir) / "sami.json"
    there = [p for p in out_dir.iterdir() if p.name != "lock"] if out_dir.is_dir() else []
    mine = about_path.exists() or cfg.resume and (out_dir / "samples").is_dir()
    need(mine or not there and not out_dir.is_file(), f"--out_dir={out_dir} holds other things than"
         " a run; name another folder")
    need(out_dir.resolve() not in Path(cfg.model).resolve().parents,
         f"--model={cfg.model} lies in --out_dir, where this run goes; name another --out_dir")
    commit = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, text=True,
                            capture_output=True).stdout.strip()
    content = hashlib.sha256(json.dumps(vars(task), default=str).encode()).hexdigest()
    about = dict(config=vars(cfg), task_sha256=content, world_size=WORLD, git_commit=commit,
                 versions={m.__name__: m.__version__ for m in (torch, transformers, np)})
    done, log_path = 0, out_dir / "log.jsonl"
    if cfg.resume and about_path.exists():
        with telling(f"{about_path} is not what a run wrote; start a new one without --resume"):
            before = json.loads(about_path.read_text("utf-8"))
            was, now = (dict(a["config"], task_sha256=a["task_sha256"]) for a in (before, about))
        other = [f"{k}={was[k]}" for k in was if k not in MAY_CHANGE and was[k] != now.get(k)]
        need(not other, f"the run in {out_dir} was begun with other flags or another task: "
             f"{', '.join(other)}; resume it with these, or start a new run without --resume")
        done = max(k for k in range(cfg.iterations + 1)
                   if k == 0 or (out_dir / f"iteration-{k}").is_dir())
    sum_processes([0])  # all have looked
    if RANK > 0:
        return done + 1, None
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(out_dir / "lock")
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise BadInput(f"another run is at work in {out_dir}; name another --out_dir, or wait")
    if there and not cfg.resume:
        others = (Path(f"{out_dir}.{k}") for k in itertools.count(1))
        aside = next(p for p in others if not p.exists())
        aside.mkdir()
        for p in there:
            p.rename(aside / p.name)
        print(f"the earlier run in {out_dir} is now in {aside}")
    (out_dir / "samples").mkdir(exist_ok=True)
    rows = log_path.read_text("utf-8").splitlines(keepends=True) if log_path.exists() else []
    # what is done once more is logged once more, the base too
    kept = [r for r in rows if done and r[-1] == "\n" and json.loads(r)["iteration"] <= done]
    for path, text in ((log_path, "".join(kept)), (about_path, json.dumps(about, indent=1))):
        Path(f"{path}.tmp").write_text(text, encoding="utf-8")
        Path(f"{path}.tmp").replace(path)
    return done + 1, lock


def main(argv):
    # what can be wrong is met before weights load
    cfg = parse(Config, argv)
    steps = [int(k) if k.isdecimal() else 0 for k in cfg.steps.split(",")]
    steps = steps * cfg.iterations if len(steps) == 1 else steps
    need(len(steps) == cfg.iterations and min(steps) > 0, f"--steps={cfg.steps}: give a whole "
         f"number above 0, or one for each of --iterations={cfg.iterations}, such as 2,4,6")
    task = load_task(cfg.task)
    need(len(task.train) > 1, f"{cfg.task} needs two training queries: iterations alternate halves")
    for q in task.train + task.test:
        task.draw(np.random.default_rng(0), cfg.n, q.get("focus"))  # are there n constitutions?
    device = pick_device(cfg)
    config, tokenizer = load_tokenizer(cfg.model)
    task.check_lengths(config, tokenizer, cfg)
    first, lock = open_out_dir(cfg, task)

    out_dir, started = Path(cfg.out_dir), time.time()
    last = out_dir / f"iteration-{first - 1}" if first > 1 else cfg.model
    model = load_model(str(last), device, cfg)
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{cfg.model}: {weights:.2f}M weights on {WORLD} x {device.type} | {cfg.task}: "
          f"{len(task.train)} queries, {len(task.principles)} principles | chance: loss "
          f"{math.log(cfg.n):.3f}, accuracy {1 / cfg.n:.2f}")
    if first == 1:
        measure(model, tokenizer, task, 0, cfg)
    for iteration in range(first, cfg.iterations + 1):
        # --- sample with the last iteration's model
        wanted = steps[iteration - 1] * cfg.batch_size
        examples = collect(model, tokenizer, task, cfg, iteration, wanted)
        # --- start again from the base
        if cfg.restart and iteration > 1:
            model = None  # makes room
            model = load_model(cfg.model, device, cfg)
        if cfg.beta:
            base = model if cfg.restart or iteration == 1 else load_model(cfg.model, device, cfg)
            add_base_logps(base, examples, cfg)
            base = None
        # --- a few steps, fewer where the filters left too little
        train(model, examples, math.ceil(len(examples) / cfg.batch_size), iteration, cfg)
        # --- measure and save: an iteration whose folder is there is finished
        measure(model, tokenizer, task, iteration, cfg)
        save_model(model, tokenizer, out_dir / f"iteration-{iteration}")
        sum_processes([0])  # it is there for all
    print(f"done in {time.time() - started:.0f} s, everything is in {out_dir}; next: "
          f"python evaluate.py --out_dir={out_dir}")
    if WORLD > 1:  # one that just ends while the others talk may abort
        dist.barrier()
        dist.destroy_process_group()


def run(program):
    """program(command line); bad input and failures are one sentence, exit code 2 and 1."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
    try:
        program(sys.argv[1:])
    except (BadInput, RunFailed, torch.OutOfMemoryError) as e:  # each process may fail alone
        hint = "; lower --sample_batch (sampling) or --tokens_per_pass (training)"
        hint = hint if isinstance(e, torch.OutOfMemoryError) else ""
        print(f"error{f' of process {RANK}' * (WORLD > 1)}: {e}{hint}", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(e, BadInput) else 1)


if __name__ == "__main__":
    run(main)
