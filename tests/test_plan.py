"""What --plan says of memory is what is there: counted weights, saved activations, cached keys and values."""
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, MixtralConfig

import sami, tiny

HALF = torch.bfloat16
SHAPE = dict(vocab_size=300, num_attention_heads=8, bos_token_id=0, eos_token_id=0)
WIDTHS = [dict(hidden_size=256, intermediate_size=896, num_key_value_heads=2),  # Mistral's proportions
          dict(hidden_size=256, intermediate_size=512, num_key_value_heads=8),
          dict(hidden_size=128, intermediate_size=448, num_key_value_heads=4)]


def flags(**values):
    return sami.Config(**{**dict(tokens_per_pass=1000), **values})


def saved(config, dtype, autocast, prompt):
    """Bytes that autograd keeps for the backward pass of a scoring pass, weights apart, and tokens in it."""
    model, kept = AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    prompts, siblings = [list(range(prompt))] * 2, [[[1] * 17] * 2] * 2  # a last token predicts nothing: 32 are read

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t, t.untyped_storage().nbytes()  # t: no address may come twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", HALF, enabled=autocast):
        model.can_share = {True: True}
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
@pytest.mark.parametrize("parts, dtype, how", [(1, torch.float32, {}), (1, HALF, dict(autocast=True)),
                                               (8, HALF, dict(dtype=HALF))])
def test_activations_are_those_that_autograd_keeps(widths, parts, dtype, how):
    two, three = (LlamaConfig(**SHAPE, **widths, num_hidden_layers=layers) for layers in (2, 3))
    planned = [sami.memory(flags(), sami.empty_model(c), dtype, parts)["activations"] / 1000 for c in (two, three)]
    assert planned[1] - planned[0] == pytest.approx(of_a_layer(two, **how), rel=0.1)


def test_checkpointing_keeps_what_lies_between_layers_and_one_layer():
    model = sami.empty_model(LlamaConfig(**SHAPE, **WIDTHS[0], num_hidden_layers=12))
    whole, less = (sami.memory(flags(checkpointing=c), model, torch.float32, 1)["activations"] for c in (False, True))
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
        planned = sami.memory(flags(), sami.empty_model(config), HALF, parts)
        assert planned["weights"] == planned["gradients"] == sum(p.grad.nbytes for p in model.parameters()) / parts
        assert planned["optimizer (adamw)"] == state / parts
    planned = sami.memory(flags(optimizer="rmsprop"), sami.empty_model(config), HALF, 1)
    assert planned["optimizer (rmsprop)"] == state / 2
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = sum(p.numel() for p in model.parameters()) - 2 * layer
    assert sami.memory(flags(), sami.empty_model(config), HALF, 4)["weights at work"] == 2 * 2 * (2 * layer + outside)


def plan(*args):
    code, out, err = tiny.command("--plan", *args)
    assert code == 0, err
    return out


SIZES = {"hh-mistral-7b": 7.24, "tldr-mistral-7b": 7.24, "tldr-mixtral-8x7b": 46.7, "principles-llama3-70b": 70.6,
         "tldr-small": 0.362, "stories": 0.0685}


@pytest.mark.parametrize("preset", sami.PRESETS)
def test_every_preset_has_a_plan_without_a_download(preset, monkeypatch):
    monkeypatch.setattr(sami, "load_model", None)
    monkeypatch.setattr(sami, "load_tokenizer", None)
    out = plan(f"--preset={preset}", "--gpus=8", "--gpu_memory=80")
    assert f"{SIZES[preset]:g}B weights on 8 x 80 GB" in out and out.count("\niteration ") == 3
    total = {way: float(x) for way, x in zip(("ddp", "fsdp"), re.search(r"all +([\d.]+) +([\d.]+)", out).groups())}
    way = next((way for way, gb in total.items() if gb < 76), None)
    assert f"fits, as {way}" in out if way else "does not fit; " in out


def test_what_would_fit_does_fit():
    out = plan("--preset=principles-llama3-70b", "--gpus=8")
    enough = int(re.search(r"does not fit; (\d+) such GPUs would do", out)[1])
    assert "fits, as fsdp" in plan("--preset=principles-llama3-70b", f"--gpus={enough}")
    assert "does not fit" in plan("--preset=principles-llama3-70b", f"--gpus={enough - 1}")
    out = plan("--preset=principles-llama3-70b", "--gpus=8", "--gpu_memory=10", "--checkpointing=False")
    assert "no number of such GPUs would do: lower --tokens_per_pass, or add --checkpointing" in out


def test_a_folder_is_read_and_its_cache_measured(tmp_path):
    tiny.folder(tmp_path)
    out = plan(f"--task={tmp_path}/task", f"--model={tmp_path}/base", "--dtype=float32", "--gpu_memory=0.001",
               "--tokens_per_pass=10")
    cache, model = DynamicCache(), tiny.model()
    model(torch.tensor([[1] * 1000]), past_key_values=cache)
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 1000
    assert f"{nbytes / 1e3:.3g} kB of keys and values a token" in out and nbytes == 256


def test_processes_choose_ddp_while_it_fits(monkeypatch):
    config = LlamaConfig(**SHAPE, **WIDTHS[0], num_hidden_layers=2)
    need, gpu = sum(sami.memory(flags(), sami.empty_model(config), HALF, 1).values()), torch.device("cuda", 0)
    for room, way in ((need / 0.95 * 1.01, "ddp"), (need / 0.95 * 0.99, "fsdp")):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), dict(total_memory=room)))
        monkeypatch.setattr(sami, "WORLD", 2), monkeypatch.setattr(sami, "total", lambda numbers: numbers)
        assert sami.pick_parallel(flags(), config, gpu, HALF) == way
        assert sami.pick_parallel(flags(parallel="ddp"), config, gpu, HALF) == "ddp"
        monkeypatch.setattr(sami, "WORLD", 1)
        assert sami.pick_parallel(flags(parallel="fsdp"), config, gpu, HALF) == "none"


def test_experts_count_as_weights_but_work_as_few():
    config = MixtralConfig(**SHAPE, **WIDTHS[0], num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2)
    dense = LlamaConfig(**SHAPE, **{**WIDTHS[0], "intermediate_size": 2 * 896}, num_hidden_layers=2)
    moe, like = (sami.memory(flags(), sami.empty_model(c), torch.float32, 1) for c in (config, dense))
    assert moe["activations"] == like["activations"] and moe["weights"] > 3 * like["weights"]


def test_the_shapes_of_the_presets_are_known():
    for kind, values in sami.SHAPES.values():
        assert AutoConfig.for_model(kind, **values).get_text_config().hidden_size > 0
    assert {preset["model"] for preset in sami.PRESETS.values()} == set(sami.SHAPES)
