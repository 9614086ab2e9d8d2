"""What plan.py says of memory is there: counted weights, saved activations, cached keys."""
import json, re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, MixtralConfig

import plan, sami, tiny

HALF = torch.bfloat16
SHAPE = dict(vocab_size=300, num_attention_heads=8, bos_token_id=0, eos_token_id=0)
# the first has Mistral's proportions
WIDTHS = [dict(hidden_size=256, intermediate_size=896, num_key_value_heads=2),
          dict(hidden_size=256, intermediate_size=512, num_key_value_heads=8),
          dict(hidden_size=128, intermediate_size=448, num_key_value_heads=4)]


def flags(**values):
    return plan.Config(**{**dict(tokens_per_pass=1000), **values})


def planned(config, dtype, parts, **values):
    return plan.memory(flags(**values), plan.empty_model(config), dtype, parts)



def saved(config, dtype, autocast, prompt):
    """Bytes that autograd keeps for the backward pass of a scoring pass, weights apart, and tokens
    in it."""
    model, kept = AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # a last token predicts nothing: 32 are read
    prompts, siblings = [list(range(prompt))] * 2, [[[1] * 17] * 2] * 2

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            # t itself, so that no address comes twice
            kept[t.untyped_storage().data_ptr()] = t, t.untyped_storage().nbytes()
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, torch.autocast("cpu", HALF, enabled=autocast):
        model.shares_prompts = sami.can_share(model, [[1, 2]], [[[3, 4], [5]]])
        logps = sami.score(model, prompts, siblings)
    return sum(size for _, size in kept.values()), 2 * (prompt + 32), logps


def of_a_layer(config, dtype=torch.float32, autocast=False):
    """Bytes a token, without what does not grow with the tokens (cast weights) or with layers."""
    def slope(layers):
        config.num_hidden_layers = layers
        (a, s, _), (b, t, _) = (saved(config, dtype, autocast, prompt) for prompt in (64, 192))
        return (b - a) / (t - s)
    return slope(3) - slope(2)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("parts, dtype, how", [(1, torch.float32, {}),
                                               (1, HALF, dict(autocast=True)),
                                               (8, HALF, dict(dtype=HALF))])
def test_activations_are_those_that_autograd_keeps(widths, parts, dtype, how):
    two, three = (LlamaConfig(**SHAPE, **widths, num_hidden_layers=layers) for layers in (2, 3))
    found = [planned(c, dtype, parts)["activations"] / 1000 for c in (two, three)]
    assert found[1] - found[0] == pytest.approx(of_a_layer(two, **how), rel=0.1)


def test_checkpointing_keeps_what_lies_between_layers_and_one_layer():
    config = LlamaConfig(**SHAPE, **WIDTHS[0], num_hidden_layers=12)
    whole, less = (planned(config, torch.float32, 1, checkpointing=c)["activations"]
                   for c in (False, True))
    gradients = 1000 * 4 * (2 * 256 + 3 * 896)
    assert less - gradients == pytest.approx(1000 * 12 * 4 * 256 + (whole - gradients) / 12)


def test_weights_gradients_and_optimizer_are_counted():
    config = LlamaConfig(**SHAPE, **WIDTHS[0], num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim() > 0)
    for parts in (1, 4):
        found = planned(config, HALF, parts)
        gradients = sum(p.grad.nbytes for p in model.parameters())
        assert found["weights"] == found["gradients"] == gradients / parts
        assert found["optimizer (adamw)"] == state / parts
    assert planned(config, HALF, 1, optimizer="rmsprop")["optimizer (rmsprop)"] == state / 2
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = sum(p.numel() for p in model.parameters()) - 2 * layer
    assert planned(config, HALF, 4)["weights at work"] == 2 * 2 * (2 * layer + outside)


ROOT = sami.Path(sami.__file__).parent
SIZES = {"hh/mistral-7b": 7.24, "tldr/mistral-7b": 7.24, "tldr/mixtral-8x7b": 46.7,
         "principles/llama3-70b": 70.6, "tldr/small": 0.362, "stories/tinystories-33m": 0.0685}
LLAMA = "--preset=data/principles/llama3-70b.json"


