"""A sampled response depends on its prompt and its own key, never on the batch that it is in."""
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


def one_by_one(model, prompts, keys=None, **how):
    """keys: as the seed of each."""
    seeds = [{} if keys is None else dict(seed=[k]) for k in keys or prompts]
    return [sami.sample(model, [p], **how, **seed)[0] for p, seed in zip(prompts, seeds)]


def generated(model, prompt):
    """What Hugging Face makes of it, greedily."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False,
                          eos_token_id=ENDS, pad_token_id=0)[0, len(prompt):].tolist()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma2", "mixtral"])
def test_greedy_in_a_batch_is_greedy_alone_is_generate(name):
    longer = lambda: tr.GPT2LMHeadModel(tr.GPT2Config(n_positions=64, **GPT2))
    model = build({**MODELS, "gpt2": longer}[name])
    for kind, prompts in BATCHES.items():
        together = sami.sample(model, prompts, **GREEDY)
        assert together == [generated(model, p) for p in prompts], kind
        assert together == one_by_one(model, prompts, **GREEDY), kind
        assert together == sami.sample(model, prompts, batch=2, **GREEDY), kind


def test_rows_leave_when_they_finish():
    """With 8 prompts that end at different times, fewer rows run at the end than at the start."""
    model, prompts, rows = build(MODELS["llama"]), ids(1, *range(5, 13)), []
    hook = model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    together = sami.sample(model, prompts, **GREEDY)
    hook.remove()
    lengths = [len(y) for y in together]
    assert len(set(lengths)) > 2 and rows == sorted(rows, reverse=True)
    assert rows[0] == 8 and rows[-1] < 8
    assert len(rows) == max(lengths), "one pass a token, and none once the longest has finished"
    assert together == one_by_one(model, prompts, **GREEDY)


def test_equal_prompts_run_once():
    model, seen = build(MODELS["llama"]), []
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    sami.sample(model, BATCHES["ragged"], **{**GREEDY, "max_new_tokens": 2, "eos_ids": []})
    assert seen == [(4, 23), (6, 1)], "six responses to four prompts, the longest of 23 tokens"


def test_at_most_so_many_rows_side_by_side_and_the_longest_first():
    model, prompts = build(MODELS["llama"]), ids(1, 20) + ids(2, 8) + ids(3, 20, 8) + ids(4, 20)
    rows, how = [], dict(GREEDY, max_new_tokens=4, eos_ids=[])
    hook = model.register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape)))
    together = sami.sample(model, prompts, batch=2, **how)
    hook.remove()
    assert [shape for shape in rows if shape[1] > 1] == [(2, 20), (2, 20), (1, 8)]
    assert max(count for count, _ in rows) == 2
    assert together == one_by_one(model, prompts, **how)


def test_every_response_keeps_its_end_token_and_nothing_after_it():
    prompts = BATCHES["ragged"] + ids(4, *range(3, 20))
    responses = sami.sample(build(MODELS["llama"]), prompts, **GREEDY)
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
    assert together == sami.sample(model, prompts, seed=keys, batch=2, **how)
    assert together != sami.sample(model, prompts, seed=[(4, *k) for k in keys], **how)


def test_an_int_as_seed_gives_every_response_its_own_noise():
    model, prompts = build(MODELS["llama"]), [RAGGED[0]] * 20
    first = sami.sample(model, prompts, **dict(GREEDY, temperature=1.0))
    assert len({tuple(y) for y in first}) > 15, "the same prompt 20 times"
    assert first == sami.sample(model, prompts, **dict(GREEDY, temperature=1.0))
    assert first != sami.sample(model, prompts, **dict(GREEDY, temperature=1.0, seed=2))


def test_inverse_cdf_by_hand():
    logits = torch.tensor([[0.5, 0.0, 0.2, 0.3]]).log()  # cumulated: 0.5, 0.5, 0.7, 1
    def draw(u, temperature=1.0, top_p=1.0):
        return sami.pick(logits, temperature, top_p, torch.tensor([u])).item()

    assert [draw(u) for u in (1e-7, 0.49, 0.51, 0.69, 0.71, 1.0)] == [0, 0, 2, 2, 3, 3], "never 1"
    # 0.5 and 0.3 are kept, and 0.5 / 0.8 = 0.625
    assert [draw(u, top_p=0.8) for u in (0.62, 0.63, 1.0)] == [0, 3, 3]
    # the smallest set that holds 0.5 is one token
    assert [draw(u, top_p=0.5) for u in (1e-7, 1.0)] == [0, 0]
    # 25, 0, 4, 9 of 38
    assert [draw(u, temperature=0.5) for u in (0.65, 0.66, 0.76, 0.77)] == [0, 2, 2, 3]
    assert draw(1.0, temperature=0) == 0


def chi_square(counts, p):
    expected = p * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_frequencies_are_those_of_the_softmax(temperature):
    """Pairs of tokens, so that the second token's noise is seen to be fresh: 7 x 7 outcomes, 48
    degrees of freedom."""
    config = tr.LlamaConfig(**{**SMALL, "vocab_size": 7}, bos_token_id=0, eos_token_id=0)
    model, draws = build(lambda: tr.LlamaForCausalLM(config)), 5000
    responses = sami.sample(model, [[1, 2, 3]] * draws, max_new_tokens=2, temperature=temperature,
                            eos_ids=[], seed=5)
    with torch.no_grad():
        logits = lambda *text: model(torch.tensor([[1, 2, 3, *text]])).logits[0, -1]
        p = lambda *text: (logits(*text) / temperature).softmax(-1)
        joint = torch.stack([p()[k] * p(k) for k in range(7)])  # (7, 7)
    pairs = tuple(torch.tensor(responses).T)
    counts = torch.zeros(7, 7).index_put_(pairs, torch.ones(draws), accumulate=True)
    common = joint * draws > 5  # the rest together, as one outcome
    counts, joint = (torch.cat([t[common], t[~common].sum()[None]])
                     for t in (counts, joint.double()))
    limit = len(counts) + 4 * (2 * len(counts)) ** 0.5  # 4 standard deviations
    assert chi_square(counts, joint) < limit


def test_top_p_never_leaves_its_set():
    model = build(MODELS["llama"])
    with torch.no_grad():
        p, order = model(torch.tensor([RAGGED[0]])).logits[0, -1].softmax(-1).sort(descending=True)
    size = int((p.cumsum(0) < 0.6).sum()) + 1
    assert 1 < size < V / 2
    responses = sami.sample(model, [RAGGED[0]] * 2000, max_new_tokens=1, temperature=1.0, top_p=0.6,
                            eos_ids=[], seed=1)
    assert {y[0] for y in responses} == set(order[:size].tolist()), "all of it, and nothing else"


def test_a_stop_function_ends_a_response_early():
    model, asked = build(MODELS["llama"]), []
    stop = lambda so_far: asked.append(len(so_far)) or len(so_far) >= 16
    how = dict(max_new_tokens=40, temperature=0, eos_ids=[], seed=1)
    stopped, whole = sami.sample(model, RAGGED, stop=stop, **how), sami.sample(model, RAGGED, **how)
    assert set(asked) == {8, 16} and [len(y) for y in stopped] == [16] * 4
    assert stopped == [y[:16] for y in whole]


def test_a_response_is_cut_before_a_stop_string_whatever_the_tokens(monkeypatch):
    """Token "ab" holds the last letter of the response and the first of the stop string "b.": what
    is scored are the fewest ids that spell the response, without white space behind it, stop string
    or end token."""
    model, tokenizer, at = tiny.model(), tiny.tokenizer(), tiny.LETTERS.index
    task = SimpleNamespace(stop=["b."], response_prefix="", sampling_prompt=lambda x, c: x)
    task.answer_after, task.answer = "", lambda text: text
    task.clean = lambda text: sami.Task.clean(task, text)
    spell = lambda *tokens: [at(t) for t in tokens]
    cases = [(spell(" ", "x", "ab", ".", "y"), "xa", spell(" ", "x", "ab"), False),
             (spell("x", " ", "<eos>"), "x", spell("x"), True),
             (spell("x", "<eos>"), "x", spell("x"), True),
             (spell(" ", "b", "."), "", [], False)]
    for sampled, text, scored, ended in cases:
        monkeypatch.setattr(sami, "sample", lambda *_, **__: [list(sampled)])
        [got] = sami.respond(model, tokenizer, task, [("q", "c")], sami.Config(), [(1,)], 1.0)
        assert got == (spell("q"), scored, text, ended)


def test_a_forced_opening_is_part_of_the_response(tmp_path):
    tiny.folder(tmp_path, response_prefix=" so", stop=[])
    task, model, tokenizer = sami.load_task(tmp_path / "task"), tiny.model(), tiny.tokenizer()
    cfg = sami.Config(max_new_tokens=4)
    [(prompt, response, text, ended)] = sami.respond(
        model, tokenizer, task, [("query", "c")], cfg, [(1,)], 0)
    so = [tiny.LETTERS.index(t) for t in " so"]
    assert prompt == tokenizer(task.sampling_prompt("query", "c")).input_ids
    [sampled] = sami.sample(model, [prompt + so], max_new_tokens=4, temperature=0, eos_ids=[0],
                            seed=1)
    assert text.startswith("so") and response == (so + sampled)[:len(response)]
    assert len(response) > 3, "and something was sampled behind it"
    assert ended == (sampled[-1] == 0)


def test_no_prompts_no_responses_and_no_empty_prompt():
    model = build(MODELS["llama"])
    assert sami.sample(model, [], **GREEDY) == []
    with pytest.raises(ValueError):
        sami.sample(model, [[], [1, 2]], **GREEDY)
