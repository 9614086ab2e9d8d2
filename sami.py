"""
SAMI: Self-Supervised Alignment with Mutual Information (Fraenken et al. 2024, arXiv 2404.14313), whole, in one file.

A pretrained language model learns to follow written principles from its own responses: no preference labels, no
demonstrations, no reward model. With x a query, c_i one of n constitutions (lists of principles), y_j the response
sampled under c_j:

    repeat for a few iterations                                                                (paper: Algorithm 1)
        for each query x: draw n constitutions; sample y_j from the last iteration's model prompted with (x, c_j)
        start again from the base model; then for a few steps of `batch_size` queries:
            logp[i, j] = mean over tokens of log pi(y_j | x, c_i)  (n, n), rows i = constitutions, columns j = responses
            row = cross entropy of each row with its diagonal      which response belongs to this constitution?
            col = cross entropy of each column with its diagonal   which constitution does this response come from?
            minimise (row + col) / 2 + beta * KL to the base, averaged over queries

Each response becomes more likely under the constitution it came from than under the others. Chance is log n nats.

What is known about this objective (tests/test_information.py shows it by enumeration):
 1. With *summed* log-probs of samples at temperature 1, log n - col is exactly I(Y; C | x) for a uniform choice among
    the n constitutions. `row` is no bound in general, nor is either with means. Only `infonce` is called information.
 2. In that case the expected gradient of col is zero: the samples already carry the posterior that the model assigns.
    The signal comes from sampling colder than the model, from averaging over tokens, from a different prompt for
    sampling, from filtering. That is why the temperature matters.
 3. Only differences of log-probs count. Pushed far, the model falls into gibberish while the loss still falls; few
    steps, a small learning rate, a restart from the base or beta > 0 prevent it.

Where this file departs from the paper (P) and from the authors' code (A):
 1. any n >= 2 (A: two); the constitutions of a query take different sides of the same principles
 2. prompt and response are tokenised apart, the sampled ids themselves are scored (A: joined text, tokenised again)
 3. a step is the mean over all `batch_size` queries (A, in the paper's runs: the last 8 of 128, first step at lr 0)
 4. weights are fp32 whatever the compute dtype (A: bf16, in which most of a 5e-7 step rounds to nothing)
 5. the number reported on held-out queries is InfoNCE, capped at log n (P: a mean of logs, no bound, above log n)
 6. beta weighs a KL estimate on response tokens, 0 in the paper's presets (A: prompt and padding counted too)
 7. data order, draws and noise are functions of (seed, iteration, query): a run can be repeated exactly
"""
import contextlib, dataclasses, functools, gc, hashlib, importlib.metadata, inspect, itertools, json, math, os, shlex
import shutil, signal, subprocess, sys, threading, time, types, typing, warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on busy CPUs, threads that wait must not keep others from working

import jinja2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------- config


@dataclass
class Config:
    preset: str = ""  # start from a named set of values (PRESETS): stories, tldr-small, or the paper's experiments
    task: str = "data/toy"  # folder with the prompts, principles and queries
    model: str = "data/toy/base"  # base model: Hugging Face folder or hub name
    out_dir: str = "out"  # checkpoints, samples, logs; an earlier run there is moved aside, never overwritten
    iterations: int = 3  # rounds of sampling and training
    steps: str = "4,8,12"  # gradient steps: one number, or one for each iteration
    batch_size: int = 16  # queries a step, over all processes
    n: int = 4  # constitutions per query, one response each
    lr: float = 3e-4  # learning rate, constant after the warm-up
    optimizer: str = "adamw"  # adamw | rmsprop
    warmup: int = 0  # steps over which lr rises linearly
    grad_clip: float = 0.0  # largest gradient norm; 0 = no clipping
    beta: float = 0.1  # weight of the KL to the base on response tokens; 0 = none, as in the paper
    contrast: str = "two-sided"  # two-sided | constitutions (column term only) | responses (row term only)
    reduce: str = "mean"  # a response's log-prob: mean | sum over its tokens
    score_eos: bool = False  # score the end-of-text token too, where the model ended by itself
    temperature: float = 0.8  # of sampling for training; 0 = greedy
    top_p: float = 1.0  # sample from the smallest set of tokens with this probability
    max_new_tokens: int = 32  # longest response
    restart: bool = True  # every iteration trains the base model again; False: continues with the last one
    max_queries: int = 0  # use only the first so many training queries; 0 = all
    eval_queries: int = 64  # test queries for infonce and accuracies, before and after each iteration; 0 = skip
    tokens_per_pass: int = 8192  # tokens in one scoring pass; lower it when memory runs out in training
    sample_gb: float = 0.0  # memory for responses sampled side by side; 0 = 80 % of a GPU's free memory, 4 GB elsewhere
    checkpointing: bool = False  # compute activations again in the backward pass: less memory, a third more time
    compile: bool = False  # torch.compile the layers for training: worth its minute in long runs on a GPU
    parallel: str = "auto"  # auto | ddp (a copy on each GPU) | fsdp (weights, gradients, optimizer cut over all GPUs)
    hybrid: bool = False  # fsdp: cut within a node, copies across nodes
    offload: bool = False  # fsdp: weights, gradients and optimizer wait in CPU memory
    resume: bool = False  # go on with the run in out_dir, as if it had never stopped
    check: bool = False  # only look at the task: prompts, draws, lengths, tokens of the run; loads no weights
    plan: bool = False  # only print what the run would need in memory and time; loads no weights
    gpus: int = 0  # --plan: how many; 0 = as many as there are processes
    gpu_memory: float = 80.0  # --plan: GB of each
    gpu_tflops: float = 300.0  # --plan: bfloat16 TFLOP/s that each reaches, about half of what its maker states
    save_every: int = 4  # steps, and batches of sampled queries, after which --resume can go on
    seed: int = 1  # data order, draws and sampling noise are functions of it
    seeds: str = ""  # several runs, such as 1,2,3, into the folders seed-1, seed-2, ... of out_dir
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # of computation: auto | float32 | bfloat16; weights stay float32


# The paper's Table 1. What the authors ran differs: lr warmed up from 0 and decayed, so that 2/4/6 steps were 1/3/5,
# each on the last 8 queries of the 128; the weights of mixtral and llama were bf16.
PAPER = dict(iterations=3, steps="2,4,6", batch_size=128, n=2, lr=5e-7, beta=0.0, temperature=0.0, max_new_tokens=350,
             eval_queries=250, tokens_per_pass=2048)
PRESETS = {
    # for one consumer GPU; planned, not run
    "tldr-small": dict(task="data/tldr", model="HuggingFaceTB/SmolLM2-360M", n=2, batch_size=32, lr=1e-5,
                       temperature=0.7, max_new_tokens=128),
    "stories": dict(task="data/stories", model="roneneldan/TinyStories-33M", n=2, batch_size=32, steps="15", lr=1e-4,
                    beta=0.35, temperature=1.0, max_new_tokens=48, restart=False),
    "hh-mistral-7b": dict(PAPER, task="data/hh", model="mistralai/Mistral-7B-v0.1"),
    "tldr-mistral-7b": dict(PAPER, task="data/tldr", model="mistralai/Mistral-7B-v0.1"),
    "tldr-mixtral-8x7b": dict(PAPER, task="data/tldr", model="mistralai/Mixtral-8x7B-v0.1", optimizer="rmsprop",
                              checkpointing=True),
    # ran: lr 1e-6 with chain of thought (500 new tokens, dropped before training); without it 5e-7, end of text scored
    "principles-llama3-70b": dict(PAPER, task="data/principles", model="meta-llama/Meta-Llama-3-70B", steps="4,8,12",
                                  optimizer="rmsprop", checkpointing=True),
}


class BadInput(Exception):
    """Wrong flags, files or data. One sentence with the fix; exit code 2."""


class RunFailed(Exception):
    """What went wrong while running. One sentence with the fix; exit code 1."""


def need(ok, sentence):
    if not ok:
        raise BadInput(sentence)


def parse(Config, argv, presets={}):
    """`--name=value` flags -> Config; --name alone is True. A preset's values replace defaults, flags replace both."""
    kinds, given = typing.get_type_hints(Config), {}
    if "--help" in argv or "-h" in argv:
        for line in inspect.getsource(Config).splitlines():  # the dataclass is the help text
            if "  # " in line and ": " in line:
                flag, text = line.strip().split("  # ", 1)
                name, default = flag.split(": ", 1)
                print(f"--{name + default[default.index('='):].replace(' ', ''):<36} {text}")
        raise SystemExit(0)
    for arg in argv:
        name, eq, text = arg.removeprefix("--").partition("=")
        need(arg.startswith("--") and name in kinds, f"unknown flag {arg!r}; --help lists the flags")
        need(eq or kinds[name] is bool, f"flag --{name} needs a value: --{name}=...")
        text = text if eq else "True"
        try:
            given[name] = dict(true=True, false=False)[text.lower()] if kinds[name] is bool else kinds[name](text)
        except (ValueError, KeyError):
            kind = {bool: "True or False", int: "a whole number"}.get(kinds[name], "a number")
            raise BadInput(f"--{name}={text} is not {kind}")
    preset = given.get("preset", "")
    need(preset in ("", *presets), f"no preset {preset!r}; there are {', '.join(presets)}")
    return Config(**{**presets.get(preset, {}), **given})


def check(cfg):
    """Raise BadInput for values that cannot work. Returns the number of steps of each iteration."""
    choices = dict(optimizer=("adamw", "rmsprop"), contrast=("two-sided", "constitutions", "responses"),
                   reduce=("mean", "sum"), device=("auto", "cpu", "cuda", "mps"), dtype=("auto", "float32", "bfloat16"),
                   parallel=("auto", "ddp", "fsdp"))
    least = dict(iterations=1, batch_size=1, max_new_tokens=1, tokens_per_pass=1, sample_gb=0, n=2, warmup=0, lr=0,
                 grad_clip=0, beta=0, temperature=0, max_queries=0, eval_queries=0, seed=0, top_p=1e-6,
                 save_every=1, gpus=0, gpu_memory=1e-6, gpu_tflops=1e-6)
    for name, allowed in choices.items():
        need(getattr(cfg, name) in allowed, f"--{name}={getattr(cfg, name)}: choose one of {', '.join(allowed)}")
    for name, low in least.items():
        need(low <= getattr(cfg, name) < math.inf, f"--{name}={getattr(cfg, name)} must be at least {low}")
    need(cfg.top_p <= 1, f"--top_p={cfg.top_p} must be at most 1")
    steps = [int(s) if s.strip().isdigit() else 0 for s in cfg.steps.split(",")]
    steps = steps * cfg.iterations if len(steps) == 1 else steps
    need(len(steps) == cfg.iterations and min(steps) >= 1, f"--steps={cfg.steps} with --iterations={cfg.iterations}: "
         "give one whole number above 0, or one for each iteration such as 2,4,6")
    return steps


