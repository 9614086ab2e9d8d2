"""A sampled response depends on its prompt and its own key, never on the batch that it was sampled in."""
from types import SimpleNamespace

import pytest
import torch
import transformers as tr

import sami, tiny
from test_logps import GEMMA, GPT2, MODELS, SMALL, V, build, ids

START = ids(9, 18)[0]  # 18 tokens that prompts begin with
RAGGED = ids(1, 9, 14, 5, 23)
BATCHES = dict(
    ragged=RAGGED + [RAGGED[1], RAGGED[1]],  # with the same prompt three times
    equal=ids(1, 9) + ids(2, 9) + ids(3, 9),
    shared_start=[START + p for p in RAGGED] + [START + RAGGED[0]],
    shared_start_of_equal_length=[START + p for p in ids(1, 9) + ids(2, 9)],
    one_is_the_start_of_another=[START, START + RAGGED[0], START],
    same=[RAGGED[0]] * 3,
)
ENDS = [0, 1, 2, 3, 4]  # many, so that rows finish at different times
GREEDY = dict(max_new_tokens=14, temperature=0, eos_ids=ENDS, seed=1)


def one_by_one(model, prompts, seed=None, **how):
    return [sami.sample(model, [p], **how, seed=seed if seed is None or isinstance(seed, int) else [seed[i]])[0]
            for i, p in enumerate(prompts)]


def room(model, prompts, rows, new=14):
    """Memory for so many of the longest responses side by side, and half of one more."""
    longest = max(prompts, key=len)
    return (rows + 0.5) * sami.bytes_per_token(model, longest, new) * (len(longest) + new)


def generated(model, prompt):
    """What Hugging Face makes of it, greedily."""
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False,
                          eos_token_id=ENDS, pad_token_id=0)[0, len(prompt):].tolist()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma2", "mixtral"])
def test_greedy_in_a_batch_is_greedy_alone_is_generate(name):
    model = build({**MODELS, "gpt2": lambda: tr.GPT2LMHeadModel(tr.GPT2Config(n_positions=64, **GPT2))}[name])
    for kind, prompts in BATCHES.items():
        together = sami.sample(model, prompts, **GREEDY)
        assert together == [generated(model, p) for p in prompts], kind
        assert together == one_by_one(model, prompts, **GREEDY), kind
        assert together == sami.sample(model, prompts, memory=room(model, prompts, 2), **GREEDY), kind


def test_rows_leave_when_they_finish():
    """The batch shrinks: with 8 prompts that end at different times, fewer rows run at the end than at the start."""
    model, prompts, rows = build(MODELS["llama"]), ids(1, *range(5, 13)), []
    hook = model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    together = sami.sample(model, prompts, **GREEDY)
    hook.remove()
    lengths = [len(y) for y in together]
    assert rows.pop(0) == 1, "one prompt, to see what it takes"
    assert len(set(lengths)) > 2 and rows[0] == 8 and rows[-1] < 8 and rows == sorted(rows, reverse=True)
    assert len(rows) == max(lengths), "one pass a token, and none once the longest has finished"
    assert together == one_by_one(model, prompts, **GREEDY)


def test_a_shared_start_runs_once():
    """The prompts of one query differ by their constitution, those of one task share its opening: 18 tokens here."""
    model, seen = build(MODELS["llama"]), []
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    sami.sample(model, BATCHES["shared_start_of_equal_length"], **{**GREEDY, "max_new_tokens": 1})
    assert seen[1:] == [(1, 18), (2, 9)], "behind the one that finds out what a prompt takes"


def test_the_batch_is_the_largest_that_fits_the_memory():
    model, prompts, rows = build(MODELS["llama"]), ids(1, 20) + ids(2, 20) + ids(3, 20, 8) + ids(4, 8), []
    memory = room(model, prompts, 2, new=4)  # two of 24 tokens, which is as much as four of 12
    model.register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape)))
    how = dict(GREEDY, max_new_tokens=4, eos_ids=[])
    together = sami.sample(model, prompts, memory=memory, **how)
    assert [shape for shape in rows if shape[1] > 1] == [(1, 20), (2, 20), (2, 20), (1, 8)]
    assert together == sami.sample(model, prompts, **how)


