"""Running a prompt once with all its responses gives what a forward pass for every pair gives."""
import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from tokenizers.processors import TemplateProcessing

import sami, tiny

V = 61
SMALL = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
GEMMA = dict(SMALL, head_dim=8, query_pre_attn_scalar=8, attn_implementation="eager")
NEAR = dict(sliding_window=6)  # shorter than the texts below
MODELS = dict(
    llama=lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**SMALL)),
    mistral=lambda: tr.MistralForCausalLM(tr.MistralConfig(**NEAR, **SMALL)),
    qwen2=lambda: tr.Qwen2ForCausalLM(tr.Qwen2Config(**SMALL)),
    qwen2_mixed=lambda: tr.Qwen2ForCausalLM(
        tr.Qwen2Config(use_sliding_window=True, max_window_layers=1, **NEAR, **SMALL)),
    # a row of siblings is longer than its context
    gpt2=lambda: tr.GPT2LMHeadModel(tr.GPT2Config(n_positions=40, **GPT2)),
    # mixed layers, soft-capped logits
    gemma2=lambda: tr.Gemma2ForCausalLM(tr.Gemma2Config(**NEAR, **GEMMA)),
    mixtral=lambda: tr.MixtralForCausalLM(
        tr.MixtralConfig(num_local_experts=4, sliding_window=None, **SMALL)),
    cohere=lambda: tr.CohereForCausalLM(
        tr.CohereConfig(logit_scale=0.3, bos_token_id=0, eos_token_id=0, **SMALL)),
)
GPT_NEO = dict(vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, bos_token_id=0,
               attention_types=[[["global", "local"], 1]], eos_token_id=0,
               max_position_embeddings=64)
CANNOT_SHARE = dict(
    # attention by distance in the row, not by position
    bloom=lambda: tr.BloomForCausalLM(
        tr.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4)),
)


def ids(seed, *lengths):
    random = lambda n: torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed + n))
    return [random(n).tolist() for n in lengths]


PROMPTS, RESPONSES = ids(1, 9, 14, 5), ids(2, 7, 1, 12)  # ragged; one response of a single token


def build(make):
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def cell(model, prompt, response):
    """The slow truth: one forward pass, log-softmax, the response's tokens picked out."""
    logits = model(torch.tensor([prompt + response])).logits[0].float()
    return torch.stack([logits[len(prompt) + t - 1].log_softmax(-1)[token]
                        for t, token in enumerate(response)])


def by_cells(model, prompts, responses, reduce="mean"):
    return torch.stack([torch.stack([getattr(cell(model, p, y), reduce)() for y in responses])
                        for p in prompts])


def assert_right(model, prompts=PROMPTS, responses=RESPONSES):
    got, want = (f(model, prompts, responses) for f in (sami.logp_matrix, by_cells))
    assert torch.allclose(got, want, atol=1e-5), (got - want).abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_matrix_is_one_forward_pass_per_cell(name, capsys):
    model = build(MODELS[name])
    with torch.no_grad():
        for reduce in ("mean", "sum"):
            got, want = (f(model, PROMPTS, RESPONSES, reduce) for f in (sami.logp_matrix, by_cells))
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-5), (got - want).abs().max()
    assert not capsys.readouterr().out, "they run a prompt once; one that cannot says so"


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_gradients_are_those_of_the_slow_matrix(name):
    model = build(MODELS[name])
    gradients = []
    for f in (sami.logp_matrix, by_cells):
        model.zero_grad()
        sami.sami_loss(f(model, PROMPTS, RESPONSES)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert max(g.abs().max() for g in gradients[1]) > 1e-2
    for fast, slow in zip(*gradients):
        assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CANNOT_SHARE)
def test_an_architecture_that_cannot_share_is_noticed_and_scored_apart(name, capsys):
    model = build(CANNOT_SHARE[name])
    with torch.no_grad():
        for _ in range(2):
            assert_right(model)
    assert len(capsys.readouterr().out.splitlines()) == 1, "it says so once"


@pytest.mark.parametrize("name", CANNOT_SHARE)
def test_scoring_single_responses_first_does_not_hide_that(name):
    model = build(CANNOT_SHARE[name])
    with torch.no_grad():
        sami.response_logps(model, PROMPTS, RESPONSES)
        assert_right(model)


@pytest.mark.parametrize("name", [*MODELS, *CANNOT_SHARE])
def test_single_responses(name):
    model = build({**MODELS, **CANNOT_SHARE}[name])
    with torch.no_grad():
        for got, p, y in zip(sami.response_logps(model, PROMPTS, RESPONSES), PROMPTS, RESPONSES):
            assert got.shape == (len(y),)
            assert torch.allclose(got, cell(model, p, y), rtol=1e-5, atol=1e-5)