def rng(*key):
    """Random numbers as a function of whole numbers such as (seed, iteration, query, purpose), and of nothing else."""
    return np.random.default_rng(key)


# --------------------------------------------------------------------------------------------------------------- task


@dataclass(frozen=True)
class Constitution:
    """One side of each of k principles, in an order. str() is what the model reads."""
    names: tuple  # k principle names
    sides: tuple  # k bools: True = the principle, False = its antithesis
    texts: tuple  # k wordings
    numbered: bool = True

    def __str__(self):
        return "\n".join(f"{i}. {t}" for i, t in enumerate(self.texts, 1)) if self.numbered else " ".join(self.texts)

    def shuffled(self, rng):
        """The same in another order: nothing must hang on the order."""
        order = rng.permutation(len(self.names))
        names, sides, texts = (tuple(f[i] for i in order) for f in (self.names, self.sides, self.texts))
        return Constitution(names, sides, texts, self.numbered)


def as_query(x):
    """What a line gives as its query -> a text, or a list of messages {role, content} of a dialogue; else None."""
    turns = [dict(role="user", content=x)] if isinstance(x, str) else x if isinstance(x, list) else []
    fine = len(turns) % 2 and all(
        isinstance(m, dict) and m.get("role") == role and isinstance(m.get("content"), str) and m["content"].strip()
        for m, role in zip(turns, ["user", "assistant"] * len(turns)))
    return None if not fine else turns if len(turns) > 1 else turns[0]["content"]  # one message is the same as a text


def flat(x):
    """A query as one text, by which it is shown and compared: a dialogue becomes lines such as "user: Hello"."""
    return x if isinstance(x, str) else "\n".join(f"{m['role']}: {m['content']}" for m in x)


TASK_KEYS = dict(about="", chat=False, sampling_prompt="", scoring_prompt="", response_prefix="", answer_after="",
                 turns=["\n\nHuman: ", "\n\nAssistant: "], stop=[], drop_if_contains=[], first_must_end_with="",
                 principles_per_constitution=2, first_always_positive=True, others="independent", numbered=True,
                 principles="principles.json", train="train.jsonl", test="test.jsonl")


class Task:
    """A folder with task.json, principles.json and two files of queries. Every BadInput names the file and the fix."""

    def __init__(self, folder):
        self.path = path = Path(folder) if str(folder).endswith(".json") else Path(folder) / "task.json"
        self.folder = path.parent
        spec = self.read(path, dict)
        for key, value in spec.items():
            need(key in TASK_KEYS, f"{path}: unknown key {key!r}; there are {', '.join(TASK_KEYS)}")
            kind = type(TASK_KEYS[key])
            fine = isinstance(value, kind) and (kind is not list or all(isinstance(v, str) and v for v in value))
            need(fine, f"{path}: {key!r} must be of type {kind.__name__}{' of texts' * (kind is list)}, not {value!r}")
        spec = {**TASK_KEYS, "scoring_prompt": spec.get("sampling_prompt", ""), **spec}
        need(spec["others"] in ("independent", "complement"), f"{path}: 'others' must be independent or complement")
        self.templates = {key: spec.pop(key) for key in ("sampling_prompt", "scoring_prompt")}
        need(len(spec["turns"]) == 2, f"{path}: 'turns' must be two texts, before what the user and the assistant say")
        for key, template in self.templates.items():
            for slot in ("{constitution}", *["{query}"] * (not spec["chat"])):
                need(slot in template, f"{path}: {key!r} has no {slot}; put it where the {slot[1:-1]} belongs")
            need(not spec["chat"] or "{query}" not in template, f"{path}: with 'chat', {key!r} is the system message "
                 "and the query is the user's; remove {query}")
        self.__dict__.update(spec)
        self.principles, self.heldout = [], []  # lists of dicts: name, positive, negative, heldout
        path = self.folder / spec["principles"]
        for i, p in enumerate(self.read(path, list), 1):
            for side in ("positive", "negative"):
                texts = p.get(side) if isinstance(p, dict) else None
                texts = [texts] if isinstance(texts, str) else texts  # one wording or several
                fine = isinstance(texts, list) and texts and all(isinstance(t, str) and t for t in texts)
                need(fine, f"{path}: principle {i} has no {side!r} text; each has a name, a positive side, and its "
                     "antithesis as the negative side")
                p[side] = texts
            names = [q["name"] for q in self.principles + self.heldout]
            fine = p.get("name") and isinstance(p["name"], str) and p["name"] not in names
            need(fine, f"{path}: principle {i} needs a 'name' of its own, not {p.get('name')!r}")
            need(isinstance(p.get("heldout", False), bool), f"{path}: principle {i}: 'heldout' must be true or false")
            (self.heldout if p.get("heldout") else self.principles).append(p)
        need(1 <= self.principles_per_constitution <= len(self.principles), f"{self.path}: "
             f"principles_per_constitution must lie between 1 and the {len(self.principles)} principles to train on")
        self.train, self.test = self.queries(spec["train"]), self.queries(spec["test"])
        both = {flat(q["query"]) for q in self.train} & {flat(q["query"]) for q in self.test}
        need(not both, f"{self.folder}: {min(both, default='')[:60]!r} is in {spec['train']} and in {spec['test']}; "
             "remove it from one of them")

    def read(self, path, kind):
        need(path.is_file(), f"{path} is missing; a task is a folder with task.json, principles.json, two .jsonl files")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise BadInput(f"{path} is not valid JSON: {e}")
        need(isinstance(value, kind), f"{path} must hold a JSON {'object' if kind is dict else 'list'}")
        return value

    def queries(self, name):
        path, rows = self.folder / name, []
        form = '{"query": "..."}'
        need(path.is_file(), f"{path} is missing; run python {self.folder}/prepare.py, or write it: one {form} a line")
        for i, line in enumerate(path.read_bytes().rstrip().split(b"\n"), 1):  # no splitlines(): texts may hold U+2028
            try:
                row = json.loads(line)
                x = as_query(row["query"])
            except (ValueError, KeyError, TypeError):
                x = None
            need(x, f"{path} line {i} is not of the form {form}, with a text or a list of messages {{role, content}} "
                 f"of user and assistant in turn, the user first and last: {line[:60]!r}")
            need(row.get("focus") in (None, *(p["name"] for p in self.principles)),
                 f"{path} line {i}: focus must name a principle that is trained on, not {row.get('focus')!r}")
            rows.append(dict(row, query=x, line=f"{path} line {i}"))
        need(rows, f"{path} holds no queries; write one {form} a line")
        return rows

    def draw(self, rng, n, focus=None, heldout=False):
        """n constitutions on the same k random principles, distinct in the sides they take.

        The first takes positive sides, or random ones; the others random ones ("independent"), or they come in pairs
        of opposites ("complement"). `focus` names a principle of which all but the first take the other side.
        Raises BadInput when there are fewer than n.
        """
        pool, k = self.heldout if heldout else self.principles, self.principles_per_constitution
        most = 2 ** (k - 1) + 1 if focus else 2**k
        need(k <= len(pool), f"{self.path}: a constitution has {k} principles, {len(pool)} are held out")
        need(n <= most, f"{self.path}: {k} principles a constitution make at most {most} different constitutions, and "
             f"n is {n}; lower --n or raise principles_per_constitution")
        chosen = sorted(rng.permutation(len(pool)), key=lambda i: pool[i]["name"] != focus)[:k]  # with the focus first
        sides = []  # n tuples of k bools
        while len(sides) < n:
            new = tuple(bool(b) for b in rng.integers(0, 2, k))
            if not sides and self.first_always_positive:
                new = (True,) * k
            elif self.others == "complement" and len(sides) % 2:
                new = tuple(not s for s in sides[-1])
            elif sides and focus:
                new = (not sides[0][0], *new[1:])
            sides += [new] if new not in sides else []
        wording = lambda p, side: str(rng.choice(p["positive" if side else "negative"]))
        names = tuple(pool[i]["name"] for i in chosen)
        return [Constitution(names, s, tuple(wording(pool[i], side) for i, side in zip(chosen, s)), self.numbered)
                .shuffled(rng) for s in sides]

    def prompt(self, x, c):
        """What comes before a response when it is scored: a text, or with "chat" a list of messages."""
        return self.fill("scoring_prompt", x, c)

    def sampling_prompt(self, x, c):
        """What comes before a response when it is sampled: a text, or with "chat" a list of messages."""
        return self.fill("sampling_prompt", x, c)

    def fill(self, key, x, c):
        first, *more = [dict(role="user", content=x)] if isinstance(x, str) else x
        if self.chat:
            return [dict(role="system", content=self.templates[key].replace("{constitution}", str(c))), first, *more]
        x = first["content"] + "".join(self.turns[m["role"] == "assistant"] + m["content"] for m in more)
        # the query last, since it may itself hold the word {constitution}
        return x.join(part.replace("{constitution}", str(c)) for part in self.templates[key].split("{query}"))

    def clean(self, text):
        """The response proper: behind any reasoning, up to the first stop string, without white space around it."""
        text = self.behind_reasoning(text)
        for s in self.stop:
            text = text.split(s)[0]
        return text.strip()

    def behind_reasoning(self, text):
        """Empty where the reasoning came to no answer."""
        return text.partition(self.answer_after)[2].lstrip() if self.answer_after else text

    def drop(self, texts):
        """Why these n responses to one query are not trained on, or None."""
        if not all(texts):
            return "empty response"
        if len(set(texts)) < len(texts):
            return "identical responses"
        for s in self.drop_if_contains:
            if any(s in t for t in texts):
                return f"contains {s!r}"
        if not texts[0].endswith(self.first_must_end_with):
            return f"first response does not end with {self.first_must_end_with!r}"


def load_task(folder):
    """Folder, or a task's .json file -> Task; raises BadInput with file, line and fix."""
    return Task(folder)


# ---------------------------------------------------------------------------------------------------------- processes

# torchrun tells each process its place; without it there is one
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(k, d)) for k, d in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items())
NODE = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))  # processes on this node


