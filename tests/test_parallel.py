"""Two and four processes do what one does: same samples, same weights, however a model is cut."""
import contextlib, json, os, shlex, subprocess, sys, tempfile
from pathlib import Path

import pytest
import safetensors
import transformers as tr
from transformers import AutoModelForCausalLM

import parallel_worker, sami, tiny

SMALL = dict(
    vocab_size=len(tiny.LETTERS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    eos_token_id=0, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=0, pad_token_id=0)
GPT = dict(vocab_size=len(tiny.LETTERS), bos_token_id=0, eos_token_id=0)
MODELS = dict(
    llama=None, tied=None, mistied=None,  # the last: a config that says tied, and two matrices
    mixtral=tr.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    qwen2=tr.Qwen2Config(**SMALL, tie_word_embeddings=True, use_sliding_window=True,
                         sliding_window=8, max_window_layers=1),
    gemma2=tr.Gemma2Config(**SMALL, head_dim=8, sliding_window=8),
    gpt2=tr.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **GPT),
    gpt_neo=tr.GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=256,
                            attention_types=[[["global", "local"], 1]], window_size=8, **GPT),
    phi=tr.PhiConfig(**SMALL),  # an untied head with a bias, and a last norm of another name
    bloom=tr.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **GPT),
)
CASES = {  # name: flags of parallel_worker.case
    "ddp": dict(model="llama", parallel="ddp"),
    "ddp tied checkpointing": dict(model="tied", parallel="ddp", checkpointing=True),
    "ddp bloom": dict(model="bloom", parallel="ddp", temperature=1.0),
    "fsdp": dict(model="llama", parallel="fsdp"),
    "fsdp tied": dict(model="tied", parallel="fsdp"),
    "fsdp checkpointing rmsprop clipped": dict(
        model="llama", parallel="fsdp", checkpointing=True, optimizer="rmsprop", grad_clip=0.1),
    "fsdp mistied": dict(model="mistied", parallel="fsdp"),
    **{f"fsdp {name}": dict(model=name, parallel="fsdp", temperature=1.0) for name in MODELS
       if "tied" not in name and name != "llama"},
    "fsdp one query a step": dict(model="llama", parallel="fsdp", batch_size=1),
    "hybrid": dict(model="llama", parallel="hybrid", node=2),
    "hybrid tied": dict(model="tied", parallel="hybrid", node=2),
    "fsdp bfloat16": dict(model="llama", parallel="fsdp", dtype="bfloat16", given="given.jsonl"),
    "ddp bfloat16": dict(model="llama", parallel="ddp", dtype="bfloat16", given="given.jsonl"),
}
LOADING = {f"loading {way}": dict(model="large", measure="loading", parallel=way)
           for way in ("fsdp", "ddp")}
BY_FOUR = ["ddp", "fsdp tied", "fsdp mixtral", "hybrid", "hybrid tied", "fsdp one query a step"]
RUNS = [(name, 2) for name in CASES if "hybrid" not in name] + [(name, 4) for name in BY_FOUR]
WORKER = os.path.join(os.path.dirname(__file__), "parallel_worker.py")


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


