"""Two and four processes do what one does: the same samples, loss and weights, however the model is cut."""
import itertools, json, os, subprocess, sys

import pytest
import transformers as tr
from transformers import AutoModelForCausalLM

import parallel_worker, sami, tiny

SMALL = dict(vocab_size=len(tiny.LETTERS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, eos_token_id=0,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, pad_token_id=0)
GPT = dict(vocab_size=len(tiny.LETTERS), bos_token_id=0, eos_token_id=0)
MODELS = dict(
    llama=None, tied=None, mistied=None,  # the last: tied says its config, but there are two matrices
    mixtral=tr.MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2),  # 3 experts on 2 processes
    qwen2=tr.Qwen2Config(**SMALL, tie_word_embeddings=True, use_sliding_window=True, sliding_window=8,
                         max_window_layers=1),
    gemma2=tr.Gemma2Config(**SMALL, head_dim=8, sliding_window=8),
    gpt2=tr.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **GPT),
    gpt_neo=tr.GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=256,
                            attention_types=[[["global", "local"], 1]], window_size=8, **GPT),
    bloom=tr.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **GPT),
)
CASES = {  # name: flags of parallel_worker.case
    "ddp": dict(model="llama", parallel="ddp"),
    "ddp tied checkpointing": dict(model="tied", parallel="ddp", checkpointing=True),
    "fsdp": dict(model="llama", parallel="fsdp"),
    "fsdp lock step": dict(model="llama", parallel="fsdp", lock_step=True),
    "fsdp tied": dict(model="tied", parallel="fsdp"),
    "fsdp checkpointing rmsprop clipped": dict(model="llama", parallel="fsdp", checkpointing=True, optimizer="rmsprop",
                                               grad_clip=0.1),
    "fsdp mistied": dict(model="mistied", parallel="fsdp"),
    "fsdp mixtral": dict(model="mixtral", parallel="fsdp", temperature=1.0),
    "fsdp qwen2": dict(model="qwen2", parallel="fsdp", temperature=1.0),
    "fsdp gemma2": dict(model="gemma2", parallel="fsdp", temperature=1.0),
    "fsdp gpt2": dict(model="gpt2", parallel="fsdp", temperature=1.0),
    "fsdp gpt_neo": dict(model="gpt_neo", parallel="fsdp", temperature=1.0),
    "fsdp bloom": dict(model="bloom", parallel="fsdp", temperature=1.0),
    "fsdp one query a step": dict(model="llama", parallel="fsdp", batch_size=1),
    "fsdp hybrid": dict(model="llama", parallel="fsdp", node=2),
    "fsdp bfloat16": dict(model="llama", parallel="fsdp", dtype="bfloat16", given="given.json"),
}
BY_FOUR = ["ddp", "fsdp lock step", "fsdp tied", "fsdp mixtral", "fsdp hybrid", "fsdp one query a step"]
RUNS = [(name, 2) for name in CASES if name != "fsdp hybrid"] + [(name, 4) for name in BY_FOUR]


def build(name):
    if name in ("llama", "tied", "mistied"):
        model = tiny.model(tie_word_embeddings=name == "tied")
        model.generation_config.eos_token_id = [0, 5]
        return model
    sami.torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    for p in model.parameters():
        if p.dim() > 1:
            sami.torch.nn.init.normal_(p, std=0.2)
    return model


