"""What test_parallel.py runs in each process: cases, made of the functions of sami.py's loop."""
import json, shutil, sys, threading, time
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.fsdp import FSDPModule

import sami, tiny


def case(folder, out, parallel="auto", node=0, dtype="float32", given="", **flags):
    """Sample, load the base anew, train two steps, measure, save in `out` -> what a process saw.
    node: processes of a pretended node; given: a file of samples that are there already."""
    run = Path(f"{out}-run")
    cfg = sami.Config(**{**dict(
        model=str(folder), out_dir=str(run), device="cpu", parallel=parallel, dtype=dtype, n=3,
        batch_size=5, temperature=0.0, max_new_tokens=8, lr=3e-4, tokens_per_pass=200,
        eval_queries=5, seed=3), **flags})
    sami.NODE = node or sami.WORLD
    task, tokenizer = sami.load_task(folder.parent / "task"), tiny.tokenizer()
    device = sami.pick_device(cfg)
    model = sami.load_model(cfg.model, device, cfg)
    (run / "samples").mkdir(parents=True, exist_ok=True)
    if given and sami.RANK == 0:
        shutil.copy(folder.parent / given, run / "samples/iteration-1.jsonl")
    sami.sum_processes([0])
    examples = sami.collect(model, tokenizer, task, cfg, 1, 8)
    found = dict(examples=[dict(vars(e)) for e in examples], reports=[])
    model = None
    model = sami.load_model(cfg.model, device, cfg)
    sami.add_base_logps(model, examples, cfg)
    with mock.patch.object(sami, "record", lambda cfg, row: found["reports"].append(row)):
        sami.train(model, examples, 2, 1, cfg)
    held, scored = sami.heldout_information(model, tokenizer, task, cfg)
    sami.save_model(model, tokenizer, out)
    own = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
    own /= sum(p.numel() for p in model.parameters())
    return dict(found, held=held, scored=[e.number for e, *_ in scored], own=own,
                shared=model.shares_prompts, wrapped=isinstance(model, FSDPModule))


def loading(folder, out, parallel):
    """Load the model of a folder -> the most memory that took, as a share of its weights' bytes.

    Anonymous pages count alone: those of a file that is mapped are the system's, and no copy."""
    def taken():
        [line] = [x for x in Path("/proc/self/status").read_text().split("\n") if "RssAnon" in x]
        return int(line.split()[1]) * 1024

    cfg, most, done = sami.Config(device="cpu", parallel=parallel), [0], threading.Event()
    device = sami.pick_device(cfg)
    sami.load_model(str(folder.parent / "llama"), device, cfg)  # imports, threads, connections

    def watch():
        while not done.wait(0.002):
            most[0] = max(most[0], taken())

    sami.sum_processes([0])
    before, watcher = taken(), threading.Thread(target=watch)
    watcher.start()
    model = sami.load_model(str(folder), device, cfg)
    done.set()
    watcher.join()
    size, after = sum(4 * p.numel() for p in model.parameters()), taken() - before
    return dict(bytes=size, peak=max(most[0] - before, after) / size, after=after / size)


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for name in sys.argv[2:]:
        flags, started = json.loads((root / "cases.json").read_text())[name], time.time()
        folder, out = root / flags.pop("model"), root / f"{name}-{sami.WORLD}"
        what = dict(case=case, loading=loading)[flags.pop("measure", "case")]
        every = sami.gather([what(folder, out, **flags)])
        if sami.RANK == 0:
            print(f"{name}: {time.time() - started:.1f} s", flush=True)
            (root / f"{name}-{sami.WORLD}.json").write_text(json.dumps(every))
    sami.dist.barrier()
    sami.dist.destroy_process_group()