def join(device):
    """Meet the other processes."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def leave():
    """Part from the other processes: one that just ends while they talk may abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def say(*text):
    if RANK == 0:
        print(*text, flush=True)


def total(numbers):
    """Sums over all processes of each of a list of numbers. Nobody goes on before all are there."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(numbers)
    return numbers.tolist()


def gather(mine):
    """A list on each process -> one list of all on each: process r had every WORLD-th item from the r-th on."""
    parts = [mine] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, mine)
    return [x for turn in itertools.zip_longest(*parts) for x in turn if x is not None]


# -------------------------------------------------------------------------------------------------------------- model


def pick_device(cfg):
    """Flags -> (device, compute dtype)."""
    found = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(d for d in found if found[d]) if cfg.device == "auto" else cfg.device
    need(found[name], f"--device={name}: torch sees none on this machine; use --device=cpu")
    need(WORLD == 1 or name != "mps", "several processes need GPUs or CPUs, not mps: start one")
    dtype = ("bfloat16" if name == "cuda" else "float32") if cfg.dtype == "auto" else cfg.dtype
    return torch.device(name, LOCAL_RANK) if name == "cuda" else torch.device(name), getattr(torch, dtype)


def quiet():
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(path):
    """Model folder or hub name -> (config, tokenizer): small files, so that bad input is met before weights load."""
    from transformers import AutoConfig, AutoTokenizer  # slow to import: wrong flags should not wait for it
    quiet()
    owner, _, name = path.rpartition("/")
    hub = name and "/" not in owner and not Path(path).exists() and not (owner and Path(owner).exists())
    need(hub or (Path(path) / "config.json").is_file(),
         f"--model={path} is neither a folder with a config.json nor a hub name such as mistralai/Mistral-7B-v0.1")
    try:
        return AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as e:
        raise BadInput(f"--model={path} cannot be loaded: {' '.join(str(e).split())[:300]}")


def load_model(path, device, fsdp=None):
    """Model folder or hub name -> causal LM with fp32 weights on `device`, cut over all processes where `fsdp` (the
    arguments of fully_shard) says so. Raises BadInput."""
    from transformers import AutoConfig, AutoModelForCausalLM
    if fsdp:
        gc.collect()  # a cut model that nobody needs any more refers to itself
    config = AutoConfig.from_pretrained(path)
    for part in (config, config.get_text_config()):  # dropout would put noise into the contrast
        vars(part).update({name: 0.0 for name, value in vars(part).items() if "drop" in name and type(value) is float})
    # scoring brings its own attention mask, which the fused kernels cannot combine with soft-capped scores
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    how = dict(dtype=torch.float32, attn_implementation="eager" if capped else None)
    model = None
    try:
        if RANK == 0 or not fsdp:
            model = AutoModelForCausalLM.from_pretrained(path, config=config, use_safetensors=True, **how)
    except Exception as e:  # safetensors has kinds of its own
        raise BadInput(f"--model={path} cannot be loaded: {' '.join(str(e).split())[:300]}")
    if fsdp:  # how texts end, and whether input and output share a matrix after all, the weights' folder tells alone
        known = [(model.generation_config, model.get_output_embeddings().weight is model.get_input_embeddings().weight)
                 ] if model else []
        [(generation, config.tie_word_embeddings)] = gather(known)
        model = shard(empty_model(config, **how), model, device, fsdp)
        model.generation_config = generation
    return (model if fsdp else model.to(device)).eval()


def device_of(model):
    """Where it computes; with --offload its weights wait elsewhere."""
    p = next(model.parameters())
    cuda = hasattr(p, "device_mesh") and p.device_mesh.device_type == "cuda"
    return torch.device("cuda", LOCAL_RANK) if cuda else p.device


def blocks(model):
    """The layers that repeat."""
    return [m for m in model.modules() if type(m).__name__ in set(model._no_split_modules or [])]


def fsdp_arguments(cfg, device, dtype):
    """How FSDP2 cuts a model: every process keeps its part of each weight in fp32; the weights of a layer come together
    in `dtype` while it runs, and gradients are summed in fp32."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
    from torch.distributed.tensor import Shard
    shape, names = ((WORLD // NODE, NODE), ("copies", "parts")) if cfg.hybrid else ((WORLD,), ("parts",))
    # 8 experts do not cut into 3 parts, their rows may
    experts = lambda p: Shard(1) if p.ndim == 3 and p.shape[0] % shape[-1] and not p.shape[1] % shape[-1] else None
    return dict(mesh=dist.init_device_mesh(device.type, shape, mesh_dim_names=names), shard_placement_fn=experts,
                mp_policy=MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32,
                                               cast_forward_inputs=False),  # ids need none, and caches no copy
                offload_policy=CPUOffloadPolicy() if cfg.offload else OffloadPolicy())


def shard(model, whole, device, fsdp):
    """A model without memory ("meta") -> cut over all processes, with the weights of `whole`, which process 0 has."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard, register_fsdp_forward_method
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # nothing here writes into what comes out
    for block in blocks(model):
        fully_shard(block, **fsdp)
    fully_shard(model, **fsdp)
    model.shared_logps = types.MethodType(shared_logps, model)
    register_fsdp_forward_method(model, "shared_logps")  # brings the weights together, as it does for forward
    model.to_empty(device="cpu" if isinstance(fsdp["offload_policy"], CPUOffloadPolicy) else device)
    model.tie_weights()
    set_model_state_dict(model, whole.state_dict() if whole else {},
                         options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.named_buffers():  # some, such as rotary frequencies, are in no state dict
        buffer.data = whole.get_buffer(name).to(device) if whole else torch.empty_like(buffer, device=device)
        dist.broadcast(buffer, 0)
    return model


def is_sharded(model):
    return hasattr(model, "set_reshard_after_forward")


@contextlib.contextmanager
def ready_to_sample(model):
    """FSDP: bring all weights together once where they fit. Where they do not, a layer runs only when every process
    takes part: those that have finished sampling run along until the last one has."""
    parts = [m for m in model.modules() if is_sharded(m)]
    device, size = device_of(model), weight_count([model])
    size *= torch.get_autocast_dtype(device.type).itemsize if torch.is_autocast_enabled(device.type) else 4
    if not parts or total([size > sampling_memory(device) / 2]) == [0]:
        for m in parts:
            m.set_reshard_after_forward(False, recurse=False)
            m.unshard()
        yield
        for m in parts:
            m.set_reshard_after_forward(m is not model, recurse=False)
            m.reshard()
    else:
        def working(*_):
            total([1])
        hook = model.register_forward_pre_hook(working, prepend=True)
        yield
        hook.remove()
        while total([0]) != [0]:
            model(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)


def empty_model(config, **how):
    """A model without memory for its weights: shapes and names alone."""
    from transformers import AutoModelForCausalLM
    quiet()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **how)


def weight_count(modules):
    return sum(p.numel() for m in modules for p in m.parameters())


def end_ids(model, tokenizer):
    """The token ids that end a text."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = tokenizer.eos_token_id if ids is None else ids
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def render(tokenizer, messages):
    """Messages -> text, by the model's chat template, up to where its answer begins.

    A template without a system role raises, or leaves the system text out; that then opens the user's first message.
    Raises BadInput where there is no template, or none for these messages."""
    need(tokenizer.chat_template, f"--model={tokenizer.name_or_path} has no chat template; choose a model that was "
         "tuned on chats, or leave out --chat and the task's \"chat\"")
    first, *rest = messages
    joined = [dict(m, content=f"{first['content']}\n\n{m['content']}") for m in rest[:1]] + rest[1:]
    for turns in filter(None, (messages, joined)):
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError:
            continue
        if first["content"].strip() in text:
            return text
    raise BadInput(f"--model={tokenizer.name_or_path}: its chat template cannot take these messages; choose another")


def encode(tokenizer, prompt, prefix=""):
    """Prompt, a text or messages -> ids, with the start token that the model was trained with and no end token; then
    ids of `prefix`. Raises BadInput like render.

    The prefix (the forced opening of a response) is tokenised behind the prompt where that leaves the prompt's own ids
    as they are, for sentencepiece treats the first space of a text apart.
    """
    plain = isinstance(prompt, str)  # a chat template brings its own start token
    prompt = prompt if plain else render(tokenizer, prompt)
    ids = tokenizer(prompt, add_special_tokens=plain).input_ids
    if plain and ids[-1:] == [tokenizer.eos_token_id] != [tokenizer.bos_token_id]:
        ids = ids[:-1]
    both = tokenizer(prompt + prefix, add_special_tokens=plain).input_ids if prefix else ids
    return ids, both[len(ids):] if both[:len(ids)] == ids else tokenizer(prefix, add_special_tokens=False).input_ids


# ----------------------------------------------------------------------------------------------------------- sampling


def pick(logits, temperature, top_p, u):
    """One token a row by inverse CDF: logits (B, V), uniforms u (B,) in (0, 1] -> (B,). Temperature 0 = argmax."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1), None  # (B, V)
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = p * (p.cumsum(-1) - p < top_p)  # the smallest set of tokens that holds top_p
    cdf = p.cumsum(-1)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:])  # (B, 1): the first with cdf >= u > 0 has p > 0
    return (token if order is None else order.gather(1, token))[:, 0]


@torch.no_grad()
def bytes_per_token(model, prompt, max_new_tokens):
    """Memory that a response takes in sampling, for each token of prompt and response: found by running the prompt."""
    device = device_of(model)
    run = lambda ids: model(torch.tensor([ids], device=device), use_cache=True, logits_to_keep=1)
    if device.type == "cuda":
        run(prompt[:1])  # what this makes stays: the weights in bfloat16, those outside of layers together
        torch.cuda.reset_peak_memory_stats(device)
        run(prompt[:1])
        before = torch.cuda.max_memory_allocated(device)  # what any pass takes
    out = run(prompt)
    used = 2 * sum(t.nbytes for layer in out.past_key_values.layers for t in vars(layer).values() if torch.is_tensor(t))
    if device.type == "cuda":  # not only the keys and values
        used = max(used, torch.cuda.max_memory_allocated(device) - before)
    return used / len(prompt) + 32 * out.logits.shape[-1] / (len(prompt) + max_new_tokens)  # and what pick() makes


def sampling_memory(device):
    """Bytes to sample with where nobody says how many."""
    if device.type != "cuda":
        return 4e9
    return 0.8 * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                  - torch.cuda.memory_allocated(device))


@torch.no_grad()
def sample(model, prompts, *, max_new_tokens, temperature, top_p=1.0, eos_ids, seed, stop=None, memory=0, done=None):
    """One response for each prompt: lists of token ids of any lengths -> lists of at most max_new_tokens ids, in order.

    A response that ended by itself keeps its end id. seed: an int, or a tuple of ints for each prompt: the noise of a
    response is a function of that key and not of the batch it is in. stop: function of a response's ids so far, asked
    every 8 tokens: end it? memory: bytes for what runs side by side, 0 = sampling_memory; RunFailed where one response
    needs more. done: called with the number of responses that have just finished.
    """
    if not all(prompts):
        raise ValueError("cannot continue an empty prompt")
    if not prompts:
        return []
    device, responses, config = device_of(model), [[] for _ in prompts], model.config.get_text_config()
    window = min(getattr(config, name, None) or math.inf for name in ("sliding_window", "window_size"))
    keys = [(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else seed
    # similar lengths side by side for little or no padding; the longest first, so that memory runs out at once or never
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
    each = bytes_per_token(model, prompts[order[0]], max_new_tokens)
    memory = memory or sampling_memory(device)
    while order:
        one = each * (len(prompts[order[0]]) + max_new_tokens)
        if one > memory:
            raise RunFailed(f"sampling one response of {max_new_tokens} tokens to a prompt of {len(prompts[order[0]])} "
                            f"takes {one / 1e9:.2g} GB, and there are {memory / 1e9:.2g}: raise --sample_gb, or lower "
                            "--max_new_tokens")
        rows, order = order[:int(memory / one)], order[int(memory / one):]  # the largest batch that fits
        distinct = sorted({tuple(prompts[i]) for i in rows})
        place = {p: k for k, p in enumerate(distinct)}
        index = torch.tensor([place[tuple(prompts[i])] for i in rows], device=device)  # (B,)
        short, width = min(map(len, distinct)), max(map(len, distinct))
        # run once what all prompts of the batch begin with, then once the rest of each distinct prompt; padding then
        # stands between the two, where a sliding window would count it
        shared, cache = min(len(os.path.commonprefix(distinct)), short - 1), None
        if shared >= 16 and len(distinct) > 1 and (short == width or width + max_new_tokens <= window):
            ids = torch.tensor([distinct[0][:shared]], device=device)
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_select_indices(torch.zeros_like(index)[:1].repeat(len(distinct)))
        else:
            shared = 0
        ids = torch.tensor([[0] * (width - len(p)) + list(p[shared:]) for p in distinct], device=device)  # left padding
        layout, mask = {}, None
        if short < width:  # equal lengths need no mask, and attention is faster without
            mask = torch.tensor([[1] * shared + [0] * (width - len(p)) + [1] * (len(p) - shared) for p in distinct],
                                device=device)  # (D, width)
            layout = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, shared:])
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **layout)
        cache, logits, mask = out.past_key_values, out.logits[index, -1], None if mask is None else mask[index]
        cache.batch_select_indices(index)  # from one row a distinct prompt to one row a response
        u = np.stack([rng(*keys[i]).random(max_new_tokens, dtype=np.float32) for i in rows])
        u = 1 - torch.tensor(u, device=device)  # (B, max_new_tokens) in (0, 1]
        running = list(rows)  # row b of the batch is the response to prompt running[b], or None when that has finished
        for t in range(max_new_tokens):
            token = pick(logits, temperature, top_p, u[:, t])  # (B,)
            for b, (i, k) in enumerate(zip(running, token.tolist())):
                if i is not None:
                    responses[i].append(k)
                    if k in eos_ids or t + 1 == max_new_tokens or stop and t % 8 == 7 and stop(responses[i]):
                        running[b] = None
                        done and done(1)
            keep = [b for b, i in enumerate(running) if i is not None]
            if not keep:
                break
            if len(keep) < 0.75 * len(running):  # dropping rows copies the cache, so let a quarter of them finish first
                running, keep = [running[b] for b in keep], torch.tensor(keep, device=device)
                cache.batch_select_indices(keep)
                token, u, mask = token[keep], u[keep], None if mask is None else mask[keep]
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=1)
                layout = dict(attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1)
            logits = model(token[:, None], past_key_values=cache, use_cache=True, **layout).logits[:, -1]
    return responses


# ------------------------------------------------------------------------------------------------------ the objective


class HeadLogps(torch.autograd.Function):
    """log softmax(cap * tanh(scale * (h W' + b) / cap)) at given tokens, with few rows of the (K, V) logits at a time.

    h (K, D), w (V, D), b (V,) or None, target (K,) -> (K,) fp32, nats. Backward computes the logits again, since what a
    token weighs in the loss is known only once the whole matrix is. The gradient of w accumulates in fp32.
    """

    @staticmethod
    def logits(h, w, b, scale, cap):
        z = (h @ w.to(h.dtype).T).float()  # (k, V)
        z = z if b is None else z + b
        z = z if scale == 1 else z * scale
        return cap * torch.tanh(z / cap) if cap else z

    @staticmethod
    def forward(ctx, h, w, b, target, scale, cap):
        ctx.chunks, ctx.scale, ctx.cap = range(0, len(h), max(1, 2**22 // len(w))), scale, cap  # 16 MB of logits each
        norm, logp = h.new_empty(2, len(h), dtype=torch.float32)
        for part in (slice(s, s + ctx.chunks.step) for s in ctx.chunks):
            z = HeadLogps.logits(h[part], w, b, scale, cap)
            norm[part] = z.logsumexp(-1)
            logp[part] = z.gather(1, target[part, None])[:, 0] - norm[part]
        ctx.save_for_backward(h, w, b, target, norm)
        return logp

    @staticmethod
    def backward(ctx, grad):
        h, w, b, target, norm = ctx.saved_tensors
        dh, dw = torch.empty_like(h), torch.zeros_like(w, dtype=torch.float32)
        db = None if b is None else torch.zeros_like(b)
        for part in (slice(s, s + ctx.chunks.step) for s in ctx.chunks):
            z = HeadLogps.logits(h[part], w, b, ctx.scale, ctx.cap)
            slope = 1 - (z / ctx.cap) ** 2 if ctx.cap else 1
            dz = z.sub_(norm[part, None]).exp_().mul_(-grad[part, None])  # d logp / d z = onehot(target) - softmax(z)
            dz.scatter_add_(1, target[part, None], grad[part, None])
            dz = dz if ctx.scale == 1 and not ctx.cap else dz * slope * ctx.scale
            db = db if b is None else db + dz.sum(0)
            dz = dz.to(h.dtype)
            dh[part] = dz @ w.to(h.dtype)
            dw.addmm_(dz.T, h[part]) if h.dtype == dw.dtype else dw.add_(dz.T @ h[part])
        return dh, dw.to(w.dtype), db, None, None, None


def sibling_mask(config, segment, position):
    """Additive attention mask (B, 1, S, S): a token sees its prompt and its own response up to itself.

    segment (B, S): 0 = prompt, j = j-th response, -1 = padding. A model adds nothing to a mask it is given, so sliding
    windows are built in, over positions and not places in the row; models that mix layers take a mask for each kind.
    """
    kinds = set(getattr(config, "layer_types", None) or [])
    strange = kinds - {"full_attention", "sliding_attention"} | {"window_size"} & set(vars(config))
    if strange:  # seen only in texts longer than the window, so a comparison on short ones would not tell
        raise NotImplementedError(f"it has layers with {min(strange)}")
    window = getattr(config, "sliding_window", None)
    declared = "sliding_window" in inspect.signature(type(config)).parameters  # else carried along and never read
    if not declared or kinds == {"full_attention"} or not getattr(config, "use_sliding_window", True):
        window = None
    same = (segment[:, :, None] == segment[:, None, :]) | (segment == 0)[:, None, :]  # (B, S, S)
    full = same & torch.ones_like(same).tril()
    near = full & (position[:, :, None] - position[:, None, :] < window) if window else full
    full, near = (torch.zeros(m.shape, device=m.device).masked_fill(~m, torch.finfo(torch.float32).min)[:, None]
                  for m in (full, near))
    return {"full_attention": full, "sliding_attention": near} if len(kinds) > 1 else near


def shared_logps(model, prompts, siblings):
    """Row b holds prompt b and, side by side behind it, its responses, each at the positions right after the prompt and
    blind to the others: a prompt runs once, not n times. -> log-prob of every response token in order, (K,) nats."""
    config, device = model.config.get_text_config(), device_of(model)
    width = max(len(p) + sum(len(y) - 1 for y in ys) for p, ys in zip(prompts, siblings))
    width += -width % 8 if max(map(len, siblings)) > 1 else 0  # attention with a mask likes multiples of 8
    ids, segment, position, source, target = [], [], [], [], []
    for b, (p, ys) in enumerate(zip(prompts, siblings)):
        row, seg, pos = list(p), [0] * len(p), list(range(len(p)))
        for j, y in enumerate(ys, 1):
            # the prompt's last token predicts the first of every response, and a response's last token predicts nothing
            source += [b * width + len(p) - 1, *range(b * width + len(row), b * width + len(row) + len(y) - 1)]
            target += y
            row, seg, pos = row + y[:-1], seg + [j] * (len(y) - 1), pos + list(range(len(p), len(p) + len(y) - 1))
        pad = width - len(row)
        ids, segment, position = ids + [row + [0] * pad], segment + [seg + [-1] * pad], position + [pos + [0] * pad]
    ids, segment, position, source, target = (torch.tensor(x, device=device)
                                              for x in (ids, segment, position, source, target))
    layout = {}  # one response a row: causal attention and padding on the right need no mask
    if max(map(len, siblings)) > 1:
        layout = dict(attention_mask=sibling_mask(config, segment, position), position_ids=position)
    hidden = model.base_model(ids, use_cache=False, **layout).last_hidden_state  # (B, S, D)
    if torch.is_autocast_enabled(device.type):  # backward runs outside of autocast and must see the same logits
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:  # an adapter's share of the logits would be lost
        raise NotImplementedError("its output head is no plain linear layer")
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    # only the predicting positions reach the vocabulary
    return HeadLogps.apply(hidden.flatten(0, 1)[source], head.weight, head.bias, target, scale,
                           getattr(config, "final_logit_softcapping", None))


def sharing(model):
    """shared_logps of this model: a cut one has its own, which brings its weights together."""
    return getattr(model, "shared_logps", functools.partial(shared_logps, model))


def plain_logps(model, prompts, siblings):
    """The same with a row for each pair and the model's own logits: for every causal LM, at n times the cost."""
    rows = [(list(p), y) for p, ys in zip(prompts, siblings) for y in ys]
    width = max(len(p) + len(y) for p, y in rows)
    ids = torch.tensor([p + y + [0] * (width - len(p + y)) for p, y in rows], device=device_of(model))
    logp = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return torch.cat([logp[b, len(p) - 1:len(p + y) - 1] for b, (p, y) in enumerate(rows)])


@torch.no_grad()
def can_share(model, prompts, siblings):
    """Does sharing prompts give what plain scoring gives? Not where a layer does not heed the mask (ALiBi, convolution,
    chunked or linear attention), nor with an adapter on the output head."""
    kind = device_of(model).type
    half = is_sharded(model) and torch.is_autocast_enabled(kind)  # cut weights come together in bfloat16 in any case
    with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=half):
        plain = plain_logps(model, prompts, siblings)
        try:
            off = (sharing(model)(prompts, siblings) - plain).abs()
            worst = (off.mean() if half else off.max()).item()  # bfloat16 alone puts single tokens far off
            why = f"log-probs off by {worst:.1g}"
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            worst, why = math.inf, str(e).split("\n")[0] or type(e).__name__
    limit = (5e-3 if half else 1e-4) * (1 + plain.abs().max().item())
    works = total([worst >= limit]) == [0]  # for all processes alike
    if not works:
        say(f"scoring every pair apart: responses cannot share a prompt in this architecture ({why})")
    return works


def score(model, prompts, siblings):
    """log pi of every response token: prompts[b] with each of siblings[b] behind it -> lists of lists of (len(y),).

    All are lists of token ids, none empty (ValueError). The first call on a model compares shared with plain scoring.
    """
    if not (all(prompts) and all(y for ys in siblings for y in ys)):
        raise ValueError("cannot score an empty prompt or an empty response")
    several = max(map(len, siblings)) > 1
    known = model.__dict__.setdefault("can_share", {})  # with one response a prompt, and with several
    if several not in known:
        known[several] = can_share(model, prompts[-2:], siblings[-2:])
    logps = sharing(model)(prompts, siblings) if known[several] else plain_logps(model, prompts, siblings)
    parts = iter(logps.split([len(y) for ys in siblings for y in ys]))
    return [[next(parts) for _ in ys] for ys in siblings]


def response_logps(model, prompts, responses):
    """log pi of each response under the prompt of the same place: lists of ids -> list of (len(response),), nats."""
    return [row[0] for row in score(model, prompts, [[y] for y in responses])]


def as_matrix(cells, reduce):
    """n lists of n tensors of token log-probs -> (n, n) nats."""
    # the mean keeps a long response from outweighing a short one, as the authors do; only sums are true log-probs
    return torch.stack([torch.stack([t.mean() if reduce == "mean" else t.sum() for t in row]) for row in cells])


def logp_matrix(model, prompts, responses, reduce="mean"):
    """Every response under every prompt: lists of ids -> (n, n) nats, rows i = prompts, columns j = responses."""
    return as_matrix(score(model, prompts, [responses] * len(prompts)), reduce)


def sami_loss(logp, contrast="two-sided"):
    """(n, n) log-probs -> scalar, nats: log n at chance, 0 at best. log n - loss is the objective of paper Eq. 2."""
    target = torch.arange(len(logp), device=logp.device)  # the diagonal
    row = F.cross_entropy(logp, target)  # contrast over responses: each row sums to 1
    col = F.cross_entropy(logp.T, target)  # contrast over constitutions: each column sums to 1
    return {"two-sided": (row + col) / 2, "constitutions": col, "responses": row}[contrast]


def infonce(logp_sum):
    """(n, n) *summed* log-probs -> lower bound on I(Y; C | x), nats, at most log n. Paper: Eq. 1."""
    return math.log(len(logp_sum)) - sami_loss(logp_sum, "constitutions")


def kl_to_base(logp, base_logp):
    """Token log-probs under policy and base -> KL estimate of each token, nats: r - 1 - log r with r = base / policy
    (Schulman's k3). 0 where they agree and never negative; it needs the base's log-prob of the sampled token only."""
    log_r = base_logp - logp
    return log_r.exp() - 1 - log_r


# --------------------------------------------------------------------------------------------------------- the update

DRAW, ORDER, NOISE = 1, 2, 3  # what random numbers are for: part of their key (0 at its end would change nothing)


def compute(device, dtype):
    """Matrix products in `dtype`; the weights stay fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def answer(model, tokenizer, task, pairs, cfg, keys, temperature, desc=None):
    """Sample a response to each (query, constitution) -> dicts: prompt ids, response ids (as scored), text, ended."""
    eos_ids, texts = end_ids(model, tokenizer), [task.sampling_prompt(x, c) for x, c in pairs]
    encoded = [encode(tokenizer, t, task.response_prefix) for t in texts]
    stopped = lambda ids: any(s in task.behind_reasoning(tokenizer.decode(ids)) for s in task.stop)
    bar = tqdm(total=len(pairs), desc=desc, unit="response", leave=False, disable=RANK > 0 or None)
    with bar, ready_to_sample(model):
        sampled = sample(model, [p + prefix for p, prefix in encoded], max_new_tokens=cfg.max_new_tokens, seed=keys,
                         temperature=temperature, top_p=cfg.top_p, eos_ids=eos_ids, memory=cfg.sample_gb * 1e9,
                         stop=stopped if task.stop else None, done=bar.update)
    answers = []
    for (prompt, prefix), ids in zip(encoded, sampled):
        ended = ids[-1] in eos_ids
        whole = body = prefix + (ids[:-1] if ended else ids)
        text = task.clean(tokenizer.decode(body))
        while task.answer_after and body and text in tokenizer.decode(body[1:]):
            body = body[1:]  # the reasoning is not trained on
        # the fewest ids that spell the text: a token may hold the end of a response and the start of a stop string
        while body and tokenizer.decode(body[:-1]).lstrip().startswith(text):
            body = body[:-1]
        if cfg.score_eos and ended and body == whole:
            body = body + ids[-1:]
        answers.append(dict(prompt=prompt, response=body, text=text, ended=ended))
    return answers


def sample_queries(model, tokenizer, task, queries, cfg, iteration, temperature, desc):
    """Draw n constitutions for each query and sample a response under each -> examples (dicts), not yet filtered.

    queries: (number, query) pairs; draws and noise are functions of (cfg.seed, iteration, number). Each process samples
    its share; all get the examples of all."""
    queries = queries[RANK::WORLD]
    drawn = [task.draw(rng(cfg.seed, iteration, i, DRAW), cfg.n, q.get("focus")) for i, q in queries]
    pairs = [(q["query"], c) for (_, q), cs in zip(queries, drawn) for c in cs]
    keys = [(cfg.seed, iteration, i, NOISE, j) for i, _ in queries for j in range(cfg.n)]
    answers, examples = answer(model, tokenizer, task, pairs, cfg, keys, temperature, desc), []
    for (i, q), cs in zip(queries, drawn):
        mine, answers, orders = answers[:cfg.n], answers[cfg.n:], rng(cfg.seed, iteration, i, ORDER)
        examples.append(dict(
            number=i, query=q["query"], constitutions=[str(c) for c in cs],
            sides=[dict(zip(c.names, c.sides)) for c in cs], responses=[a["text"] for a in mine],
            dropped=task.drop([a["text"] for a in mine]), ids=[a["response"] for a in mine],
            # the order of principles is drawn anew for scoring, as in the paper
            prompts=[encode(tokenizer, task.prompt(q["query"], c.shuffled(orders)))[0] for c in cs]))
    return gather(examples)


def collect(model, tokenizer, task, cfg, iteration, wanted, examples=(), keep=lambda examples: None):
    """Sample this iteration's half of the training queries until `wanted` pass the filters, or all are sampled.
    `examples` are those there are; keep(examples) is called after every cfg.save_every batches."""
    total = min(cfg.max_queries or len(task.train), len(task.train))
    half = np.arange((iteration - 1) % 2, total, 2)  # not the half that the sampling model was trained on
    todo, examples = rng(cfg.seed, iteration).permutation(half).tolist()[len(examples):], list(examples)
    while todo and (missing := wanted - sum(e["dropped"] is None for e in examples)) > 0:
        count = min(max(missing, cfg.batch_size), cfg.save_every * cfg.batch_size)
        now, todo = todo[:count], todo[count:]
        examples += sample_queries(model, tokenizer, task, [(i, task.train[i]) for i in now], cfg, iteration,
                                   cfg.temperature, f"iteration {iteration}: sampling")
        keep(examples)
    return examples


def passes(examples, cfg):
    """Deal examples out to the processes, and cut each share into scoring passes of at most cfg.tokens_per_pass tokens,
    padding included -> list of (examples, weight) for this process. All get equally many, since each takes part in what
    the others do to weights and gradients: one that runs out goes through an example of weight 0."""
    width = lambda e: max(map(len, e["prompts"])) + sum(map(len, e["ids"]))
    examples, shares = sorted(examples, key=width), []
    for r in range(WORLD):
        shares.append([])
        for e in examples[r::WORLD]:
            if not shares[r] or (len(shares[r][-1]) + 1) * cfg.n * width(e) > cfg.tokens_per_pass:
                shares[r].append([])
            shares[r][-1].append(e)
    spare = max(map(len, shares)) - len(shares[RANK])
    return [(group, 1) for group in shares[RANK]] + [(examples[:1], 0)] * spare


def score_examples(model, examples):
    """-> for each example n lists of n tensors: token log-probs of every response under every constitution."""
    prompts, siblings = zip(*[(p, e["ids"]) for e in examples for p in e["prompts"]])
    rows = iter(score(model, prompts, siblings))
    return [[next(rows) for _ in e["prompts"]] for e in examples]


def all_tokens(cells):
    return torch.cat([t for row in cells for t in row])


@torch.no_grad()
def add_base_logps(base, examples, cfg, device, dtype):
    """Keep the base's log-probs of all that will be scored: the KL then needs no second model in memory."""
    for start in range(0, len(examples), cfg.batch_size):  # dealt out as the steps will be
        for group, _ in passes(examples[start:start + cfg.batch_size], cfg):
            with compute(device, dtype):
                for e, cells in zip(group, score_examples(base, group)):
                    e["base_logps"] = all_tokens(cells)


def measures(logp):
    """What is logged of one query's matrix (n, n): were the diagonal entries the largest of their rows and columns?"""
    hit = torch.arange(len(logp), device=logp.device)
    row, col = ((logp.argmax(dim) == hit).float().mean() for dim in (1, 0))
    return dict(row_accuracy=row, col_accuracy=col, diagonal=logp.diag().mean())


def train(model, examples, steps, cfg, device, dtype, report, state=None):
    """Train `model` in place: `steps` steps of cfg.batch_size examples, in order. report(step, numbers, optimizer)
    after each. state: (steps that were done, folder of their weights and optimizer)."""
    if is_sharded(model):
        model.reshard()  # scoring leaves what is outside of the layers together, and those are not the weights to train
        gc.collect()
    params = [p for p in model.parameters() if p.requires_grad]
    if cfg.checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.train()  # transformers heeds it in this mode only
    for block in blocks(model) if cfg.compile else []:
        block.compile(dynamic=True)
    # foreach=False: the default makes temporaries as large as the model
    optimizer = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[cfg.optimizer](params, foreach=False)
    done, folder = state or (0, None)
    if done:
        load_weights(folder, model, optimizer)
    for step in range(done, steps):
        started, tokens, logged = time.time(), 0, {}
        batch = examples[step * cfg.batch_size:(step + 1) * cfg.batch_size]
        for group, weight in passes(batch, cfg):
            with compute(device, dtype):
                scored = score_examples(model, group)
            objective = 0
            for e, cells in zip(group, scored):
                logp = as_matrix(cells, cfg.reduce)  # (n, n)
                kl = kl_to_base(all_tokens(cells), e["base_logps"]).mean() if cfg.beta else torch.zeros(())
                loss = sami_loss(logp, cfg.contrast) + cfg.beta * kl
                objective = objective + loss * weight / len(batch)  # the batch's mean, however it is cut and dealt out
                for name, value in dict(loss=loss, kl=kl, **measures(logp.detach())).items():
                    logged[name] = logged.get(name, 0) + float(value.detach()) * weight / len(batch)
                tokens += weight * (sum(map(len, e["prompts"])) + cfg.n * sum(map(len, e["ids"])))
            (objective * (WORLD if is_sharded(model) else 1)).backward()  # FSDP's mean over processes -> their sum
        for p in params if WORLD > 1 and not is_sharded(model) else []:  # as DDP does, but once a step and not a pass
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        *values, tokens = total([*logged.values(), tokens])
        logged = dict(zip(logged, values))
        norm = torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf, foreach=False)
        norm = float(norm.full_tensor() if is_sharded(model) else norm)
        if not math.isfinite(logged["loss"] + norm):  # before such a step spoils the weights
            raise RunFailed(f"step {step + 1} has loss {logged['loss']} and gradient norm {norm}: lower --lr, now "
                            f"{cfg.lr}, or set --warmup or --grad_clip; finished iterations are kept")
        before = [seen(p, dtype) for p in params]
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup))
        optimizer.step()
        optimizer.zero_grad()
        changed = torch.cat([seen(p, dtype) != old for p, old in zip(params, before)])
        changed, count = total([int(changed.sum()), len(changed)])
        report(step, dict(logged, grad_norm=norm, changed=changed / count,
                          tokens_per_second=tokens / (time.time() - started)), optimizer)
    model.eval()
    for block in blocks(model):
        block._compiled_call_impl = None  # sampling changes shapes with every token