def test_bytes_a_token_are_those_of_the_cache_twice_and_of_the_logits():
    model = build(MODELS["llama"])  # keys and values, fp32
    config, prompt, new = model.config, ids(1, 10)[0], 6
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert sami.bytes_per_token(model, prompt, new) == 2 * cache + 32 * V / 16


def test_memory_too_small_for_one_response_is_told():
    model = build(MODELS["llama"])
    with pytest.raises(sami.RunFailed, match="one response of 14 tokens to a prompt of 23 takes .* raise --sample_gb"):
        sami.sample(model, RAGGED, memory=room(model, RAGGED, 0), **GREEDY)

def test_every_response_keeps_its_end_token_and_nothing_after_it():
    responses = sami.sample(build(MODELS["llama"]), BATCHES["ragged"] + ids(4, *range(3, 20)), **GREEDY)
    ended = [y for y in responses if y[-1] in ENDS]
    assert 0 < len(ended) and all(len(y) <= 14 for y in responses)
    assert not any(k in ENDS for y in responses for k in y[:-1])
    assert all(len(y) == 14 for y in responses if y[-1] not in ENDS)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("kind", BATCHES)
def test_the_noise_belongs_to_the_key_and_not_to_the_batch(kind, top_p):
    model, prompts = build(MODELS["llama"]), BATCHES[kind]
    how, keys = dict(GREEDY, temperature=0.8, top_p=top_p), [(3, 7, i) for i in range(len(prompts))]
    how.pop("seed")
    together = sami.sample(model, prompts, seed=keys, **how)
    assert together == one_by_one(model, prompts, keys, **how)
    assert together[::-1] == sami.sample(model, prompts[::-1], seed=keys[::-1], **how)
    assert together == sami.sample(model, prompts, seed=keys, memory=room(model, prompts, 2), **how)
    assert together != sami.sample(model, prompts, seed=[(4, *k) for k in keys], **how)


def test_an_int_as_seed_gives_every_response_its_own_noise():
    model, prompts = build(MODELS["llama"]), [RAGGED[0]] * 20
    first = sami.sample(model, prompts, **dict(GREEDY, temperature=1.0))
    assert len({tuple(y) for y in first}) > 15, "the same prompt 20 times"
    assert first == sami.sample(model, prompts, **dict(GREEDY, temperature=1.0))
    assert first != sami.sample(model, prompts, **dict(GREEDY, temperature=1.0, seed=2))


def test_inverse_cdf_by_hand():
    logits = torch.tensor([[0.5, 0.0, 0.2, 0.3]]).log()  # cumulated: 0.5, 0.5, 0.7, 1
    draw = lambda u, temperature=1.0, top_p=1.0: sami.pick(logits, temperature, top_p, torch.tensor([u])).item()
    assert [draw(u) for u in (1e-7, 0.49, 0.51, 0.69, 0.71, 1.0)] == [0, 0, 2, 2, 3, 3], "never 1"
    assert [draw(u, top_p=0.8) for u in (0.62, 0.63, 1.0)] == [0, 3, 3], "0.5 and 0.3 are kept: 0.5 / 0.8 = 0.625"
    assert [draw(u, top_p=0.5) for u in (1e-7, 1.0)] == [0, 0], "the smallest set that holds 0.5 is one token"
    assert [draw(u, temperature=0.5) for u in (0.65, 0.66, 0.76, 0.77)] == [0, 2, 2, 3], "25, 0, 4, 9 of 38"
    assert draw(1.0, temperature=0) == 0


def chi_square(counts, p):
    expected = p * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_frequencies_are_those_of_the_softmax(temperature):
    """Pairs of tokens, so that the second token's noise is seen to be fresh: 7 x 7 outcomes, 48 degrees of freedom."""
    config = tr.LlamaConfig(**{**SMALL, "vocab_size": 7}, bos_token_id=0, eos_token_id=0)
    model, draws = build(lambda: tr.LlamaForCausalLM(config)), 5000
    responses = sami.sample(model, [[1, 2, 3]] * draws, max_new_tokens=2, temperature=temperature, eos_ids=[], seed=5)
    with torch.no_grad():
        p = lambda *text: (model(torch.tensor([[1, 2, 3, *text]])).logits[0, -1] / temperature).softmax(-1)
        joint = torch.stack([p()[k] * p(k) for k in range(7)])  # (7, 7)
    counts = torch.zeros(7, 7).index_put_(tuple(torch.tensor(responses).T), torch.ones(draws), accumulate=True)
    common = joint * draws > 5  # the rest together, as one outcome
    counts, joint = (torch.cat([t[common], t[~common].sum()[None]]) for t in (counts, joint.double()))
    assert chi_square(counts, joint) < len(counts) + 4 * (2 * len(counts)) ** 0.5, "within 4 standard deviations"


