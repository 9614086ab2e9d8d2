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
import dataclasses, importlib.metadata, inspect, json, math, os, subprocess, sys, time, typing
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on busy CPUs, threads that wait must not keep others from working

import jinja2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------- config


@dataclass
class Config:
    preset: str = ""  # start from a named set of values: stories, or one of the paper's four experiments (PRESETS)
    task: str = "data/toy"  # folder with the prompts, principles and queries
    model: str = "data/toy/base"  # base model: Hugging Face folder or hub name
    check: bool = False  # only look: prompts, draws, lengths and what the run would cost; loads no weights
    out_dir: str = "out"  # checkpoints, samples, logs; an earlier run there is moved aside, never overwritten
    iterations: int = 3  # rounds of sampling and training
    steps: str = "4,8,12"  # gradient steps: one number, or one for each iteration
    batch_size: int = 16  # queries a step
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
    sample_batch: int = 256  # responses sampled side by side; lower it when memory runs out in sampling
    seed: int = 1  # data order, draws and sampling noise are functions of it
    seeds: str = ""  # several runs, such as 1,2,3, into the folders seed-1, seed-2, ... of out_dir
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # of computation: auto | float32 | bfloat16; weights stay float32


# The paper's Table 1. What the authors ran differs: lr warmed up from 0 and decayed, so that 2/4/6 steps were 1/3/5,
# each on the last 8 queries of the 128; the weights of mixtral and llama were bf16.
PAPER = dict(iterations=3, steps="2,4,6", batch_size=128, n=2, lr=5e-7, beta=0.0, temperature=0.0, max_new_tokens=350,
             eval_queries=250, tokens_per_pass=16384)
PRESETS = {
    "stories": dict(task="data/stories", model="roneneldan/TinyStories-33M", n=2, batch_size=32, steps="15", lr=1e-4,
                    beta=0.35, temperature=1.0, max_new_tokens=48, restart=False),
    "hh-mistral-7b": dict(PAPER, task="data/hh", model="mistralai/Mistral-7B-v0.1"),
    "tldr-mistral-7b": dict(PAPER, task="data/tldr", model="mistralai/Mistral-7B-v0.1"),
    "tldr-mixtral-8x7b": dict(PAPER, task="data/tldr", model="mistralai/Mixtral-8x7B-v0.1", optimizer="rmsprop"),
    # ran: lr 1e-6 with chain of thought (500 new tokens, dropped before training); without it 5e-7, end of text scored
    "principles-llama3-70b": dict(PAPER, task="data/principles", model="meta-llama/Meta-Llama-3-70B", steps="4,8,12",
                                  optimizer="rmsprop"),
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
                   reduce=("mean", "sum"), device=("auto", "cpu", "cuda", "mps"), dtype=("auto", "float32", "bfloat16"))
    least = dict(iterations=1, batch_size=1, max_new_tokens=1, tokens_per_pass=1, sample_batch=1, n=2, warmup=0, lr=0,
                 grad_clip=0, beta=0, temperature=0, max_queries=0, eval_queries=0, seed=0, top_p=1e-6)
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


# -------------------------------------------------------------------------------------------------------------- model


def pick_device(cfg):
    """Flags -> (device, compute dtype)."""
    found = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(d for d in found if found[d]) if cfg.device == "auto" else cfg.device
    need(found[name], f"--device={name}: torch sees none on this machine; use --device=cpu")
    dtype = ("bfloat16" if name == "cuda" else "float32") if cfg.dtype == "auto" else cfg.dtype
    return torch.device(name), getattr(torch, dtype)