def seen(p, dtype):
    """Some thousand entries of a weight as the forward pass sees them: what rounds to nothing there has not changed."""
    p = (p.to_local() if hasattr(p, "to_local") else p).detach()  # of a cut weight this process's part
    return p.flatten()[::max(1, p.numel() // 4096)].to(dtype, copy=True)


@torch.no_grad()
def heldout_information(model, tokenizer, task, cfg, device, dtype):
    """infonce (summed log-probs of responses sampled at temperature 1), row and column accuracy on test queries.

    Draws and noise depend on the seed alone, so that iterations differ by the model. -> means, standard errors under
    <name>_se, infonce_cap = log n, and the scored examples."""
    queries = list(enumerate(task.test[:cfg.eval_queries]))
    with compute(device, dtype):
        everything = dataclasses.replace(cfg, top_p=1.0)
        examples = sample_queries(model, tokenizer, task, queries, everything, 0, 1.0, "held-out queries")
        examples = [e for e in examples if all(e["ids"])]
        if not examples:
            raise RunFailed(f"every held-out response is empty: does --model={cfg.model} end its text right behind the "
                            f"prompts of {task.path}, or has no room in --max_new_tokens?")
        scored = {}
        for group, weight in passes(examples, cfg):
            for e, cells in list(zip(group, score_examples(model, group)))[:len(group) * weight]:
                logp = as_matrix(cells, cfg.reduce)
                numbers = dict(infonce=infonce(as_matrix(cells, "sum")), **measures(logp))
                scored[e["number"]] = dict(logp=logp.cpu(), measures={k: float(v) for k, v in numbers.items()})
        scored = {number: found for part in gather([scored]) for number, found in part.items()}
        examples = [dict(e, **scored[e["number"]]) for e in examples]
    out = dict(infonce_cap=math.log(cfg.n), examples=examples)
    for name in examples[0]["measures"]:
        values = [e["measures"][name] for e in examples]
        out[name] = float(np.mean(values))
        out[name + "_se"] = float(np.std(values, ddof=len(values) > 1) / len(values)**.5)
    return out


# ------------------------------------------------------------------------------------------------------- before a run

# what --plan needs to know of the presets' models, without a download: kind, and what differs from its usual values
SHAPES = {
    "mistralai/Mistral-7B-v0.1": ("mistral", {}),
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", {}),
    "meta-llama/Meta-Llama-3-70B": ("llama", dict(vocab_size=128256, hidden_size=8192, intermediate_size=28672,
                                                  num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)),
    "HuggingFaceTB/SmolLM2-360M": ("llama", dict(vocab_size=49152, hidden_size=960, intermediate_size=2560,
                                                 num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5,
                                                 tie_word_embeddings=True)),
    "roneneldan/TinyStories-33M": ("gpt_neo", dict(hidden_size=768, num_layers=4, attention_types=[
                                       [["global", "local"], 2]])),
}


def memory(cfg, model, dtype, parts):
    """Bytes on each GPU in training, with the (empty) model cut into `parts`, 1 = whole -> {what: bytes}."""
    text, half = model.config.get_text_config(), dtype != torch.float32
    size, layers = weight_count([model]), blocks(model) or [model]
    experts = getattr(text, "num_experts_per_tok", None) or 1
    wide = experts * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    # bytes that a layer keeps of a token for the backward pass, linear in both widths: fitted to saved_tensors_hooks
    a, b = (37, 16) if not half else (35, 8.5) if parts == 1 else (23, 8.2)
    layer, between = a * text.hidden_size + b * wide, (2 if half and parts > 1 else 4) * text.hidden_size
    kept = len(layers) * between + layer if cfg.checkpointing else len(layers) * layer
    kept += (2 if half else 4) * (2 * text.hidden_size + 3 * wide)  # gradients within the layer that backward is in
    # a bfloat16 copy of all; or two layers and what is outside of layers, with their gradients
    together = 2 * weight_count(layers[:1]) + size - weight_count(layers)
    return {"weights": 4 * size / parts, "gradients": 4 * size / parts,
            f"optimizer ({cfg.optimizer})": (8 if cfg.optimizer == "adamw" else 4) * size / parts,
            "weights at work": 2 * (2 if half else 4) * together if parts > 1 else 2 * size * half,
            "activations": cfg.tokens_per_pass * kept}


def pick_parallel(cfg, config, device, dtype):
    """Nothing for one process; ddp where all that training holds fits one GPU; else fsdp."""
    if WORLD == 1 or cfg.parallel != "auto":
        return "none" if WORLD == 1 else cfg.parallel
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    fits = sum(memory(cfg, empty_model(config), dtype, 1).values()) < 0.95 * room
    return "fsdp" if total([not fits]) != [0] else "ddp"  # the same on all, whatever their GPUs


def plan(cfg, task, steps):
    """Print what a run needs on each GPU and about how long it takes. Arithmetic: loads no weights, needs no GPU."""
    if cfg.model in SHAPES:  # no tokenizer without a download: a token has about four letters
        from transformers import AutoConfig
        kind, values = SHAPES[cfg.model]
        config, count = AutoConfig.for_model(kind, **values), lambda prompt: len(flat(prompt)) / 4
    else:
        config, tokenizer = load_tokenizer(cfg.model)
        count = lambda prompt: len(encode(tokenizer, prompt)[0])
    model, text, gpus, room = empty_model(config), config.get_text_config(), cfg.gpus or WORLD, 0.95e9 * cfg.gpu_memory
    dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
    size, experts = weight_count([model]), sum(p.numel() for p in model.parameters() if p.ndim == 3)
    active = size - experts * (1 - (getattr(text, "num_experts_per_tok", 1) / getattr(text, "num_local_experts", 1)))
    ways = dict(ddp=memory(cfg, model, dtype, 1), fsdp=memory(cfg, model, dtype, gpus))
    if gpus == 1:
        del ways["fsdp"]
    print(f"{cfg.model}: {size / 1e9:.3g}B weights on {gpus} x {cfg.gpu_memory:g} GB, computing in {str(dtype)[6:]}\n"
          f"{'GB on each GPU':<22}" + "".join(f"{way if gpus > 1 else 'whole':>8}" for way in ways))
    for name in [*ways["ddp"], "all"]:
        print(f"  {name:<20}" + "".join(f"{w.get(name, sum(w.values())) / 1e9:8.1f}" for w in ways.values()))
    way = next((way for way, parts in ways.items() if sum(parts.values()) < room), None)
    enough = next((g for g in range(2, 1025) if sum(memory(cfg, model, dtype, g).values()) < room), None)
    print("fits" + f", as {way}" * (gpus > 1) if way else f"does not fit; {enough or 'no number of'} such GPUs would do"
          + (": lower --tokens_per_pass" + ", or add --checkpointing" * (not cfg.checkpointing)) * (not enough))

    kv = 2 * len(blocks(model)) * text.hidden_size * dtype.itemsize  # bytes of keys and values of a token
    kv *= (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) / text.num_attention_heads
    c, queries = task.draw(rng(cfg.seed), 1)[0], task.train[:100]
    sampled, scored = (float(np.mean([count(f(q["query"], c)) for q in queries]))
                       for f in (task.sampling_prompt, task.prompt))
    left = room - 4 * size / (1 if way == "ddp" else gpus)
    whole = left > 2 * size * dtype.itemsize  # the weights that sampling computes with, and as much for what it keeps
    batch = int((left - size * dtype.itemsize * whole) / 2 / kv / (sampled + cfg.max_new_tokens))
    print(f"sampling: {kv / 1e3:.3g} kB of keys and values a token, up to {max(0, batch)} responses side by side on "
          f"each GPU, weights {'whole' if whole else 'cut, all processes in step'}")
    for iteration, count in enumerate(steps, 1):
        responses = count * cfg.batch_size * cfg.n
        trained = responses * (scored + cfg.n * cfg.max_new_tokens)
        work = 2 * active * responses * sampled + active * trained * (6 + 2 * cfg.checkpointing + 2 * (cfg.beta > 0))
        rounds = math.ceil(responses / gpus / max(1, batch)) * cfg.max_new_tokens  # a token takes a millisecond a layer
        pause = 1e-3 * len(blocks(model)) + (0 if whole else size * dtype.itemsize / 1e11)  # and sending cut weights
        seconds = work / gpus / cfg.gpu_tflops / 1e12 + rounds * pause
        print(f"iteration {iteration}: {responses} responses of up to {cfg.max_new_tokens} tokens to prompts of about "
              f"{sampled:.0f}, {trained / 1e6:.2f}M tokens a pass over them; about {math.ceil(seconds / 60)} min")


def check_lengths(task, config, tokenizer, cfg):
    """Meet a prompt that is too long before any weights load. -> tokens of the longest prompt, and the context."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    texts = sorted((max(p["positive"] + p["negative"], key=len) for p in task.principles), key=len)
    c = Constitution((), (), texts[-task.principles_per_constitution:], task.numbered)
    lengths = {max(len(sum(encode(tokenizer, f(q["query"], c), task.response_prefix), []))
                   for f in (task.prompt, task.sampling_prompt)): q["line"]
               for q in sorted(task.train + task.test, key=lambda q: -len(flat(q["query"])))[:20]}
    longest = max(lengths)
    need(longest + cfg.max_new_tokens <= limit, f"{lengths[longest]}: its prompt has up to {longest} tokens, which "
         f"with --max_new_tokens={cfg.max_new_tokens} is more than the model's context of {limit}; shorten the query")
    return longest, limit


def check_task(task, tokenizer, cfg, steps, longest, limit):
    """Print what a run would read and cost. steps: of each iteration; longest prompt and limit of context: tokens."""
    some = list(enumerate(task.train))[::len(task.train) // 500 + 1]  # enough for a mean
    drawn = [task.draw(rng(cfg.seed, 1, i, DRAW), cfg.n, q.get("focus")) for i, q in some]
    sampling, scoring = ([encode(tokenizer, f(q["query"], cs[0]), prefix) for (_, q), cs in zip(some, drawn)]
                         for f, prefix in ((task.sampling_prompt, task.response_prefix), (task.prompt, "")))
    for name, prompts in dict(sampling=sampling, scoring=scoring).items():
        print(f"--- a {name} prompt, as the model reads it (mean of {len(some)} training queries: "
              f"{np.mean([len(p + y) for p, y in prompts]):.0f} tokens)\n{tokenizer.decode(sum(prompts[0], []))}")
    print(f"--- the {cfg.n} constitutions of this query")
    for j, c in enumerate(drawn[0], 1):
        print(f"c_{j}: {', '.join('not ' * (not side) + name for name, side in zip(c.names, c.sides))}\n{c}")
    words = dict(answer_after="a response starts behind", stop="a response ends before any of",
                 drop_if_contains="a query is dropped if a response contains any of",
                 first_must_end_with="a query is dropped unless its first response ends with")
    print("--- a query is dropped if a response is empty or two are the same",
          *[f"{words[key]} {value!r}" for key in words if (value := getattr(task, key))], sep="\n")
    print(f"--- the longest prompt has {longest} tokens; it and --max_new_tokens fit the model's context of {limit}")
    total, y = min(cfg.max_queries or math.inf, len(task.train)), len(sampling[0][1]) + cfg.max_new_tokens
    train = sum(min(k * cfg.batch_size, len(range(i % 2, total, 2))) for i, k in enumerate(steps))  # of one half each
    held = (cfg.iterations + 1) * min(cfg.eval_queries, len(task.test))
    rows = (train + held) * cfg.n  # prompts, each scored with n responses behind it
    print(f"--- a run samples for {train:,} queries to train on (more if some are dropped) and {held:,} held-out ones: "
          f"{rows:,} responses,\nat most {rows * cfg.max_new_tokens:,} tokens; it scores about "
          f"{rows * (np.mean([len(p) for p, _ in scoring]) + cfg.n * y):,.0f} tokens if they are all so long")


# -------------------------------------------------------------------------------------------------- checkpoints, main


def write(path, text):
    """All of a file or nothing of it: written under a temporary name, then renamed."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    Path(f"{path}.tmp").replace(path)


def digests(folder):
    """{file name: SHA-256} of a folder; each process reads its share."""
    def sha256(path):
        try:
            with open(path, "rb") as f:
                return hashlib.file_digest(f, "sha256").hexdigest()
        except OSError:  # not raised: the other processes wait for an answer
            return None

    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name != "sha256.json")
    return dict(gather([(str(p.relative_to(folder)), sha256(p)) for p in files[RANK::WORLD]]))


@contextlib.contextmanager
def new_folder(folder):
    """Fill folder.tmp, seal it with the digests of its files and rename it: a folder is there whole or not at all."""
    from torch.distributed.checkpoint import CheckpointException
    tmp = Path(f"{folder}.tmp")
    try:
        if RANK == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
        total([0])
        yield tmp
        total([0])
        found = digests(tmp)
        if None in found.values():
            raise OSError("what was written cannot be read")
        if RANK == 0:
            write(tmp / "sha256.json", json.dumps(found, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            tmp.replace(folder)
        total([0])
    except (OSError, CheckpointException, SafetensorError) as e:
        e = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
        raise RunFailed(f"{folder} cannot be saved: {' '.join(str(e).split())[:300]}; make room there, then go on with "
                        "--resume: what was saved before is kept")


def is_whole(folder):
    """Does a folder hold what new_folder sealed?"""
    try:
        sealed = json.loads((Path(folder) / "sha256.json").read_text())
    except (OSError, ValueError):
        sealed = None
    found = digests(folder)  # every process takes part, whatever it could read, and all get the same answer
    return total([found != sealed or None in found.values()]) == [0]


def save_model(model, tokenizer, folder):
    """An HF folder with fp32 weights that from_pretrained and vLLM load as it is."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    weights, like = None, model
    if is_sharded(model):  # process 0 puts the weights together in CPU memory
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        like = empty_model(model.config)
        like.generation_config = model.generation_config
    with new_folder(folder) as tmp:
        if RANK == 0:
            like.save_pretrained(tmp, state_dict=weights)
            tokenizer.save_pretrained(tmp)


def weights_and_optimizer(model, optimizer):
    from torch.distributed.checkpoint.state_dict import get_state_dict
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves as well as many
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))


def save_state(folder, state, samples, model=None, optimizer=None):
    """Where a run stands: state.json, the samples of its iteration and, after a step, each process's part of weights
    and optimizer. The last two are kept."""
    import torch.distributed.checkpoint as dcp
    there = sorted(folder.glob("*[0-9]"))
    [last] = total([int(there[-1].name) if there and RANK == 0 else 0])
    with new_folder(folder / f"{int(last) + 1:06}") as tmp:
        if RANK == 0:
            write(tmp / "state.json", json.dumps(state))
            write(tmp / "samples.jsonl", samples)
        if optimizer:
            dcp.save(weights_and_optimizer(model, optimizer), checkpoint_id=tmp / "weights", no_dist=WORLD == 1)
    for old in there[:-1] if RANK == 0 else []:
        shutil.rmtree(old)


def load_weights(folder, model, optimizer):
    """What save_state saved, cut anew if the number of processes is another."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict
    saved = weights_and_optimizer(model, optimizer)
    dcp.load(saved, checkpoint_id=Path(folder) / "weights", no_dist=WORLD == 1)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])


FREE = ("resume", "out_dir", "save_every", "parallel", "hybrid", "offload", "checkpointing", "compile", "device",
        "sample_gb", "tokens_per_pass")  # flags that may change when a run is resumed: the others say what it computes


def find_state(cfg, about):
    """Where --resume goes on: the newest state that is whole, with its folder; else the beginning. Raises BadInput
    where it could not be the same run."""
    out_dir, path = Path(cfg.out_dir), Path(cfg.out_dir) / "sami.json"
    beginning = dict(iteration=1, step=0, log=[], folder=None)
    if not (cfg.resume and path.exists()):
        return beginning
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise BadInput(f"{path} is damaged; start again without --resume")
    need("task_sha256" in before, f"the run in {out_dir} is of an older version; start again without --resume")
    for name, value in about["config"].items():
        old = before["config"].get(name, value)
        need(name in FREE or old == value, f"the run in {out_dir} has --{name}={old}, not {value}: resume it with its "
             "own flags, or start a new one without --resume")
    need(before["dtype"] == about["dtype"], f"the run in {out_dir} computes in {before['dtype']}: add "
         f"--dtype={before['dtype']}")
    if before["versions"] != about["versions"]:
        say(f"this run began with {before['versions']}, now it is {about['versions']}: rounding may differ")
    need(before["task_sha256"] == about["task_sha256"], f"{cfg.task} has changed since the run in {out_dir} began: put "
         "it back, or start a new run without --resume")
    states = sorted((out_dir / "state").glob("*[0-9]"), reverse=True)
    whole = next((folder for folder in states if is_whole(folder)), None)
    need(whole or not states, f"no state in {out_dir / 'state'} is whole; start again without --resume")
    if not states:
        return beginning
    if whole != states[0]:
        say(f"{states[0]} is damaged, going back to {whole}")
        total([0])  # all have looked
        for damaged in states[:states.index(whole)] if RANK == 0 else []:
            shutil.rmtree(damaged)
    state = dict(json.loads((whole / "state.json").read_text()), folder=whole)
    last = out_dir / f"iteration-{state['iteration'] - 1}"
    need(state["iteration"] == 1 or is_whole(last), f"{last} is damaged, and the next iteration begins with it; start "
         "again without --resume")
    return state


def new_out_dir(out_dir):
    """Make the folder; an earlier run in it is renamed, so that no finished iteration is ever overwritten."""
    if out_dir.exists() and any(out_dir.iterdir()):
        aside = next(p for k in range(1, 10**6) if not (p := Path(f"{out_dir}.{k}")).exists())
        out_dir.rename(aside)
        say(f"the earlier run in {out_dir} is now in {aside}")
    (out_dir / "samples").mkdir(parents=True, exist_ok=True)


def git_commit():
    try:
        here = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
        return subprocess.run(["git", "rev-parse", "HEAD"], **here).stdout.strip() or None
    except OSError:  # no git on this machine
        return None


def show(held, iteration):
    """Print what heldout_information found, one of the matrices and two of the responses."""
    number = lambda name: f"{held[name]:.3f} ± {held[name + '_se']:.3f}"
    say(f"{f'iteration {iteration}' if iteration else 'base'}, held out: infonce {number('infonce')} of at most "
        f"{held['infonce_cap']:.3f} nats | accuracy row {number('row_accuracy')}, col {number('col_accuracy')}")
    e = held["examples"][0]
    say(f"  x: {' '.join(flat(e['query']).split())[:100]}\n  logp"
        + "".join(f"{f'y_{j + 1}':>8}" for j in range(len(e["logp"]))))
    for i, (row, c) in enumerate(zip(e["logp"].tolist(), e["constitutions"])):
        say(f"   c_{i + 1}" + "".join(f"{value:8.3f}" for value in row) + f"   {' '.join(c.split())[:80]}")
    for j in range(2):
        say(f"  y_{j + 1}: {' '.join(e['responses'][j].split())[:110]}")


def announce(cfg, task, model):
    flags = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default}
    say(f"{cfg.model}: {model} | flags: {flags or 'none'}\n{cfg.task}: {len(task.train)} train and {len(task.test)} "
        f"test queries, {len(task.principles)} principles, {len(task.heldout)} held out | n = {cfg.n}, chance: loss "
        f"{math.log(cfg.n):.3f}, accuracy {1 / cfg.n:.2f}")