def torchrun(processes, *arguments):
    """The command. Behind -- torchrun does not take --n=2 for a flag of its own."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc_per_node={processes}", "--", *arguments]


def environment():
    here = os.path.dirname(__file__)
    return dict(os.environ, OMP_NUM_THREADS="1",
                PYTHONPATH=os.pathsep.join([os.path.dirname(here), here]))


def launch(processes, *arguments, **how):
    return subprocess.run(torchrun(processes, *arguments), env=environment(), capture_output=True,
                          text=True, **how)


def start():
    """Begin all cases on 2, then on 4 processes, beside what else pytest runs (conftest.py) -> the
    process at work, the folder with what it leaves."""
    root = Path(tempfile.mkdtemp())
    tr.logging.disable_progress_bar()
    tiny.folder(root)
    for name in MODELS:
        build(name).save_pretrained(root / name), tiny.tokenizer().save_pretrained(root / name)
    # 304 MB, in bfloat16: it must be converted, where fp32 weights might stay in the file, mapped
    large = tr.LlamaConfig(
        vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=9,
        num_attention_heads=12, tie_word_embeddings=False)
    tr.LlamaForCausalLM(large).bfloat16().save_pretrained(root / "large")
    (root / "cases.json").write_text(json.dumps({**CASES, **LOADING}))
    config = json.loads((root / "mistied/config.json").read_text())
    config["tie_word_embeddings"] = True
    (root / "mistied/config.json").write_text(json.dumps(config))
    with contextlib.redirect_stdout(None):  # in bfloat16 other tokens win near ties
        parallel_worker.case(root / "llama", root / "given")
    (root / "given-run/samples/iteration-1.jsonl").rename(root / "given.jsonl")
    commands = []
    for processes in (2, 4):
        names = list(LOADING)[:4 // processes]  # first, while nothing else has been in memory
        names += [name for name, count in RUNS if count == processes]
        commands.append(shlex.join(torchrun(processes, WORKER, str(root), *names)))
    with open(root / "output", "w") as output:
        process = subprocess.Popen(  # yielding: other tests measure seconds
            ["nice", "-n", "19", "sh", "-c", " && ".join(commands)], stdout=output, stderr=output,
            env=environment(), process_group=0)
    return process, root


@pytest.fixture(scope="module")
def ran(request):
    process, root = request.config.parallel
    assert process.wait(600) == 0, (root / "output").read_text()[-8000:]
    return root


def saw(ran, name, processes):
    """What each process of a case saw."""
    return json.loads((ran / f"{name}-{processes}.json").read_text())


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def alone(ran):
    """The same in this process, on demand."""
    found = {}

    def run(name):
        if name not in found:
            flags = {k: v for k, v in CASES[name].items() if k not in ("parallel", "node")}
            found[name] = parallel_worker.case(ran / flags.pop("model"), ran / f"{name}-1", **flags)
        return json.loads(json.dumps(found[name])), weights(ran / f"{name}-1")
    return run


KEY_BIAS = ("c_attn.bias", "query_key_value.bias", "k_proj.bias")
EXACT = [(name, processes) for name, processes in RUNS if "bfloat16" not in name]


@pytest.mark.parametrize("name, processes", EXACT)
def test_several_processes_do_what_one_does(ran, alone, name, processes):
    one, want = alone(name)
    several, model = saw(ran, name, processes), CASES[name]["model"]
    got, base = weights(ran / f"{name}-{processes}"), weights(ran / model)
    assert len(several) == processes
    assert not one["wrapped"], "one process needs nothing around its model"
    for each in several:  # every process knows all
        assert each["examples"] == one["examples"]
        numbers = {e["number"] for e in each["examples"]}
        assert len(numbers) == len(each["examples"]) == 8, "each query once"
        assert len(each["reports"]) == len(one["reports"]) == 2
        for r, s in zip(each["reports"], one["reports"]):
            for key in ("loss", "kl", "diagonal"):
                assert r[key] == pytest.approx(s[key], abs=2e-6 if key == "diagonal" else 1e-6)
            assert r["grad_norm"] == pytest.approx(s["grad_norm"], rel=1e-3)
        assert one["shared"] == (model != "bloom")
        # phi: transformers gathers its head for the head's own forward pass alone, which the fast
        # way to score does not run
        assert each["shared"] == (one["shared"] and model != "phi")
        assert each["held"] == pytest.approx(one["held"], abs=1e-4)
        assert each["scored"] == one["scored"] == sorted(set(one["scored"])) != []
    # a key's bias moves all scores of a query alike: its gradient is 0, and an optimizer makes
    # steps out of rounding
    keys = [k for k in want if not k.endswith(KEY_BIAS)]
    assert max((want[k] - base[k]).abs().max() for k in keys) > 2e-4, "the model has moved"
    far = max((got[k] - want[k]).abs().max() for k in keys)
    print(f"{name} on {processes}: weights differ by {far:.1e}")
    assert far < 2e-5


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_computing_in_bfloat16_is_close_and_the_weights_stay_fp32(ran, alone, name):
    """fp32 weights, brought together in bfloat16: the loss of the same samples within its rounding,
    no step lost in it."""
    one, want = alone("fsdp")
    [first, second] = saw(ran, f"{name} bfloat16", 2)
    assert first["shared"] and second["shared"], "and responses share a prompt as ever"
    for r, s in zip(first["reports"], one["reports"]):
        assert 1e-6 < abs(r["loss"] - s["loss"]) < 0.02
        assert r["grad_norm"] == pytest.approx(s["grad_norm"], rel=0.05)
    got, base = weights(ran / f"{name} bfloat16-2"), weights(ran / "llama")
    a, b = (sami.torch.cat([(w[k] - base[k]).flatten() for k in base]) for w in (got, want))
    assert sami.torch.cosine_similarity(a, b, dim=0) > 0.8
    key = "model.layers.0.mlp.up_proj.weight"
    small = base[key].abs() > 0.5  # where bfloat16 has steps of 0.002 and more
    moved = (got[key] - base[key])[small].abs()
    assert small.sum() > 10 and 1e-5 < moved.median() < 1e-3


@pytest.mark.parametrize("name, processes", RUNS)
def test_fsdp_cuts_the_weights_and_ddp_does_not(ran, name, processes):
    parts = dict(ddp=1, fsdp=processes, hybrid=2)[name.split()[0]]
    for each in saw(ran, name, processes):
        assert each["wrapped"] and each["own"] == pytest.approx(1 / parts, abs=0.13)


def names_and_bytes(folder):
    """The weights in a model folder's files -> their names, the files' size together."""
    files, names = sorted(folder.glob("*.safetensors")), []
    for file in files:
        with safetensors.safe_open(file, "pt") as f:
            names += f.keys()
    return sorted(names), sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("name, processes", RUNS)
def test_what_is_saved_holds_each_weight_once(ran, name, processes):
    """As in the base's folder: of a tied pair one, of a pair that is not tied both."""
    names, size = names_and_bytes(ran / f"{name}-{processes}")
    want, base_size = names_and_bytes(ran / CASES[name]["model"])
    assert names == want and abs(size / base_size - 1) < 0.01
    assert "distributed_config" not in (ran / f"{name}-{processes}/config.json").read_text()


