"""Rebuilds the toy task from nothing: queries, tokenizer, and a small Llama that can follow
principles but seldom does.

    python data/toy/prepare.py                 about 6 minutes on two CPU cores
    python data/toy/prepare.py --steps=300     a rough model, to see the whole thing run

The base model is pretrained, by next-token prediction of the answer, on documents "principles,
task, answer". In three documents of ten the author follows every principle; in the others the
author ignores them all and writes by habit. (At first all authors follow: see curriculum.)
So the model knows what each principle means, and mostly answers by habit: what SAMI has to change
is which kind of author it plays. Because that is one hidden variable of the whole document,
learning to follow some principles can carry over to the held-out ones. task.json and
principles.json are written by hand and only read here.
"""
import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

# where cores are shared, threads that spin while idle cost 4x
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import tiktoken
import torch
from tiktoken._educational import bpe_train
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig,
                          LlamaForCausalLM)
from transformers.convert_slow_tokenizer import bytes_to_unicode

import rules

HERE = Path(__file__).resolve().parent
TASK = json.loads((HERE / "task.json").read_text())
PRINCIPLES = json.loads((HERE / "principles.json").read_text())

TRAIN_THINGS = ("fox owl bear frog crow duck goat horse mouse snail "
                "lamp clock chair spoon drum kite boat bell "
                "cup key book door shoe ball cart rope coin ring plate broom "
                "stone leaf tree pear plum cake").split()
TEST_THINGS = ("cat dog hen bee wolf swan table candle pot hat "
               "train bridge flute box mirror rose apple cloud").split()
FORMS = ["Tell me about the {} and the {}.", "Describe the {} and the {}.",
         "What about the {} and the {}?", "Is there news of the {} and the {}?"]

# The side an author takes by habit, with probability HABIT. Six positive and six negative, so that
# neither "always positive" nor "always negative" is what the base model does.
DEFAULT = {"register": False, "weather": True, "time": True, "look": False,
           "age": True, "mood": True, "activity": True, "tense": True,
           "place": False, "number": False, "tone": False, "ending": False}
HABIT = 0.75
FOLLOWERS = 0.30            # share of documents whose author follows the principles
END = "<|endoftext|>"
# A word carries the space before it, a digit and a punctuation mark stand alone.
# So "Answer:" + " Dear" is cut the same
# whether prompt and response are tokenised together or apart.
PATTERN = r" ?\p{L}+|\p{N}|[^\p{L}\p{N}]"


# ---------------------------------------------------------------------------------------- documents

def draw_constitution(rng, k):
    """k principles with random sides and wordings: ({name: side}, numbered text)."""
    chosen = rng.sample(PRINCIPLES, k)
    sides = {p["name"]: rng.random() < 0.5 for p in chosen}
    return sides, write_constitution(rng, chosen, sides)


def write_constitution(rng, chosen, sides):
    lines = [rng.choice(p["positive" if sides[p["name"]] else "negative"]) for p in chosen]
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


def draw_query(rng, things):
    return rng.choice(FORMS).format(*rng.sample(things, 2))


def draw_response(rng, query, wanted):
    """An answer that takes the wanted sides and, in every other slot,
    the habitual side or (1 - HABIT) the other."""
    sides = {name: wanted.get(name, default == (rng.random() < HABIT))
             for name, default in DEFAULT.items()}
    words = {slot: rng.choice(pair[0] if sides[slot] else pair[1])
             for slot, pair in rules.SLOTS.items()}
    words["verb"] = rng.choice(rules.VERBS[sides["activity"], sides["tense"]])
    words["first"], words["second"] = rules.things(query)
    return " " + rules.TEMPLATE.format(**words)


def prompt(constitution, query):
    return TASK["sampling_prompt"].replace("{constitution}", constitution).replace("{query}", query)


def draw_document(rng, followers, sizes):
    """Prompt and response of a document.
    One coin for the whole of it: follow every principle or ignore them all."""
    sides, constitution = draw_constitution(rng, rng.choice(sizes))
    query = draw_query(rng, TRAIN_THINGS + TEST_THINGS)
    wanted = sides if rng.random() < followers else {}
    return prompt(constitution, query), draw_response(rng, query, wanted)


def write_queries(rng, things, count, path):
    queries = sorted({form.format(a, b)
                      for form in FORMS for a in things for b in things if a != b})
    lines = [json.dumps({"query": query}) + "\n" for query in rng.sample(queries, count)]
    Path(f"{path}.tmp").write_text("".join(lines))
    os.replace(f"{path}.tmp", path)


# ---------------------------------------------------------------------------------------- tokenizer