def pick_usable(examples, iteration, path, task):
    """Those that no filter drops; says how many there are and why not more. Raises RunFailed where there is none."""
    why = [e["dropped"] for e in examples if e["dropped"]]
    say(f"iteration {iteration}: {len(examples)} queries sampled, {len(examples) - len(why)} usable"
        + "".join(f", {why.count(w)} dropped: {w}" for w in sorted(set(why))))
    if len(why) == len(examples):
        raise RunFailed(f"all samples of iteration {iteration} were filtered out, {path} says why; loosen the filters "
                        f"of {task.path}, or raise --temperature or --max_new_tokens")
    return [e for e in examples if not e["dropped"]]


ASKED_TO_STOP = []  # by SIGTERM


def main(argv):
    cfg = parse(Config, argv, PRESETS)
    seeds = cfg.seeds.split(",") if cfg.seeds else []
    need(all(s.isdigit() for s in seeds) and len(set(seeds)) == len(seeds),
         f"--seeds={cfg.seeds}: give different whole numbers such as 1,2,3")
    if cfg.plan:
        return plan(cfg, load_task(cfg.task), check(cfg))
    if cfg.check:
        return sami(cfg)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: ASKED_TO_STOP.append(1))
    if not seeds:
        sami(cfg)
    for s in seeds:
        sami(dataclasses.replace(cfg, seed=int(s), seeds="", out_dir=f"{cfg.out_dir}/seed-{s}"))
    say(f"next: python evaluate.py --out_dir={cfg.out_dir}")
    leave()