def test_a_head_that_is_more_than_a_matrix_is_noticed():
    """RoBERTa puts a layer before its output matrix: hidden states times matrix are wrong."""
    config = tr.RobertaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, is_decoder=True, max_position_embeddings=64, pad_token_id=1)
    model = build(lambda: tr.RobertaForCausalLM(config))
    no_pad = lambda texts: [[t + 2 if t < 2 else t for t in text] for text in texts]
    prompts, responses = no_pad(PROMPTS), no_pad(RESPONSES)
    with torch.no_grad():
        for got, p, y in zip(sami.response_logps(model, prompts, responses), prompts, responses):
            assert torch.allclose(got, cell(model, p, y), atol=1e-5)


def test_a_window_is_met_even_if_the_first_texts_are_shorter_than_it():
    """GPT-Neo's layers cut at a distance in the row of siblings; a short first row does not show
    it."""
    model = build(lambda: tr.GPTNeoForCausalLM(tr.GPTNeoConfig(window_size=24, **GPT_NEO)))
    with torch.no_grad():
        assert_right(model, ids(5, 3, 4), ids(6, 2, 3))
        assert_right(model)


@pytest.mark.parametrize("config, kind", [
    (tr.Qwen2Config(use_sliding_window=True, sliding_window=9, max_window_layers=3, **SMALL),
     tr.Qwen2ForCausalLM),
    (tr.LlamaConfig(sliding_window=9, **SMALL), tr.LlamaForCausalLM)], ids=["Qwen2", "Llama"])
def test_a_window_that_the_layers_do_not_use_is_not_used(config, kind):
    """Qwen2 may name a window and run full attention in every layer, and a Llama's config.json may
    carry one along that no layer reads; the first texts may be shorter than it."""
    model = build(lambda: kind(config))
    with torch.no_grad():
        assert_right(model, ids(5, 3, 4), ids(6, 2, 3))
        assert_right(model)


def test_the_mask_by_hand():
    """Prompt A B, first response C D, second response E, one place of padding."""
    # 0 = sees, very negative = does not
    sees = sami.sibling_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0] == 0
    assert sees[:5, :5].int().tolist() == [[1, 0, 0, 0, 0],
                                           [1, 1, 0, 0, 0],
                                           [1, 1, 1, 0, 0],
                                           [1, 1, 1, 1, 0],
                                           [1, 1, 0, 0, 1]]
    assert not sees[:5, 5].any(), "nobody sees padding"
    assert sees[5].any(), "a row with nothing to see would be NaN"


def test_padding_and_company_change_nothing():
    model = build(MODELS["llama"])
    with torch.no_grad():
        alone = sami.logp_matrix(model, PROMPTS[2:], RESPONSES[:1])
        beside = sami.logp_matrix(model, PROMPTS, RESPONSES)[2:, :1]
        [[queried]] = sami.score(model, PROMPTS[2:], [RESPONSES[:1]])
        # rows of one pass may differ in number
        several = sami.score(model, PROMPTS[1:], [RESPONSES, RESPONSES[:1]])
    assert torch.allclose(alone, beside, atol=1e-6)
    assert torch.allclose(queried, several[1][0], atol=1e-6)
    assert [len(row) for row in several] == [3, 1]


def test_the_pad_id_may_occur_in_the_text_and_may_end_it():
    """Masks come from lengths: 0 fills short rows, and is here a word and the end of text too."""
    model = build(MODELS["gpt2"])
    prompts, responses = [[0, 3, 0, 0], [5, 0]], [[0, 7, 0], [4, 9, 9, 9, 0]]
    with torch.no_grad():
        got = sami.score(model, prompts, [responses] * 2)
        for i, p in enumerate(prompts):
            for j, y in enumerate(responses):
                assert len(got[i][j]) == len(y)
                assert torch.allclose(got[i][j], cell(model, p, y), atol=1e-5)


def test_no_prompt_token_is_scored():
    """By the chain rule: log pi(prompt, response) - log pi(prompt), both from the second token."""
    model = build(MODELS["llama"])
    with torch.no_grad():
        whole = lambda text: cell(model, text[:1], text[1:]).sum()
        got = sami.logp_matrix(model, PROMPTS, RESPONSES, "sum")
        for i, p in enumerate(PROMPTS):
            for j, y in enumerate(RESPONSES):
                assert got[i, j].item() == pytest.approx((whole(p + y) - whole(p)).item(), abs=1e-4)