def train_tokenizer(rng, vocab_size):
    """Byte-level BPE. tiktoken's trainer is slow, so it sees each distinct word once,
    which also lets rare words in."""
    import regex
    text = "".join("".join(draw_document(rng, 0.5, [6])) for _ in range(3000))
    words = sorted(set(regex.findall(PATTERN, text)))
    ranks = bpe_train("\n".join(words), vocab_size - 1, PATTERN, visualise=None)
    return tiktoken.Encoding("toy", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})


def export_tokenizer(encoding, folder):
    """Writes a tiktoken encoding as tokenizer.json + tokenizer_config.json,
    which AutoTokenizer loads."""
    ranks, letter = encoding._mergeable_ranks, bytes_to_unicode()
    # tokenizer.json spells every byte as one letter
    spell = lambda token: "".join(letter[byte] for byte in token)
    # tiktoken joins any two neighbours whose joint bytes are a token;
    # tokenizer.json wants these pairs listed.
    merges = [(spell(token[:i]), spell(token[i:])) for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END,
              "model_max_length": 256, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_tokenizer(rng, encoding, tokenizer):
    """Both tokenizers agree, prompt and response are cut apart exactly as together,
    and the judges know the world."""
    sizes = []
    for _ in range(1000):
        sides, constitution = draw_constitution(rng, TASK["principles_per_constitution"])
        query = draw_query(rng, TRAIN_THINGS + TEST_THINGS)
        before, after = prompt(constitution, query), draw_response(rng, query, sides)
        ids = encoding.encode_ordinary(before), encoding.encode_ordinary(after)
        whole = before + after
        assert ids[0] + ids[1] == encoding.encode_ordinary(whole) == tokenizer.encode(whole)
        assert tokenizer.decode(ids[0] + ids[1]) == whole
        assert all(getattr(rules, name)(query, after) == wanted for name, wanted in sides.items())
        sizes.append((len(ids[0]), len(ids[1]) + 1))
    (p, r), (pmax, rmax) = (sum(s) / 1000 for s in zip(*sizes)), (max(s) for s in zip(*sizes))
    print(f"tokenizer: {encoding.n_vocab} tokens; prompt {p:.1f} (max {pmax}), "
          f"response {r:.1f} (max {rmax}) with end")


# -------------------------------------------------------------------------------------- pretraining

def curriculum(progress):
    """(share of followers, sizes of a constitution) at a point of pretraining between 0 and 1.

    First all authors follow and constitutions are long: many principles a document bind wordings to
    slots fast (with the final mixture from the start, 2000 steps teach the grammar and not one
    principle). Then the mixture is final.
    """
    if progress < 0.4:
        return 1.0, [2, 4, 6, 8]
    return max(FOLLOWERS, 1.0 - (progress - 0.4) / 0.15 * (1.0 - FOLLOWERS)), [1, 2, 2, 2, 3]


def pretrain(args, rng, tokenizer):
    torch.manual_seed(args.seed)
    end = tokenizer.eos_token_id
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384,
        num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=None, eos_token_id=end, pad_token_id=end))
    print(f"model: {model.num_parameters() / 1e6:.2f}M parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98),
                                  weight_decay=0.01)
    warmup = lambda step: (min(1.0, (step + 1) / 50)
                           * (0.02 + 0.98 * (1 + math.cos(math.pi * step / args.steps)) / 2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup)
    start, average = time.time(), None
    for step in range(args.steps):
        followers, sizes = curriculum(step / args.steps)
        documents = [draw_document(rng, followers, sizes) for _ in range(args.batch_size)]
        before, after = (tokenizer(list(texts))["input_ids"] for texts in zip(*documents))
        rows = [torch.tensor(a + b + [end]) for a, b in zip(before, after)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)
        # Only the response is predicted:
        # principles and queries are random, and learning them would be noise.
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        for label, a in zip(labels, before):
            label[:len(a)] = -100
        # Padding on the right needs no mask: attention is causal.
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            eta = (time.time() - start) / (step + 1) * (args.steps - step - 1) / 60
            print(f"step {step + 1}/{args.steps}  loss {average:.4f} nats a token"
                  f"  followers {followers:.2f}  eta {eta:.1f} min", flush=True)
    return model


# ---------------------------------------------------------------------------------------- measuring

@torch.no_grad()
def sample(model, tokenizer, prompts, temperature):
    """One response per prompt. Prompts of equal length run together, so nothing is padded."""
    how = (dict(do_sample=True, temperature=temperature, top_k=0) if temperature
           else dict(do_sample=False))
    ids, out = tokenizer(prompts)["input_ids"], [None] * len(prompts)
    for length in sorted({len(row) for row in ids}):
        where = [i for i, row in enumerate(ids) if len(row) == length]
        batch = torch.tensor([ids[i] for i in where])
        made = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=48,
                              **how)
        texts = tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
        for i, text in zip(where, texts):
            out[i] = text
    return out


