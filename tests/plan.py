"""
What a run needs on each GPU and about how long it takes, before anything loads: arithmetic, no
weights, no GPU. bench.py holds the memory to measured peaks.

    python tests/plan.py --preset=data/tldr/mistral-7b.json --gpus=8 --gpu_memory=80

Takes the flags of sami.py and three of its own. Models of the presets are known without a download.
"""
import bisect, math, sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sami  # noqa: E402

# kind of model, and what differs from its usual values
SHAPES = {
    "mistralai/Mistral-7B-v0.1": ("mistral", {}),
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", {}),
    "meta-llama/Meta-Llama-3-70B": ("llama", dict(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8)),
    "HuggingFaceTB/SmolLM2-360M": ("llama", dict(
        vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32,
        num_attention_heads=15, num_key_value_heads=5, tie_word_embeddings=True)),
    "roneneldan/TinyStories-33M": ("gpt_neo", dict(
        hidden_size=768, num_layers=4, attention_types=[[["global", "local"], 2]])),
}


@dataclass
class Config(sami.Config):
    gpus: int = sami.flag(0, "how many; 0 = as many as there are processes", low=0)
    gpu_memory: float = sami.flag(80.0, "of each, GB", low=1e-6)
    gpu_tflops: float = sami.flag(300.0, "of each, as reached in bfloat16", low=1e-6)


def empty_model(config):
    """A model without memory for its weights: shapes and names alone."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def blocks(model):
    """The layers that repeat."""
    return [m for m in model.modules() if type(m).__name__ in set(model._no_split_modules or [])]


def weight_count(modules):
    return sum(p.numel() for m in modules for p in m.parameters())


def memory(cfg, model, dtype, parts):
    """Bytes on each GPU in training, with the (empty) model cut into `parts`, 1 = whole ->
    {what: bytes}."""
    text, half = model.config.get_text_config(), dtype != torch.float32
    size, layers = weight_count([model]), blocks(model) or [model]
    experts = getattr(text, "num_experts_per_tok", None) or 1
    wide = experts * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    # bytes that a layer keeps of a token for the backward pass, linear in both widths: fitted to
    # what saved_tensors_hooks shows
    a, b = (37, 16) if not half else (35, 8.5) if parts == 1 else (23, 8.2)
    layer = a * text.hidden_size + b * wide
    between = (2 if half and parts > 1 else 4) * text.hidden_size
    kept = len(layers) * between + layer if cfg.checkpointing else len(layers) * layer
    # gradients within the layer that backward is in
    kept += (2 if half else 4) * (2 * text.hidden_size + 3 * wide)
    # a bfloat16 copy of all; or two layers and what is outside of layers, with their gradients
    together = 2 * weight_count(layers[:1]) + size - weight_count(layers)
    return {"weights": 4 * size / parts, "gradients": 4 * size / parts,
            f"optimizer ({cfg.optimizer})": (8 if cfg.optimizer == "adamw" else 4) * size / parts,
            "weights at work": 2 * (2 if half else 4) * together if parts > 1 else 2 * size * half,
            "activations": cfg.tokens_per_pass * kept}


def read_config(cfg):
    """-> the model's config, and a function: how many tokens has a prompt?"""
    if cfg.model in SHAPES:  # no tokenizer without a download: a token has about four letters
        from transformers import AutoConfig
        kind, values = SHAPES[cfg.model]
        return AutoConfig.for_model(kind, **values), lambda prompt: len(sami.Task.flat(prompt)) / 4
    config, tokenizer = sami.load_tokenizer(cfg.model)
    return config, lambda prompt: len(sami.encode(tokenizer, prompt)[0])


def plan_training(cfg, model, dtype, gpus, room):
    """Print what training takes of each GPU -> ddp, fsdp, or None where it does not fit."""
    ways = dict(ddp=memory(cfg, model, dtype, 1), fsdp=memory(cfg, model, dtype, gpus))
    if gpus == 1:
        del ways["fsdp"]
    print(f"{cfg.model}: {weight_count([model]) / 1e9:.3g}B weights on {gpus} x {cfg.gpu_memory:g} "
          f"GB, computing in {str(dtype)[6:]}")
    names = [way if gpus > 1 else "whole" for way in ways]
    print(f"{'GB on each GPU':<22}" + "".join(f"{name:>8}" for name in names))
    for name in [*ways["ddp"], "all"]:
        figures = [w.get(name, sum(w.values())) / 1e9 for w in ways.values()]
        print(f"  {name:<20}" + "".join(f"{figure:8.1f}" for figure in figures))
    way = next((way for way, parts in ways.items() if sum(parts.values()) < room), None)
    fits = lambda gpus: sum(memory(cfg, model, dtype, gpus).values()) < room
    enough = bisect.bisect_left(range(1025), True, lo=2, key=fits)
    if way:
        print("fits" + f", as {way}" * (gpus > 1))
    else:
        hint = ": lower --tokens_per_pass" + ", or add --checkpointing" * (not cfg.checkpointing)
        print("does not fit; " + (f"{enough} such GPUs would do" if enough < 1025 else
                                  f"no number of such GPUs would do{hint}"))
    return way


