"""Sharing a prompt is exact for every architecture that heeds the mask, and noticed elsewhere."""
import pytest
import torch
import transformers as tr

import sami
from test_logps import PROMPTS, RESPONSES, V, by_cells  # ragged: 9, 14, 5 and 7, 1, 12 tokens

SMALL = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)
LLAMA = dict(SMALL, intermediate_size=48, num_key_value_heads=2)
MOE = dict(LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
           norm_topk_prob=True)
HEAD = dict(LLAMA, head_dim=8)
NEAR = dict(sliding_window=40)  # as long as the texts below
MIXED = dict(NEAR, num_hidden_layers=3,
             layer_types=["sliding_attention", "full_attention", "sliding_attention"])
EAGER = dict(attn_implementation="eager")
EXACT = {  # model type, and what is special about it
    **dict.fromkeys("llama olmo2 phi phi3 qwen2 stablelm".split(), LLAMA),
    **dict.fromkeys("gpt2 gpt_bigcode gpt_neox".split(), SMALL),
    **dict.fromkeys(["mistral window", "phi3 window", "starcoder2 window"], dict(LLAMA, **NEAR)),
    "mistral": dict(LLAMA, sliding_window=None),
    "mixtral": dict(LLAMA, sliding_window=None, num_local_experts=4),
    "qwen2 mixed": dict(LLAMA, use_sliding_window=True, **MIXED),
    "qwen3": HEAD, "qwen3_moe": dict(MOE, head_dim=8), "olmoe": MOE,
    "deepseek_v3": dict(LLAMA, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
                        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4,
                        num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=24,
                        first_k_dense_replace=1),
    "cohere": dict(LLAMA, logit_scale=0.3),
    "cohere2 mixed": dict(LLAMA, logit_scale=0.3, **MIXED),
    "granite": dict(LLAMA, logits_scaling=3.0, residual_multiplier=0.5),
    "falcon": dict(SMALL, alibi=False), "gptj": dict(SMALL, rotary_dim=4),
    "opt": dict(SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "gemma2 mixed": dict(HEAD, query_pre_attn_scalar=8, attn_logit_softcapping=2.0,
                         final_logit_softcapping=5.0, **MIXED, **EAGER),
    "gemma3_text mixed": dict(HEAD, query_pre_attn_scalar=8, **MIXED),
    "exaone4 mixed": dict(LLAMA, **MIXED),
    "gpt_oss mixed": dict(HEAD, num_local_experts=4, num_experts_per_tok=2, **MIXED, **EAGER),
    "smollm3": dict(LLAMA, no_rope_layers=[1, 0]),
    "gpt_neo": dict(SMALL, attention_types=[[["global", "local"], 1]], num_layers=2,
                    window_size=40),
}
WINDOWS = {name: kind for name, keys in EXACT.items() for kind in keys
           if kind in ("sliding_window", "window_size") and keys[kind]}
APART = {  # attention by distance in the row, convolution, recurrence, a model without a body
    "bloom": SMALL,
    "mpt": dict(vocab_size=V, d_model=32, n_heads=4, n_layers=2),
    "llama4_text": dict(HEAD, num_local_experts=2, intermediate_size_mlp=48),
    "qwen3_next": dict(MOE, head_dim=8, shared_expert_intermediate_size=24,
                       linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
                       linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"]),
    "lfm2": dict(LLAMA, block_multiple_of=8, layer_types=["conv", "full_attention"]),
    "mamba2": dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8,
                   state_size=8, n_groups=1, chunk_size=8),
}
SIBLINGS = [RESPONSES] * len(PROMPTS)


def build(name):
    torch.manual_seed(0)
    config = tr.AutoConfig.for_model(name.split()[0], **{**EXACT, **APART}[name])
    model = tr.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():  # large enough that every token read shows, and no bias is zero
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3 if p.dim() > 1 else 0.1)
    return model


def values_and_gradients(model, logps):
    got = logps(model, PROMPTS, SIBLINGS)
    cells = iter(got.split([len(y) for ys in SIBLINGS for y in ys]))
    model.zero_grad()
    matrix = sami.as_matrix([[next(cells) for _ in ys] for ys in SIBLINGS], "mean")
    sami.sami_loss(matrix).backward()
    return got.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone()
                          for p in model.parameters()]


def assert_same_gradients(got, want, tolerance):
    """Each parameter's largest error against its largest entry; some are zero but for rounding (a
    bias on the keys)."""
    top = max(g.abs().max() for g in want)
    assert top > 0.01
    for fast, slow in zip(got, want):
        assert (fast - slow).abs().max() <= tolerance * slow.abs().max() + 1e-6 * top


@pytest.mark.parametrize("name", EXACT)
def test_sharing_is_exact(name, capsys):
    model = build(name)
    assert sami.can_share(model, PROMPTS, SIBLINGS) and not capsys.readouterr().out
    fast, slow = (values_and_gradients(model, f) for f in (sami.shared_logps, sami.plain_logps))
    assert ((fast[0] - slow[0]).abs() <= 2e-6 * (1 + slow[0].abs())).all()
    assert_same_gradients(fast[1], slow[1], 2e-5)