def load_tokenizer(path):
    """Model folder or hub name -> (config, tokenizer): small files, so that bad input is met before weights load."""
    from transformers import AutoConfig, AutoTokenizer  # slow to import: wrong flags should not wait for it
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    owner, _, name = path.rpartition("/")
    hub = name and "/" not in owner and not Path(path).exists() and not (owner and Path(owner).exists())
    need(hub or (Path(path) / "config.json").is_file(),
         f"--model={path} is neither a folder with a config.json nor a hub name such as mistralai/Mistral-7B-v0.1")
    try:
        return AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as e:
        raise BadInput(f"--model={path} cannot be loaded: {' '.join(str(e).split())[:300]}")


def load_model(path, device):
    """Model folder or hub name -> causal LM with fp32 weights on `device`."""
    from transformers import AutoConfig, AutoModelForCausalLM
    # scoring brings its own attention mask, which the fused kernels cannot combine with soft-capped scores
    capped = getattr(AutoConfig.from_pretrained(path).get_text_config(), "attn_logit_softcapping", None)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True,
                                                     attn_implementation="eager" if capped else None)
    except Exception as e:  # safetensors has kinds of its own
        raise BadInput(f"--model={path} cannot be loaded: {' '.join(str(e).split())[:300]}")
    return model.to(device).eval()  # and never .train(): dropout would put noise into the contrast


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
def sample(model, prompts, *, max_new_tokens, temperature, top_p=1.0, eos_ids, seed, stop=None, batch=256, done=None):
    """One response for each prompt: lists of token ids of any lengths -> lists of at most max_new_tokens ids, in order.

    A response that ended by itself keeps its end id. seed: an int, or a tuple of ints for each prompt: the noise of a
    response is a function of that key and not of the batch it is in. stop: function of a response's ids so far, asked
    every 8 tokens: end it? done: called with the number of responses that have just finished.
    """
    if not all(prompts):
        raise ValueError("cannot continue an empty prompt")
    device, responses, config = next(model.parameters()).device, [[] for _ in prompts], model.config.get_text_config()
    window = min(getattr(config, name, None) or math.inf for name in ("sliding_window", "window_size"))
    keys = [(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else seed
    # similar lengths side by side for little or no padding; the longest first, so that memory runs out at once or never
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
    for rows in (order[i:i + batch] for i in range(0, len(order), batch)):
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
        ctx.chunks, ctx.scale, ctx.cap = range(0, len(h), max(1, 2**23 // len(w))), scale, cap  # 32 MB of logits each
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
    config, device = model.config.get_text_config(), next(model.parameters()).device
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


def plain_logps(model, prompts, siblings):
    """The same with a row for each pair and the model's own logits: for every causal LM, at n times the cost."""
    rows = [(list(p), y) for p, ys in zip(prompts, siblings) for y in ys]
    width = max(len(p) + len(y) for p, y in rows)
    ids = torch.tensor([p + y + [0] * (width - len(p + y)) for p, y in rows], device=next(model.parameters()).device)
    logp = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return torch.cat([logp[b, len(p) - 1:len(p + y) - 1] for b, (p, y) in enumerate(rows)])


@torch.no_grad()
def can_share(model, prompts, siblings):
    """Does sharing prompts give what plain scoring gives? Not where a layer does not heed the mask (ALiBi, convolution,
    chunked or linear attention), nor with an adapter on the output head."""
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        plain = plain_logps(model, prompts, siblings)
        try:
            worst = (shared_logps(model, prompts, siblings) - plain).abs().max().item()
            why = f"log-probs off by {worst:.1g}"
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            worst, why = math.inf, str(e).split("\n")[0] or type(e).__name__
    works = worst < 1e-4 * (1 + plain.abs().max().item())
    if not works:
        print(f"scoring every pair apart: responses cannot share a prompt in this architecture ({why})", flush=True)
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
    logps = (shared_logps if known[several] else plain_logps)(model, prompts, siblings)
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
    with tqdm(total=len(pairs), desc=desc, unit="response", leave=False, disable=None) as bar:
        sampled = sample(model, [p + prefix for p, prefix in encoded], max_new_tokens=cfg.max_new_tokens, seed=keys,
                         temperature=temperature, top_p=cfg.top_p, eos_ids=eos_ids, batch=cfg.sample_batch,
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

    queries: (number, query) pairs; draws and noise are functions of (cfg.seed, iteration, number)."""
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
    return examples


def collect(model, tokenizer, task, cfg, iteration, wanted):
    """Sample this iteration's half of the training queries until `wanted` pass the filters, or all are sampled."""
    total = min(cfg.max_queries or len(task.train), len(task.train))
    half = np.arange((iteration - 1) % 2, total, 2)  # not the half that the sampling model was trained on
    todo, examples, missing = rng(cfg.seed, iteration).permutation(half).tolist(), [], wanted
    while todo and missing:
        now, todo = todo[:missing], todo[missing:]
        examples += sample_queries(model, tokenizer, task, [(i, task.train[i]) for i in now], cfg, iteration,
                                   cfg.temperature, f"iteration {iteration}: sampling")
        missing = wanted - sum(e["dropped"] is None for e in examples)
    return examples


def passes(examples, cfg):
    """Group examples so that a scoring pass holds at most cfg.tokens_per_pass tokens, padding included."""
    width = lambda e: max(map(len, e["prompts"])) + sum(map(len, e["ids"]))
    group = []
    for e in sorted(examples, key=width):
        if group and (len(group) + 1) * cfg.n * width(e) > cfg.tokens_per_pass:
            yield group
            group = []
        group.append(e)
    yield group


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
    for group in passes(examples, cfg):
        with compute(device, dtype):
            for e, cells in zip(group, score_examples(base, group)):
                e["base_logps"] = all_tokens(cells)


def measures(logp):
    """What is logged of one query's matrix (n, n): were the diagonal entries the largest of their rows and columns?"""
    hit = torch.arange(len(logp), device=logp.device)
    row, col = ((logp.argmax(dim) == hit).float().mean() for dim in (1, 0))
    return dict(row_accuracy=row, col_accuracy=col, diagonal=logp.diag().mean())


def train(model, examples, steps, cfg, device, dtype, report):
    """Train `model` in place: `steps` steps of cfg.batch_size examples, in order. report(step, numbers) after each."""
    params = [p for p in model.parameters() if p.requires_grad]
    # foreach=False: the default makes temporaries as large as the model
    optimizer = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[cfg.optimizer](params, foreach=False)
    for step in range(steps):
        started, tokens, logged = time.time(), 0, {}
        batch = examples[step * cfg.batch_size:(step + 1) * cfg.batch_size]
        for group in passes(batch, cfg):
            with compute(device, dtype):
                scored = score_examples(model, group)
            total = 0
            for e, cells in zip(group, scored):
                logp = as_matrix(cells, cfg.reduce)  # (n, n)
                kl = kl_to_base(all_tokens(cells), e["base_logps"]).mean() if cfg.beta else torch.zeros(())
                loss = sami_loss(logp, cfg.contrast) + cfg.beta * kl
                total = total + loss / len(batch)  # the mean over the batch, however it is cut into passes
                for name, value in dict(loss=loss, kl=kl, **measures(logp.detach())).items():
                    logged[name] = logged.get(name, 0) + float(value.detach()) / len(batch)
                tokens += sum(map(len, e["prompts"])) + cfg.n * sum(map(len, e["ids"]))
            total.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf, foreach=False)
        if not math.isfinite(logged["loss"] + norm):  # before such a step spoils the weights
            raise RunFailed(f"step {step + 1} has loss {logged['loss']} and gradient norm {norm}: lower --lr, now "
                            f"{cfg.lr}, or set --warmup or --grad_clip; finished iterations are kept")
        before = [seen(p, dtype) for p in params]
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup))
        optimizer.step()
        optimizer.zero_grad()
        changed = torch.cat([seen(p, dtype) != old for p, old in zip(params, before)]).float().mean()
        report(step, dict(logged, grad_norm=float(norm), changed=float(changed),
                          tokens_per_second=tokens / (time.time() - started)))


def seen(p, dtype):
    """Some thousand entries of a weight as the forward pass sees them: what rounds to nothing there has not changed."""
    return p.detach().flatten()[::max(1, p.numel() // 4096)].to(dtype, copy=True)


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
        for group in passes(examples, cfg):
            for e, cells in zip(group, score_examples(model, group)):
                e["logp"] = as_matrix(cells, cfg.reduce)
                e["measures"] = dict(infonce=infonce(as_matrix(cells, "sum")), **measures(e["logp"]))
    out = dict(infonce_cap=math.log(cfg.n), examples=examples)
    for name in examples[0]["measures"]:
        values = [float(e["measures"][name]) for e in examples]
        out[name] = float(np.mean(values))
        out[name + "_se"] = float(np.std(values, ddof=len(values) > 1) / len(values)**.5)
    return out


# -------------------------------------------------------------------------------------------------- checkpoints, main


def write(path, text):
    """All of a file or nothing of it: written under a temporary name, then renamed."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    Path(f"{path}.tmp").replace(path)


def save_model(model, tokenizer, folder):
    """Whole or not at all: an HF folder with fp32 weights that from_pretrained and vLLM load as it is."""
    model.save_pretrained(f"{folder}.tmp")
    tokenizer.save_pretrained(f"{folder}.tmp")
    Path(f"{folder}.tmp").replace(folder)


def new_out_dir(out_dir):
    """Make the folder; an earlier run in it is renamed, so that no finished iteration is ever overwritten."""
    if out_dir.exists() and any(out_dir.iterdir()):
        aside = next(p for k in range(1, 10**6) if not (p := Path(f"{out_dir}.{k}")).exists())
        out_dir.rename(aside)
        print(f"the earlier run in {out_dir} is now in {aside}")
    (out_dir / "samples").mkdir(parents=True, exist_ok=True)


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


def git_commit():
    try:
        here = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
        return subprocess.run(["git", "rev-parse", "HEAD"], **here).stdout.strip() or None
    except OSError:  # no git on this machine
        return None


def show(held, iteration):
    """Print what heldout_information found, one of the matrices and two of the responses."""
    number = lambda name: f"{held[name]:.3f} ± {held[name + '_se']:.3f}"
    print(f"{f'iteration {iteration}' if iteration else 'base'}, held out: infonce {number('infonce')} of at most "
          f"{held['infonce_cap']:.3f} nats | accuracy row {number('row_accuracy')}, col {number('col_accuracy')}")
    e = held["examples"][0]
    print(f"  x: {' '.join(flat(e['query']).split())[:100]}\n  logp"
          + "".join(f"{f'y_{j + 1}':>8}" for j in range(len(e["logp"]))))
    for i, (row, c) in enumerate(zip(e["logp"].tolist(), e["constitutions"])):
        print(f"   c_{i + 1}" + "".join(f"{value:8.3f}" for value in row) + f"   {' '.join(c.split())[:80]}")
    for j in range(2):
        print(f"  y_{j + 1}: {' '.join(e['responses'][j].split())[:110]}", flush=True)


def main(argv):
    cfg = parse(Config, argv, PRESETS)
    seeds = cfg.seeds.split(",") if cfg.seeds else []
    need(all(s.isdigit() for s in seeds) and len(set(seeds)) == len(seeds),
         f"--seeds={cfg.seeds}: give different whole numbers such as 1,2,3")
    if cfg.check:
        return sami(cfg)
    if not seeds:
        sami(cfg)
    for s in seeds:
        sami(dataclasses.replace(cfg, seed=int(s), seeds="", out_dir=f"{cfg.out_dir}/seed-{s}"))
    print(f"next: python evaluate.py --out_dir={cfg.out_dir}")


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
    model = load_model(cfg.model, device)
    new_out_dir(out_dir)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    write(out_dir / "sami.json", json.dumps(dict(config=dataclasses.asdict(cfg), versions=versions, world_size=1,
                                                 git_commit=git_commit(), device=str(device)), indent=1))
    flags = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default}
    print(f"{cfg.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M weights in float32, computing in "
          f"{str(dtype)[6:]} on {device} | flags: {flags or 'none'}")
    print(f"{cfg.task}: {len(task.train)} train and {len(task.test)} test queries, {len(task.principles)} principles, "
          f"{len(task.heldout)} held out | n = {cfg.n}, chance: loss {math.log(cfg.n):.3f}, accuracy {1 / cfg.n:.2f}")
    log, started = [], time.time()

    def report(iteration, step, row):
        log.append(dict(iteration=iteration, step=step + 1, **row, seconds=time.time() - started))
        write(out_dir / "log.jsonl", "".join(json.dumps(r) + "\n" for r in log))
        eta = (time.time() - started) / len(log) * (sum(steps) - len(log))
        print(f"iteration {iteration} step {step + 1:2}/{steps[iteration - 1]} | loss {row['loss']:.4f} | "
              f"acc row {row['row_accuracy']:.2f} col {row['col_accuracy']:.2f} | diag {row['diagonal']:.3f} | "
              f"kl {row['kl']:.4f} | norm {row['grad_norm']:.2f} | changed {row['changed']:.0%} | "
              f"{row['tokens_per_second']:,.0f} tok/s | eta {eta:.0f} s", flush=True)

    if cfg.eval_queries:
        show(heldout_information(model, tokenizer, task, cfg, device, dtype), 0)
    for iteration in range(1, cfg.iterations + 1):
        wanted = steps[iteration - 1] * cfg.batch_size
        with compute(device, dtype):
            examples = collect(model, tokenizer, task, cfg, iteration, wanted)  # by the last iteration's model
        path = out_dir / "samples" / f"iteration-{iteration}.jsonl"
        write(path, "".join(json.dumps(e) + "\n" for e in examples))
        why = [e["dropped"] for e in examples if e["dropped"]]
        usable = [e for e in examples if not e["dropped"]]
        print(f"iteration {iteration}: {len(examples)} queries sampled, {len(usable)} usable"
              + "".join(f", {why.count(w)} dropped: {w}" for w in sorted(set(why))), flush=True)
        if not usable:
            raise RunFailed(f"all samples of iteration {iteration} were filtered out, {path} says why; loosen the "
                            f"filters of {task.path}, or raise --temperature or --max_new_tokens")
        if len(usable) < wanted:
            steps[iteration - 1] = math.ceil(len(usable) / cfg.batch_size)
            print(f"too few usable queries for more than {steps[iteration - 1]} steps")
        if cfg.restart and iteration > 1:
            model = None  # makes room
            model = load_model(cfg.model, device)
        if cfg.beta:
            base = model if cfg.restart or iteration == 1 else load_model(cfg.model, device)
            add_base_logps(base, usable, cfg, device, dtype)
            base = None
        train(model, usable, steps[iteration - 1], cfg, device, dtype, lambda *args: report(iteration, *args))
        save_model(model, tokenizer, out_dir / f"iteration-{iteration}")
        if cfg.eval_queries:
            show(heldout_information(model, tokenizer, task, cfg, device, dtype), iteration)
    print(f"done in {time.time() - started:.0f} s, everything is in {out_dir}")


def run(main):
    """main(command line), with bad input and failures told in one sentence: exit code 2 and 1."""
    try:
        main(sys.argv[1:])
    except (BadInput, RunFailed, torch.OutOfMemoryError) as e:
        hint = "; lower --tokens_per_pass or --sample_batch" if isinstance(e, torch.OutOfMemoryError) else ""
        print(f"error: {e}{hint}", file=sys.stderr)
        raise SystemExit(2 if isinstance(e, BadInput) else 1)


if __name__ == "__main__":
    run(main)