@torch.no_grad()
def logp(model, tokenizer, before, after):
    """Summed log-probability of a response, in nats."""
    a, b = tokenizer.encode(before), tokenizer.encode(after) + [tokenizer.eos_token_id]
    scores = model(torch.tensor([a + b])).logits[0, len(a) - 1:-1].log_softmax(-1)
    return scores.gather(1, torch.tensor(b)[:, None]).sum().item()


def measure(rng, model, tokenizer, per_query=4):
    """What the base does on the test queries when asked for the habitual
    and for the other ("rare") side."""
    model.eval()
    queries = [json.loads(line)["query"] for line in open(HERE / TASK["test"])] * per_query
    drawn = [draw_constitution(rng, TASK["principles_per_constitution"]) for _ in queries]
    prompts = [prompt(text, query) for (_, text), query in zip(drawn, queries)]
    made = {name: sample(model, tokenizer, prompts, t)
            for name, t in (("greedy", 0.0), ("T=1", 1.0))}
    rates = {}
    for name, responses in made.items():
        # (principle, asked for its habitual side?) -> [follows, ...];
        # what is no answer does not follow
        hits = {}
        for (sides, _), query, response in zip(drawn, queries, responses):
            for p, wanted in sides.items():
                follows = getattr(rules, p)(query, response) is wanted
                hits.setdefault((p, wanted == DEFAULT[p]), []).append(follows)
        rates[name] = {key: sum(h) / len(h) for key, h in hits.items()}
        world = sum(map(rules.in_world, queries, responses)) / len(queries)
        follow = sum(map(sum, hits.values())) / sum(map(len, hits.values()))
        print(f"{name:6s}: in the world {world:.4f}, follows {follow:.3f} of the principles "
              f"({len(queries)} responses)")
    print(f"\n{'share that follows':20s}{'habitual side asked':>24s}{'rare side asked':>24s}\n"
          f"{'':20s}" + f"{'greedy':>14s}{'T=1':>10s}" * 2)
    for p in PRINCIPLES:
        cells = [f"{rates[name][p['name'], habitual]:.2f}"
                 for habitual in (True, False) for name in ("greedy", "T=1")]
        label = p["name"] + (" (heldout)" if p["heldout"] else "")
        print(f"{label:20s}" + "{:>14s}{:>10s}{:>14s}{:>10s}".format(*cells))

    # the contrast SAMI learns from: own constitution against its complement, on T=1 responses
    gaps = []
    by_name = {p["name"]: p for p in PRINCIPLES}
    rows = list(zip(drawn, queries, prompts, made["T=1"]))[:300]
    for (sides, _), query, before, response in rows:
        flip = write_constitution(rng, [by_name[p] for p in sides],
                                  {p: not wanted for p, wanted in sides.items()})
        gaps.append(logp(model, tokenizer, before, response)
                    - logp(model, tokenizer, prompt(flip, query), response))
    print(f"\nlog p(y|x,c) - log p(y|x,flip of c): mean {sum(gaps) / len(gaps):.2f} nats, "
          f"positive for {sum(g > 0 for g in gaps) / len(gaps):.2f}, "
          f"over half a nat in size for {sum(abs(g) > 0.5 for g in gaps) / len(gaps):.2f}")
    print(f"\n{prompts[0]}{made['greedy'][0]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocab_size", type=int, default=800)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure_only", action="store_true",
                        help="only print the table of the base that is there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng, start, base = random.Random(args.seed), time.time(), HERE / "base"

    if not args.measure_only:
        write_queries(rng, TRAIN_THINGS, 1000, HERE / TASK["train"])
        write_queries(rng, TEST_THINGS, 300, HERE / TASK["test"])
        folder = HERE / "base.tmp"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        encoding = train_tokenizer(rng, args.vocab_size)
        export_tokenizer(encoding, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        check_tokenizer(rng, encoding, tokenizer)
        model = pretrain(args, rng, tokenizer)
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id,
                                                   pad_token_id=tokenizer.pad_token_id)
        model.save_pretrained(folder)
        shutil.rmtree(base, ignore_errors=True)
        os.replace(folder, base)
        print(f"wrote {base} after {(time.time() - start) / 60:.1f} min", flush=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(args.seed)
    measure(random.Random(args.seed + 1), model, tokenizer)
    print(f"done in {(time.time() - start) / 60:.1f} min")


if __name__ == "__main__":
    sys.exit(main())