def test_top_p_never_leaves_its_set():
    model = build(MODELS["llama"])
    with torch.no_grad():
        p, order = model(torch.tensor([RAGGED[0]])).logits[0, -1].softmax(-1).sort(descending=True)
    size = int((p.cumsum(0) < 0.6).sum()) + 1
    assert 1 < size < V / 2
    responses = sami.sample(model, [RAGGED[0]] * 2000, max_new_tokens=1, temperature=1.0, top_p=0.6, eos_ids=[], seed=1)
    assert {y[0] for y in responses} == set(order[:size].tolist()), "all of it, and nothing else"


def test_a_stop_function_ends_a_response_early():
    model, asked = build(MODELS["llama"]), []
    stop = lambda so_far: asked.append(len(so_far)) or len(so_far) >= 16
    how = dict(max_new_tokens=40, temperature=0, eos_ids=[], seed=1)
    stopped, whole = sami.sample(model, RAGGED, stop=stop, **how), sami.sample(model, RAGGED, **how)
    assert set(asked) == {8, 16} and [len(y) for y in stopped] == [16] * 4
    assert stopped == [y[:16] for y in whole]


def test_a_response_is_cut_before_a_stop_string_whatever_the_tokens():
    """Token "ab" holds the last letter of the response and the first of the stop string "b.": what is scored are the
    fewest ids that spell the response, without white space behind it, stop string or end token."""
    model, tokenizer, at = tiny.model(), tiny.tokenizer(), tiny.LETTERS.index
    task = SimpleNamespace(stop=["b."], response_prefix="", sampling_prompt=lambda x, c: x)
    task.answer_after, task.behind_reasoning = "", lambda text: text
    task.clean = lambda text: sami.Task.clean(task, text)
    spell = lambda *tokens: [at(t) for t in tokens]
    cases = [(spell(" ", "x", "ab", ".", "y"), "xa", spell(" ", "x", "ab"), False),
             (spell("x", " ", "<eos>"), "x", spell("x"), True),
             (spell("x", "<eos>"), "x", spell("x"), True),
             (spell(" ", "b", "."), "", [], False)]
    for sampled, text, scored, ended in cases:
        for score_eos in (False, True):
            original, sami.sample = sami.sample, lambda *_, **__: [list(sampled)]
            try:
                [got] = sami.answer(model, tokenizer, task, [("q", "c")], sami.Config(score_eos=score_eos), [(1,)], 1.0)
            finally:
                sami.sample = original
            end = spell("<eos>") if score_eos and sampled == spell("x", "<eos>") else []
            assert (got["text"], got["response"], got["ended"]) == (text, scored + end, ended)


def test_a_forced_opening_is_part_of_the_response(tmp_path):
    tiny.folder(tmp_path, response_prefix=" so", stop=[])
    task, model, tokenizer = sami.load_task(tmp_path / "task"), tiny.model(), tiny.tokenizer()
    [got] = sami.answer(model, tokenizer, task, [("query", "c")], sami.Config(max_new_tokens=4), [(1,)], 0)
    so = [tiny.LETTERS.index(t) for t in " so"]
    assert got["prompt"] == tokenizer(task.sampling_prompt("query", "c")).input_ids
    [sampled] = sami.sample(model, [got["prompt"] + so], max_new_tokens=4, temperature=0, eos_ids=[0], seed=1)
    assert got["text"].startswith("so") and got["response"] == (so + sampled)[:len(got["response"])]
    assert len(got["response"]) > 3, "and something was sampled behind it"


def test_no_prompts_no_responses_and_no_empty_prompt():
    model = build(MODELS["llama"])
    assert sami.sample(model, [], **GREEDY) == []
    with pytest.raises(ValueError):
        sami.sample(model, [[], [1, 2]], **GREEDY)