@pytest.mark.parametrize("name, processes", RUNS)
def test_what_ends_a_text_is_kept(ran, name, processes):
    """generation_config.json, which no skeleton of the model has."""
    got, want = (json.loads((folder / "generation_config.json").read_text()) for folder in
                 (ran / f"{name}-{processes}", ran / CASES[name]["model"]))
    assert got == want
    assert CASES[name]["model"] != "llama" or got["eos_token_id"] == [0, 5]


@pytest.mark.parametrize("name, processes", EXACT)
def test_an_exported_model_scores_the_same_elsewhere(ran, name, processes):
    """What two or four processes saved, loaded by one that had no part in it."""
    there = saw(ran, name, processes)[0]["held"]
    cfg = sami.Config(
        n=3, max_new_tokens=8, tokens_per_pass=200, eval_queries=5, seed=3, device="cpu")
    model = sami.load_model(str(ran / f"{name}-{processes}"), sami.pick_device(cfg), cfg)
    here, _ = sami.heldout_information(model, tiny.tokenizer(), sami.load_task(ran / "task"), cfg)
    for key in ("diagonal", "row_accuracy", "col_accuracy"):
        assert here[key] == pytest.approx(there[key], abs=1e-6)
    assert here["infonce"] == pytest.approx(there["infonce"], abs=1e-5)


@pytest.mark.parametrize("name, processes, least, most", [
    ("loading fsdp", 2, 0.45, 0.7), ("loading fsdp", 4, 0.22, 0.45), ("loading ddp", 2, 0.8, 3)])
def test_with_fsdp_no_process_ever_holds_the_whole_model(ran, name, processes, least, most):
    """Each reads the part that it will hold; with ddp, as a check of the measurement, all."""
    for each in saw(ran, name, processes):
        print(f"{name} on {processes}: peak {each['peak']:.2f}, then {each['after']:.2f}")
        assert each["bytes"] > 250e6 and least < each["after"] <= each["peak"] < most