def sami(cfg):
    """The loop: sample, train, save, measure, with one seed."""
    steps, task = check(cfg), load_task(cfg.task)
    for focus in {q.get("focus") for q in task.train + task.test}:
        task.draw(rng(cfg.seed), cfg.n, focus)  # raises where there are no n different constitutions
    need(min(len(task.train), cfg.max_queries or math.inf) > 1, "iterations take turns on two halves of the training "
         f"queries: {cfg.task} or --max_queries leaves one query, give at least two")
    device, dtype = pick_device(cfg)
    config, tokenizer = load_tokenizer(cfg.model)
    longest, limit = check_lengths(task, config, tokenizer, cfg)
    if cfg.check:
        return check_task(task, tokenizer, cfg, steps, longest, limit)
    out_dir = Path(cfg.out_dir)
    need(not out_dir.is_file(), f"--out_dir={out_dir} is a file; name a folder")
    need(out_dir.resolve() not in Path(cfg.model).resolve().parents,
         f"--model={cfg.model} lies in --out_dir, where this run goes; name another --out_dir")
    join(device)
    parallel = pick_parallel(cfg, config, device, dtype)
    need(parallel == "fsdp" or not (cfg.offload or cfg.hybrid), "--offload and --hybrid are ways to cut a model: they "
         "need several processes and --parallel=fsdp")
    fsdp = fsdp_arguments(cfg, device, dtype) if parallel == "fsdp" else None
    about = dict(config=dataclasses.asdict(cfg), world_size=WORLD, parallel=parallel, device=str(device),
                 dtype=str(dtype)[6:],
                 versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
                 git_commit=git_commit(),
                 task_sha256=hashlib.sha256(json.dumps(vars(task), default=str).encode()).hexdigest())
    state = find_state(cfg, about)
    first, log, examples = state["iteration"], state["log"], []
    model = load_model(str(out_dir / f"iteration-{first - 1}") if first > 1 else cfg.model, device, fsdp)
    total([0])  # all have read what is there
    if RANK == 0:
        if not state["folder"]:
            new_out_dir(out_dir)
        write(out_dir / "sami.json", json.dumps(about, indent=1))
    announce(cfg, task, f"{weight_count([model]) / 1e6:.2f}M weights in float32, computing in {str(dtype)[6:]} on "
             f"{WORLD} x {device.type}" + f", {parallel}" * (WORLD > 1))
    started, earlier = time.time(), log[-1]["seconds"] if log else 0

    def keep(iteration, step, samples, due=True, model=None, optimizer=None):
        """Save where the run stands if that is due or SIGTERM has come."""
        stop = total([len(ASKED_TO_STOP)]) != [0]
        if due or stop:
            save_state(out_dir / "state", dict(iteration=iteration, step=step, log=log), samples, model, optimizer)
        if stop:
            torchrun = f"torchrun --nnodes={WORLD // NODE} --nproc_per_node={NODE} --"
            command = [torchrun if WORLD > 1 else "python", *map(shlex.quote, sys.argv)]
            say("stopped; go on with: " + " ".join(command + ["--resume"] * ("--resume" not in command)))
            leave()
            raise SystemExit(0)

    def report(iteration, step, row):
        log.append(dict(iteration=iteration, step=step + 1, **row, seconds=earlier + time.time() - started))
        if RANK == 0:
            write(out_dir / "log.jsonl", "".join(json.dumps(r) + "\n" for r in log))
        eta = log[-1]["seconds"] / len(log) * (sum(steps) - len(log))
        say(f"iteration {iteration} step {step + 1:2}/{steps[iteration - 1]} | loss {row['loss']:.4f} | "
            f"acc row {row['row_accuracy']:.2f} col {row['col_accuracy']:.2f} | diag {row['diagonal']:.3f} | "
            f"kl {row['kl']:.4f} | norm {row['grad_norm']:.2f} | changed {row['changed']:.0%} | "
            f"{row['tokens_per_second']:,.0f} tok/s | eta {eta:.0f} s")

    def measure(iteration):
        if cfg.eval_queries:
            show(heldout_information(model, tokenizer, task, cfg, device, dtype), iteration)

    if state["folder"]:
        examples = [json.loads(line) for line in (state["folder"] / "samples.jsonl").read_bytes().splitlines()]
        say(f"going on in iteration {first} behind step {state['step']}, {len(examples)} queries sampled")
    for iteration in range(first, cfg.iterations + 1):
        if not examples:
            measure(iteration - 1)
        wanted, path = steps[iteration - 1] * cfg.batch_size, out_dir / "samples" / f"iteration-{iteration}.jsonl"
        as_lines = lambda examples: "".join(json.dumps(e) + "\n" for e in examples)
        with compute(device, dtype):  # by the last iteration's model
            examples = collect(model, tokenizer, task, cfg, iteration, wanted, examples,
                               lambda so_far: keep(iteration, 0, as_lines(so_far)))
        samples = as_lines(examples)
        if RANK == 0:
            write(path, samples)
        usable = pick_usable(examples, iteration, path, task)
        if math.ceil(len(usable) / cfg.batch_size) < steps[iteration - 1]:
            steps[iteration - 1] = math.ceil(len(usable) / cfg.batch_size)
            say(f"too few usable queries for more than {steps[iteration - 1]} steps")
        if cfg.restart and iteration > 1:
            model = None  # makes room
            model = load_model(cfg.model, device, fsdp)
        if cfg.beta:
            base = model if cfg.restart or iteration == 1 else load_model(cfg.model, device, fsdp)
            add_base_logps(base, usable[:wanted], cfg, device, dtype)
            base = None

        def after_step(step, row, optimizer):
            report(iteration, step, row)
            keep(iteration, step + 1, samples, (step + 1) % cfg.save_every == 0, model, optimizer)

        train(model, usable, steps[iteration - 1], cfg, device, dtype, after_step, (state["step"], state["folder"]))
        save_model(model, tokenizer, out_dir / f"iteration-{iteration}")
        state, examples = dict(step=0, folder=None), []
        keep(iteration + 1, 0, "")
    measure(cfg.iterations)
    say(f"done in {earlier + time.time() - started:.0f} s, everything is in {out_dir}")


def run(main):
    """main(command line), with bad input and failures told in one sentence: exit code 2 and 1."""
    try:
        main(sys.argv[1:])
    except (BadInput, RunFailed, torch.OutOfMemoryError) as e:  # on every process, since each may fail alone
        hint = "; lower --tokens_per_pass or set --sample_gb" if isinstance(e, torch.OutOfMemoryError) else ""
        print(f"error{f' of process {RANK}' * (WORLD > 1)}: {e}{hint}", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(e, BadInput) else 1)


if __name__ == "__main__":
    run(main)
