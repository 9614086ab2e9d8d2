"""A fork is a short file that imports sami, replaces what it changes, and edits nothing."""
import json, math, os, subprocess, sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sami, tiny

DPO = '''"""DPO: under c_j its own response is better than any other one. The step size decays."""
import math
import torch
import torch.nn.functional as F
import sami


def dpo(example, cells, cfg):
    gain = sami.as_matrix(cells, "sum") - sami.as_matrix(example.base, "sum")  # (n, n)
    margin = gain.diag()[:, None] - gain  # (n, n): under c_j, what y_j gained more than y_k
    margin = margin[~torch.eye(len(gain), dtype=bool)]  # (n * (n - 1),)
    return dict(loss=-F.logsigmoid(cfg.beta * margin).mean(), won=(margin > 0).float().mean())


def cosine(step, steps, cfg):
    return cfg.lr * (1 + math.cos(math.pi * step / steps)) / 2


sami.objective, sami.learning_rate = dpo, cosine
sami.run(sami.main)
'''

SAMPLER = '''"""Another sampler: Hugging Face's own, greedy."""
import torch
import sami


def generate(model, prompts, *, max_new_tokens, eos_ids, **_):
    how = dict(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos_ids, pad_token_id=0)
    print("generated", len(prompts))
    return [model.generate(torch.tensor([p]), **how)[0, len(p):].tolist() for p in prompts]


sami.sample = generate
sami.run(sami.main)
'''

LORA = '''"""Only low-rank adapters on the attention learn; a checkpoint holds them merged."""
import copy, json
import torch
import sami


class Adapted(torch.nn.Module):
    def __init__(self, linear, rank=2):
        super().__init__()
        self.linear = linear
        self.down = torch.nn.Parameter(torch.randn(rank, linear.in_features) / rank)
        self.up = torch.nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, h):
        return self.linear(h) + h @ self.down.T @ self.up.T

    def merged(self):
        self.linear.weight += self.up @ self.down
        return self.linear


def replace(model, kind, by):
    for layer in model.model.layers:
        for name, m in list(layer.self_attn.named_children()):
            if isinstance(m, kind):
                setattr(layer.self_attn, name, by(m))
    return model


def load(*args, inner=sami.load_model):
    return replace(inner(*args).requires_grad_(False), torch.nn.Linear, Adapted)


@torch.no_grad()
def save(model, *args, inner=sami.save_model):
    inner(replace(copy.deepcopy(model), Adapted, Adapted.merged), *args)


records = []
sami.load_model, sami.save_model, sami.log = load, save, records.append
sami.run(sami.main)
print(json.dumps(records))
'''


def fork(path, script, flags):
    """Run a fork as its author would -> what it printed."""
    (path / "fork.py").write_text(script)
    env = dict(os.environ, PYTHONPATH=str(Path(sami.__file__).parent), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "fork.py", *flags], cwd=path, env=env, text=True,
                          capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(path, name="log.jsonl"):
    return [json.loads(line) for line in (path / "out" / name).read_text().splitlines()]


def dpo_by_hand(path, policy, row, beta):
    """The loss of one line of a samples file."""
    load = lambda name: AutoModelForCausalLM.from_pretrained(path / name)
    with torch.no_grad():
        now, then = (sami.logp_matrix(load(name), row["prompts"], row["ids"], "sum").tolist()
                     for name in (policy, "base"))
    pairs = [(j, k) for j in range(3) for k in range(3) if j != k]
    gains = [now[j][j] - then[j][j] - (now[j][k] - then[j][k]) for j, k in pairs]
    return sum(math.log(1 + math.exp(-beta * gain)) for gain in gains) / len(pairs)


def test_dpo_with_cosine_decay(tmp_path):
    """Policy and base agree at first: the loss is log 2. On what was trained on it is then less."""
    assert len(DPO.splitlines()) <= 20
    flags = tiny.folder(tmp_path) + ["--n=3", "--steps=4", "--temperature=0.5", "--iterations=2",
                                     "--restart=False", "--batch_size=5", "--beta=0.2"]
    fork(tmp_path, DPO, flags)
    steps = rows(tmp_path)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and steps[0]["won"] == 0
    for row in steps:
        part = (row["step"] - 1) / 4
        assert row["lr"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * part)) / 2)
        assert "kl" not in row and "row_accuracy" not in row, "the log holds what the fork returned"
    # the second iteration begins where the first ended, and the base is as it was
    first, second = (rows(tmp_path, f"samples/iteration-{k}.jsonl") for k in (1, 2))
    usable = [row for row in second if not row["dropped"]]
    begun = sum(dpo_by_hand(tmp_path, "out/iteration-1", row, 0.2) for row in usable[:5]) / 5
    assert steps[4]["loss"] == pytest.approx(begun, abs=1e-5) and abs(begun - math.log(2)) > 1e-3
    usable = [row for row in first if not row["dropped"]]
    learned = [dpo_by_hand(tmp_path, "out/iteration-1", row, 0.2) for row in usable]
    assert sum(learned) / len(learned) < math.log(2) - 0.01
    # the samples are those of SAMI
    code, _, err = tiny.command(*flags, "--iterations=1", f"--out_dir={tmp_path}/plain/out")
    assert code == 0, err
    name = "out/samples/iteration-1.jsonl"
    assert (tmp_path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_another_sampler(tmp_path):
    """Greedy text is the same whoever writes it: the same samples, so the same weights."""
    flags = tiny.folder(tmp_path)
    assert "generated" in fork(tmp_path, SAMPLER, flags)
    code, _, err = tiny.command(*flags, f"--out_dir={tmp_path}/plain/out")
    assert code == 0, err
    for name in ("out/samples/iteration-1.jsonl", "out/iteration-1/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_low_rank_adapters_and_a_log_of_ones_own(tmp_path):
    """Two iterations; what is saved is a plain model that differs from the base in rank 2."""
    flags = tiny.folder(tmp_path) + ["--iterations=2", "--lr=1e-2", "--eval_queries=2"]
    printed = fork(tmp_path, LORA, flags)
    records = json.loads(printed.splitlines()[-1])
    assert records == rows(tmp_path) and len(records) == 4 + 3, "steps and held-out measurements"
    assert "| loss" not in printed, "the default log is replaced, not doubled"
    load = lambda name: AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
    base = load("base")
    for k in (1, 2):
        saved = load(f"out/iteration-{k}")
        assert saved.keys() == base.keys()
        for name, weight in saved.items():
            change = weight - base[name]
            if "self_attn" in name:
                singular = torch.linalg.svdvals(change)
                assert singular[1] > 1e-4 and singular[2] < 1e-2 * singular[1], name
            else:
                assert not change.any(), name
