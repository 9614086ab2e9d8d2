"""What the lessons share: a random model, a one-id-a-letter tokenizer, a task, the command."""
import contextlib, io, json, string, sys
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sami

# one merge: "a" + "b" is one token
LETTERS = ["<eos>", *string.ascii_letters, *string.digits, *" .,:?!{}\n", "ab"]
PRINCIPLES = [dict(name=f"p{i}", positive=f"do {s}", negative=f"no {s}", heldout=i > 4)
              for i, s in enumerate("rstuvw", 1)]
TASK = dict(sampling_prompt="{constitution}\nQ: {query}\nA:", stop=["\n"])


def model(seed=0, scale=0.3, **config):
    """A random Llama, its matrices large enough that what it says depends on all it reads."""
    torch.manual_seed(seed)
    small = dict(vocab_size=len(LETTERS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                 bos_token_id=0, eos_token_id=0)
    net = LlamaForCausalLM(LlamaConfig(**{**small, **config})).eval()
    for p in net.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=scale)
    return net


def tokenizer():
    bpe = models.BPE({t: i for i, t in enumerate(LETTERS)}, [("a", "b")])
    (inner := Tokenizer(bpe)).decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<eos>")


def folder(path, principles=PRINCIPLES, train=40, test=6, **task):
    """Write a task (path/task) and its base model (path/base); returns the flags that name them."""
    (path / "task").mkdir(parents=True)
    (path / "task" / "task.json").write_text(json.dumps({**TASK, **task}))
    (path / "task" / "principles.json").write_text(json.dumps(principles))
    for name, count in dict(train=train, test=test).items():
        words = [f"{name} {string.ascii_letters[i]}" for i in range(count)]
        lines = "".join(json.dumps(dict(query=w)) + "\n" for w in words)
        (path / "task" / f"{name}.jsonl").write_text(lines)
    model().save_pretrained(path / "base"), tokenizer().save_pretrained(path / "base")
    return [f"--task={path}/task", f"--model={path}/base", f"--out_dir={path}/out", "--device=cpu",
            "--n=2", "--batch_size=4", "--max_new_tokens=8", "--eval_queries=0", "--lr=1e-3",
            "--temperature=0", "--iterations=1", "--steps=2"]


def command(*flags):
    """`python sami.py flags` in this process -> exit code, standard output, standard error."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", ["sami.py", *flags])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sami.run(sami.main)
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()