def plan_sampling(cfg, model, dtype, parts, room, length):
    """Print what sampling takes of each GPU, responses and prompts of `length` tokens -> how many
    responses run side by side; 0 where the weights, which come together, leave no room."""
    text, size = model.config.get_text_config(), weight_count([model])
    kv = 2 * len(blocks(model)) * text.hidden_size * dtype.itemsize  # bytes a token
    heads = text.num_attention_heads
    kv *= (getattr(text, "num_key_value_heads", None) or heads) / heads
    left = room - 4 * size / parts - size * dtype.itemsize
    print(f"sampling: {kv / 1e3:.3g} kB of keys and values a token, ", end="")
    if left < 2 * kv * length:  # the cache is copied when rows leave
        print("no room for the whole weights on each GPU: sample with another engine")
        return 0
    most = int(left / 2 / kv / length)
    print(f"room for {most} responses side by side on each GPU"
          + f": lower --sample_batch, now {cfg.sample_batch}" * (most < cfg.sample_batch))
    return min(most, cfg.sample_batch)


def plan_time(cfg, model, steps, gpus, batch, sampled, scored):
    """Print what each iteration reads and how long it takes. batch: responses side by side, 0 =
    another engine samples; sampled, scored: tokens of a prompt."""
    text, size = model.config.get_text_config(), weight_count([model])
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    used = getattr(text, "num_experts_per_tok", 1) / getattr(text, "num_local_experts", 1)
    active = size - experts * (1 - used)
    for iteration, count in enumerate(steps, 1):
        responses = count * cfg.batch_size * cfg.n
        trained = responses * (scored + cfg.n * cfg.max_new_tokens)
        work = active * trained * (6 + 2 * cfg.checkpointing + 2 * (cfg.beta > 0))
        seconds = work / gpus / cfg.gpu_tflops / 1e12
        if batch:  # a token takes a millisecond a layer
            seconds += 2 * active * responses * sampled / gpus / cfg.gpu_tflops / 1e12
            rounds = math.ceil(responses / gpus / batch) * cfg.max_new_tokens
            seconds += rounds * 1e-3 * len(blocks(model))
        print(f"iteration {iteration}: {responses} responses of up to {cfg.max_new_tokens} tokens "
              f"to prompts of about {sampled:.0f}, {trained / 1e6:.2f}M tokens a pass over them; "
              f"about {math.ceil(seconds / 60)} min" + " of training" * (not batch))


def main(argv):
    cfg = sami.parse(Config, argv)
    steps = [int(k) if k.isdigit() else 0 for k in cfg.steps.split(",")]
    steps = steps * cfg.iterations if len(steps) == 1 else steps
    sami.need(len(steps) == cfg.iterations and min(steps) > 0,
              f"--steps={cfg.steps}: give a whole number, or one for each of {cfg.iterations}")
    task, gpus, room = sami.load_task(cfg.task), cfg.gpus or sami.WORLD, 0.95e9 * cfg.gpu_memory
    config, count = read_config(cfg)
    model, dtype = empty_model(config), getattr(torch, cfg.dtype.replace("auto", "bfloat16"))
    c, queries = task.draw(np.random.default_rng(cfg.seed), 1)[0], task.train[:100]
    sampled, scored = (float(np.mean([count(fill(q["query"], c)) for q in queries]))
                       for fill in (task.sampling_prompt, task.prompt))
    way = plan_training(cfg, model, dtype, gpus, room)
    parts = 1 if way == "ddp" else gpus
    batch = plan_sampling(cfg, model, dtype, parts, room, sampled + cfg.max_new_tokens)
    plan_time(cfg, model, steps, gpus, batch, sampled, scored)


if __name__ == "__main__":
    sami.run(main)