def test_sum_is_mean_times_length():
    model = build(MODELS["llama"])
    with torch.no_grad():
        mean, total = (sami.logp_matrix(model, PROMPTS, RESPONSES, how) for how in ("mean", "sum"))
    assert torch.allclose(total, mean * torch.tensor([7, 1, 12]), rtol=1e-5)
    assert (total <= 0).all()


def test_no_tokens_no_score():
    model = build(MODELS["llama"])
    for prompts, responses in (([[]], [[1]]), ([[1]], [[]])):
        with pytest.raises(ValueError):
            sami.response_logps(model, prompts, responses)


def test_a_text_that_just_fits_the_context_can_be_scored():
    # no multiple of 8
    model = build(lambda: tr.GPT2LMHeadModel(tr.GPT2Config(n_positions=21, **GPT2)))
    prompt, response = ids(3, 14, 7)
    with torch.no_grad():
        [got] = sami.response_logps(model, [prompt], [response])
        assert torch.allclose(got, cell(model, prompt, response), atol=1e-5)


def test_tokens_never_merge_across_the_end_of_the_prompt(tmp_path, monkeypatch):
    """The tokenizer reads "ab" as one token. Behind a prompt that ends in "a" the response "b..."
    keeps its own ids."""
    tokenizer, a, b, ab = tiny.tokenizer(), *map(tiny.LETTERS.index, ("a", "b", "ab"))
    assert tokenizer("ab").input_ids == [ab]
    tiny.folder(tmp_path, sampling_prompt="{constitution}{query} a",
                scoring_prompt="{query}{constitution} a", stop=[])
    task, cfg = sami.load_task(tmp_path / "task"), sami.Config(n=2, max_new_tokens=6)
    model, queries = tiny.model(), [(0, task.train[0])]
    for forced in ([b, 9, 9], [b, b, a]):
        says_so = lambda model, prompts, **_: [list(forced) for _ in prompts]
        monkeypatch.setattr(sami, "sample", says_so)
        [example] = sami.sample_examples(model, tokenizer, task, queries, cfg, 1, 1.0)
        assert example.ids == [forced] * 2, "what is scored are the ids that were sampled"
        assert all(p[-1] == a for p in example.prompts)
        with torch.no_grad():
            assert_right(model, example.prompts, example.ids)


@pytest.mark.parametrize("bias, scale, cap", [(False, 1, None), (True, 1, None), (False, 0.3, None),
                                              (True, 0.5, 3.0)])
@pytest.mark.parametrize("vocabulary", [50, 2**19])  # 2**19: 16 rows at a time, so 2 chunks
def test_the_fused_head_is_log_softmax(bias, scale, cap, vocabulary):
    g = torch.Generator().manual_seed(0)
    shapes = (20, 3), (vocabulary, 3), (vocabulary,)
    h, w, b = (torch.randn(*s, generator=g, requires_grad=True) for s in shapes)
    target, weight = torch.randint(vocabulary, (20,), generator=g), torch.randn(20, generator=g)

    def reference():
        z = (F.linear(h, w, b if bias else None)) * scale
        logp = (z if cap is None else cap * torch.tanh(z / cap)).log_softmax(-1)
        return logp.gather(1, target[:, None])[:, 0]

    fast, slow = sami.head_logps(h, w, b if bias else None, target, scale, cap), reference()
    assert torch.allclose(fast, slow, atol=1e-5)
    inputs = [h, w, b] if bias else [h, w]
    slopes = (torch.autograd.grad((weight * logp).sum(), inputs) for logp in (fast, slow))
    for got, want in zip(*slopes):
        assert torch.allclose(got, want, atol=1e-4, rtol=1e-4)


def test_bfloat16_compute_has_consistent_gradients():
    """Softmax minus one-hot sums to zero over the vocabulary, unless backward has its logits in
    another precision."""
    model = build(MODELS["llama"])
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
    with sami.compute(model, sami.Config(dtype="bfloat16")):
        logp = sami.logp_matrix(model, PROMPTS, RESPONSES, "sum")
    logp.sum().backward()  # outside, as in training
    g = model.lm_head.bias.grad
    assert g.abs().sum() > 1 and abs(g.sum()) < 1e-6 * g.abs().sum()


def test_a_prompt_has_no_end_token_and_neither_has_an_opening_behind_it():
    """Some tokenizers put the end token behind every text, where a model would take it for done."""
    t, letters = tiny.tokenizer(), tiny.LETTERS.index
    t.add_special_tokens({"bos_token": "a"})
    t.backend_tokenizer.post_processor = TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", 0)])
    assert t("cd").input_ids == [letters("c"), letters("d"), 0]
    assert sami.encode(t, "cd") == ([letters("c"), letters("d")], [])
    assert sami.encode(t, "cd", "e") == ([letters("c"), letters("d")], [letters("e")])
