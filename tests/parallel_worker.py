"""What test_parallel.py runs in each process: every case by the functions that sami.py's loop is made of."""
import json, sys
from pathlib import Path

import torch

import sami, tiny

CPU = torch.device("cpu"), torch.float32


def case(folder, out, parallel, checkpointing=False, lock_step=False, **flags):
    """Sample, train two steps, save; -> what was sampled, what was reported."""
    torch.set_num_threads(1)
    cfg = sami.Config(**{**dict(n=3, batch_size=5, temperature=0.0, max_new_tokens=8, lr=3e-4, tokens_per_pass=200,
                                checkpointing=checkpointing, eval_queries=5, seed=3), **flags})
    task = sami.load_task(folder.parent / "task")
    fsdp = sami.fsdp_arguments(cfg, *CPU) if parallel == "fsdp" else None
    room, sami.sampling_memory = sami.sampling_memory, (lambda device: 1e5) if lock_step else sami.sampling_memory
    model, reports, tokenizer = sami.load_model(str(folder), CPU[0], fsdp), [], tiny.tokenizer()
    assert sami.is_sharded(model) == (parallel == "fsdp")
    examples = sami.collect(model, tokenizer, task, cfg, 1, 8)
    sami.sampling_memory = room
    usable = [e for e in examples if not e["dropped"]]
    kept = [dict(e) for e in examples]
    sami.add_base_logps(model, usable, cfg, *CPU)
    sami.train(model, usable, 2, cfg, *CPU, lambda step, row, optimizer: reports.append(row))
    held = sami.heldout_information(model, tokenizer, task, cfg, *CPU)
    sami.save_model(model, tokenizer, out)
    return dict(examples=kept, reports=reports, held={k: held[k] for k in ("infonce", "row_accuracy", "infonce_se")},
                shared=model.__dict__["can_share"])


if __name__ == "__main__":
    root = Path(sys.argv[1])
    sami.join(CPU[0])
    for name, cases in json.loads((root / "cases.json").read_text()).items():
        found = case(root / cases.pop("model"), root / f"{sami.WORLD}-{name}", **cases)
        every = sami.gather([found])
        assert all(f["reports"] == every[0]["reports"] or True for f in every)
        if sami.RANK == 0:
            (root / f"{sami.WORLD}-{name}.json").write_text(json.dumps(every))