@pytest.mark.parametrize("name", APART)
def test_where_a_layer_does_not_heed_the_mask_pairs_are_scored_apart(name, capsys):
    model = build(name)
    assert not sami.can_share(model, PROMPTS, SIBLINGS)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("scoring every pair apart")
    with torch.no_grad():
        got, want = (matrix(model, PROMPTS, RESPONSES) for matrix in (sami.logp_matrix, by_cells))
    assert torch.allclose(got, want, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_text_longer_than_a_window_is_scored_apart(name, monkeypatch):
    """Its row, that is: there a layer does not see all, and the mask knows nothing of it."""
    keys = dict(EXACT[name], **{WINDOWS[name]: 16})
    monkeypatch.setitem(EXACT, name, keys)
    model, fast = build(name), []
    real = sami.shared_logps
    monkeypatch.setattr(sami, "shared_logps", lambda *args: fast.append(1) or real(*args))
    with torch.no_grad():
        for prompts, responses, shared in ((PROMPTS, RESPONSES, False),
                                           ([p[:9] for p in PROMPTS], [[5, 6], [7]], True)):
            got, want = (f(model, prompts, responses) for f in (sami.logp_matrix, by_cells))
            assert torch.allclose(got, want, rtol=1e-6, atol=2e-6)
            assert model.shares_prompts and len(fast) == 1 + shared, "the first time is the check"


@pytest.mark.parametrize("name", EXACT)
def test_a_wrong_mask_is_noticed(name, monkeypatch, capsys):
    model, right = build(name), sami.sibling_mask
    places = lambda position: torch.arange(position.shape[1]).expand_as(position)
    # siblings see each other
    monkeypatch.setattr(sami, "sibling_mask", lambda segment: right(segment.clamp(max=0)))
    assert not sami.can_share(model, PROMPTS, SIBLINGS)
    # and with the right one, positions that do not restart
    monkeypatch.setattr(sami, "sibling_mask", right)
    row_places = lambda kw: {k: places(v) if k == "position_ids" and v is not None else v
                             for k, v in kw.items()}
    model.base_model.register_forward_pre_hook(
        lambda module, args, kw: (args, row_places(kw)), with_kwargs=True)
    assert not sami.can_share(model, PROMPTS, SIBLINGS)
    assert capsys.readouterr().out.count("log-probs differ") == 2


CHECKPOINTED = ["llama", "mixtral", "qwen2 mixed", "gemma2 mixed", "gpt_oss mixed"]


@pytest.mark.parametrize("name", CHECKPOINTED)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")  # renamed in newer versions
def test_gradient_checkpointing_changes_nothing(name):
    model, runs = build(name), []
    model.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    want = values_and_gradients(model, sami.shared_logps)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    got = values_and_gradients(model, sami.shared_logps)
    assert len(runs) == 1 + 2, "without checkpoints once, with them again for backward"
    assert torch.equal(got[0], want[0])
    assert_same_gradients(got[1], want[1], 1e-6)


def head(rows, vocabulary, size, dtype=torch.float32):
    """Hidden states, output matrix, bias; the tokens to score and what each weighs in the loss."""
    g = torch.Generator().manual_seed(0)
    shapes = (rows, size), (vocabulary, size), (vocabulary,)
    h, w, b = (torch.randn(*s, generator=g) for s in shapes)
    return ([h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), b.requires_grad_()],
            torch.randint(vocabulary, (rows,), generator=g), torch.randn(rows, generator=g))


def test_the_size_of_a_chunk_of_logits_changes_nothing():
    (h, w, b), target, weight = head(40, 2**19, 3)  # 8 rows at a time
    whole = sami.head_logps(h, w, b, target, 0.5, 3.0)
    parts = torch.cat([sami.head_logps(h[s:s + 5], w, b, target[s:s + 5], 0.5, 3.0)
                       for s in range(0, 40, 5)])
    assert torch.allclose(whole, parts, rtol=1e-6, atol=1e-6)
    slopes = (torch.autograd.grad((weight * logp).sum(), (h, w, b)) for logp in (whole, parts))
    for got, want in zip(*slopes):
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("scale, cap", [(1, None), (0.5, 5.0)])
def test_a_bfloat16_head_errs_by_the_rounding_of_its_logits_only(scale, cap):
    inputs, target, weight = head(40, 1000, 32, torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    logits = exact[0] @ exact[1].T
    z = scale * (logits + exact[2])
    slow = (z if cap is None else cap * torch.tanh(z / cap)).log_softmax(-1)
    slow = slow.gather(1, target[:, None])[:, 0]
    fast = sami.head_logps(*inputs, target, scale, cap)
    assert fast.dtype == torch.float32
    # 8 bits: a logit is off by up to 2**-9 of itself, a log-prob by that of the token and the norm
    assert (fast - slow).abs().max() <= 2**-8 * scale * logits.abs().max()
    gradients = (torch.autograd.grad((weight * logp).sum(), x)
                 for logp, x in ((fast, inputs), (slow, exact)))
    for got, want in zip(*gradients):
        assert (got.float() - want).norm() <= 0.02 * want.norm()