def launch(processes, *arguments, **how):
    """torchrun on this machine. Behind -- it does not take --n=2 for a flag of its own."""
    here = os.path.dirname(__file__)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.dirname(here), here]), OMP_NUM_THREADS="1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
    return subprocess.run([*torchrun, *arguments], env=env, capture_output=True, text=True, **how)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All cases on 2 and on 4 processes -> the folder with what they left."""
    root = tmp_path_factory.mktemp("parallel")
    tiny.folder(root)
    for name in MODELS:
        build(name).save_pretrained(root / name), tiny.tokenizer().save_pretrained(root / name)
    (root / "cases.json").write_text(json.dumps(CASES))
    config = json.loads((root / "mistied/config.json").read_text())
    (root / "mistied/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    given = parallel_worker.case(root / "llama", root / "given")["examples"]  # in bfloat16 other tokens win near ties
    (root / "given.json").write_text(json.dumps(given))
    for processes in (2, 4):
        done = launch(processes, os.path.join(os.path.dirname(__file__), "parallel_worker.py"), str(root),
                      *(name for name, count in RUNS if count == processes), timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
    return root


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def alone(ran):
    """The same in this process, on demand."""
    found = {}

    def run(name):
        if name not in found:
            flags = {k: v for k, v in CASES[name].items() if k not in ("parallel", "lock_step", "node")}
            found[name] = parallel_worker.case(ran / flags.pop("model"), ran / f"{name}-1", **flags)
        return json.loads(json.dumps(found[name])), weights(ran / f"{name}-1")
    return run


EXACT = [(name, processes) for name, processes in RUNS if "bfloat16" not in name]


@pytest.mark.parametrize("name, processes", EXACT)
def test_several_processes_do_what_one_does(ran, alone, name, processes):
    one, want = alone(name)
    several = json.loads((ran / f"{name}-{processes}.json").read_text())
    got, base = weights(ran / f"{name}-{processes}"), weights(ran / CASES[name]["model"])
    assert len(several) == processes
    for each in several:  # every process knows all
        assert each["examples"] == one["examples"]
        assert len({e["number"] for e in each["examples"]}) == len(each["examples"]) >= 8, "each query once"
        for (r, s), key in itertools.product(zip(each["reports"], one["reports"]), ("loss", "kl", "diagonal")):
            assert r[key] == pytest.approx(s[key], abs=2e-6 if key == "diagonal" else 1e-6)
        assert each["shared"] == one["shared"] == (CASES[name]["model"] not in ("bloom", "gpt_neo"))
        assert each["held"] == pytest.approx(one["held"], abs=1e-4)
    # a key's bias moves all scores of a query alike: its gradient is 0, and an optimizer makes steps out of rounding
    keys = [k for k in want if not k.endswith(("c_attn.bias", "query_key_value.bias"))]
    assert max((want[k] - base[k]).abs().max() for k in keys) > 2e-4, "the model has moved"
    assert max((got[k] - want[k]).abs().max() for k in keys) < 1e-5


def test_computing_in_bfloat16_is_close_and_the_weights_stay_fp32(ran, alone):
    """fp32 parts, gathered in bfloat16: the loss of the same samples within its rounding, no step lost in it."""
    one, want = alone("fsdp")
    [first, second] = json.loads((ran / "fsdp bfloat16-2.json").read_text())
    assert first["shared"] and second["shared"], "and responses share a prompt as ever"
    for r, s in zip(first["reports"], one["reports"]):
        assert 1e-6 < abs(r["loss"] - s["loss"]) < 0.02 and r["grad_norm"] == pytest.approx(s["grad_norm"], rel=0.05)
    got, base = weights(ran / "fsdp bfloat16-2"), weights(ran / "llama")
    a, b = (sami.torch.cat([(w[k] - base[k]).flatten() for k in base]) for w in (got, want))
    assert sami.torch.cosine_similarity(a, b, dim=0) > 0.8
    small = base["model.layers.0.mlp.up_proj.weight"].abs() > 0.5  # where bfloat16 has steps of 0.002 and more
    moved = (got["model.layers.0.mlp.up_proj.weight"] - base["model.layers.0.mlp.up_proj.weight"])[small].abs()
    assert small.sum() > 10 and 1e-5 < moved.median() < 1e-3


@pytest.mark.parametrize("name, processes", RUNS)
def test_fsdp_cuts_the_weights_and_ddp_does_not(ran, name, processes):
    several = json.loads((ran / f"{name}-{processes}.json").read_text())
    fsdp, parts = name.startswith("fsdp"), CASES[name].get("node") or processes
    assert all(each["sharded"] == fsdp for each in several)
    assert all(each["own"] == pytest.approx(1 / parts if fsdp else 1, abs=0.12) for each in several)


def test_fsdp_keeps_what_ends_a_text(ran):
    for name in ("ddp-2", "fsdp-2", "fsdp lock step-4"):
        assert json.loads((ran / name / "generation_config.json").read_text())["eos_token_id"] == [0, 5]


@pytest.mark.parametrize("name, processes", [("fsdp", 2), ("fsdp tied", 4), ("fsdp mixtral", 4), ("ddp", 2)])
def test_an_exported_model_scores_the_same_elsewhere(ran, name, processes):
    """What two or four processes saved, loaded by one that had no part in it."""
    there = json.loads((ran / f"{name}-{processes}.json").read_text())[0]["held"]
    model = AutoModelForCausalLM.from_pretrained(ran / f"{name}-{processes}").eval()
    cfg = sami.Config(n=3, max_new_tokens=8, tokens_per_pass=200, eval_queries=5, seed=3)
    here = sami.heldout_information(model, tiny.tokenizer(), sami.load_task(ran / "task"), cfg,
                                    sami.torch.device("cpu"), sami.torch.float32)
    for key in ("diagonal", "row_accuracy", "col_accuracy"):
        assert here[key] == pytest.approx(there[key], abs=1e-6)
    assert here["infonce"] == pytest.approx(there["infonce"], abs=1e-5)