@pytest.fixture
def told(capsys, monkeypatch):
    """What the command says."""
    monkeypatch.chdir(ROOT)

    def command(*args):
        plan.main(args)
        return capsys.readouterr().out
    return command


@pytest.mark.parametrize("preset", SIZES)
def test_every_preset_has_a_plan_without_a_download(preset, told, monkeypatch):
    monkeypatch.setattr(sami, "load_model", None)
    monkeypatch.setattr(sami, "load_tokenizer", None)
    out = told(f"--preset=data/{preset}.json", "--gpus=8", "--gpu_memory=80")
    assert f"{SIZES[preset]:g}B weights on 8 x 80 GB" in out and out.count("\niteration ") == 3
    figures = map(float, re.search(r"all +([\d.]+) +([\d.]+)", out).groups())
    way = next((way for way, gb in zip(("ddp", "fsdp"), figures) if gb < 76), None)
    assert f"fits, as {way}" in out if way else "does not fit; " in out


def test_what_would_fit_does_fit(told):
    enough = int(re.search(r"does not fit; (\d+) such GPUs would do", told(LLAMA, "--gpus=8"))[1])
    assert "fits, as fsdp" in told(LLAMA, f"--gpus={enough}")
    assert "does not fit" in told(LLAMA, f"--gpus={enough - 1}")
    out = told(LLAMA, "--gpus=8", "--gpu_memory=10", "--checkpointing=False")
    hint = "no number of such GPUs would do: lower --tokens_per_pass, or add --checkpointing"
    assert hint in out


def test_sampling_has_room_for_whole_weights_or_is_left_to_another_engine(told):
    for gpu, fits in ((80, False), (141, False), (200, True)):  # 141 GB of weights in bfloat16
        out = told(LLAMA, "--gpus=16", f"--gpu_memory={gpu}")
        assert ("responses side by side" in out) == fits == ("of training" not in out)
        assert ("sample with another engine" in out) != fits
    rows = lambda gpu: int(re.search(r"room for (\d+) ", told(LLAMA, "--gpus=16", gpu))[1])
    # what is between two GPUs, over keys and values of 211 + 350 tokens, twice
    more = 0.95 * 40e9 / 2 / (4 * 80 * 1024 * (211 + 350))
    assert rows("--gpu_memory=240") - rows("--gpu_memory=200") == pytest.approx(more, rel=0.01)
    assert "lower --sample_batch, now 64" in told(LLAMA, "--gpus=16", "--gpu_memory=175")


def test_a_folder_is_read_and_its_cache_measured(tmp_path, told):
    tiny.folder(tmp_path)
    out = told(f"--task={tmp_path}/task", f"--model={tmp_path}/base", "--dtype=float32",
               "--gpu_memory=0.001", "--tokens_per_pass=10")
    cache, model = DynamicCache(), tiny.model()
    model(torch.tensor([[1] * 1000]), past_key_values=cache)
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 1000
    assert f"{nbytes / 1e3:.3g} kB of keys and values a token" in out and nbytes == 256


@pytest.mark.parametrize("flag", ["--steps=2,x,6", "--steps=2,4", "--gpus=-1", "--gpu_memory=0"])
def test_bad_flags_are_refused(flag):
    with pytest.raises(sami.BadInput, match=flag.split("=")[0]):
        plan.main([flag])


def test_experts_count_as_weights_but_work_as_few():
    config = MixtralConfig(**SHAPE, **WIDTHS[0], num_hidden_layers=2, num_local_experts=8,
                           num_experts_per_tok=2)
    wide = {**WIDTHS[0], "intermediate_size": 2 * 896}
    moe = planned(config, torch.float32, 1)
    like = planned(LlamaConfig(**SHAPE, **wide, num_hidden_layers=2), torch.float32, 1)
    assert moe["activations"] == like["activations"] and moe["weights"] > 3 * like["weights"]


def test_the_shapes_of_the_presets_are_known():
    for kind, values in plan.SHAPES.values():
        assert AutoConfig.for_model(kind, **values).get_text_config().hidden_size > 0
    presets = [json.loads((ROOT / f"data/{name}.json").read_text()) for name in SIZES]
    assert {preset["model"] for preset in presets} == set(plan.SHAPES)
