"""What test_parallel.py runs in each process: every case, by the functions that sami.py's loop is made of."""
import json, sys
from pathlib import Path

import torch

import sami, tiny


def case(folder, out, parallel="none", lock_step=False, node=0, dtype="float32", given="", **flags):
    """Sample, train two steps, measure, save -> what a process saw. node: GPUs of a pretended node; given: samples."""
    how = torch.device("cpu"), getattr(torch, dtype)
    cfg = sami.Config(**{**dict(n=3, batch_size=5, temperature=0.0, max_new_tokens=8, lr=3e-4, tokens_per_pass=200,
                                eval_queries=5, seed=3, hybrid=node > 0), **flags})
    task, tokenizer = sami.load_task(folder.parent / "task"), tiny.tokenizer()
    if node:
        sami.NODE = node
    model = sami.load_model(str(folder), how[0], sami.fsdp_arguments(cfg, *how) if parallel == "fsdp" else None)
    if lock_step:  # as if the weights did not fit one device
        room, sami.sampling_memory = sami.sampling_memory, lambda device: 1e5
    with sami.compute(*how):
        examples = json.loads((folder.parent / given).read_text()) if given else []
        examples = sami.collect(model, tokenizer, task, cfg, 1, 8, examples)
    if lock_step:
        sami.sampling_memory = room
    found = dict(examples=[dict(e) for e in examples], sharded=sami.is_sharded(model), reports=[])
    usable = [e for e in examples if not e["dropped"]]
    sami.add_base_logps(model, usable, cfg, *how)
    sami.train(model, usable, 2, cfg, *how, lambda step, row, optimizer: found["reports"].append(row))
    held = sami.heldout_information(model, tokenizer, task, cfg, *how)
    sami.save_model(model, tokenizer, out)
    own = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
    return dict(found, held={k: v for k, v in held.items() if k != "examples"}, shared=model.can_share[True],
                own=own / sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    sami.join(torch.device("cpu"))
    for name in sys.argv[2:]:
        flags = json.loads((root / "cases.json").read_text())[name]
        every = sami.gather([case(root / flags.pop("model"), root / f"{name}-{sami.WORLD}", **flags)])
        if sami.RANK == 0:
            (root / f"{name}-{sami.WORLD}.json").write_text(json.dumps(every))
    sami.leave()
