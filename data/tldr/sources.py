"""What the prepare.py of tldr, hh, manners and principles share:
download, read the usual formats, write the query files."""
import argparse
import ast
import gzip
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import urllib.request
import zlib
from pathlib import Path


class BadInput(Exception):
    """A file is not what it must be."""


class DownloadFailed(Exception):
    """The network or the server failed."""


def download(name, path, home, mirror="", sha256=""):
    """Fetches home/name to path, unless it is there.
    A broken download stays as .part, to be resumed by the next."""
    if path.exists():
        return path
    url, part = f"{mirror or home}/{name}", path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    start = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        with urllib.request.urlopen(request, timeout=60) as reply:
            # a server may send the whole file all the same
            start = start if reply.status == 206 else 0
            with open(part, "ab" if start else "wb") as out:
                shutil.copyfileobj(reply, out)
        length = reply.headers["Content-Length"]
        if length and part.stat().st_size < start + int(length):
            raise OSError("the connection ended early")
    except (OSError, ValueError, http.client.HTTPException) as e:
        if getattr(e, "code", 0) == 416:  # nothing left to send: this .part is none of this file
            part.unlink()
        raise DownloadFailed(f"{url}: {e}; run the same command again, "
                             "it resumes where it stopped") from None
    found = hashlib.sha256(part.read_bytes()).hexdigest()
    if sha256 and not mirror and found != sha256:
        part.unlink()
        raise DownloadFailed(f"{url}: its sha256 is {found}, not {sha256}; "
                             "try again, or use --base_url=")
    os.replace(part, path)
    print(f"{url}: {path.stat().st_size:,} bytes, sha256 {found}")
    return path


def read_rows(path):
    """Yields (place, row) of one JSON list, or of one object a line, plain or gzip;
    the place is for error messages."""
    n = 0
    if not path.is_file():
        raise BadInput(f"{path} does not exist; give files that do with --source=")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            # the name does not tell: OpenAI's .json files hold one object a line
            is_list = f.read(1) == "["
            f.seek(0)
            for n, row in enumerate(json.load(f) if is_list else f, 1):
                if is_list or row.strip():
                    yield (f"{path} {'row' if is_list else 'line'} {n}",
                           row if is_list else json.loads(row))
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise BadInput(f"{path} line {n + 1}: the gzip ends or breaks here; "
                       "remove it and download it again") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} line {n + 1}: not UTF-8 text; "
                       "the name of a gzip file must end in .gz") from None
    except json.JSONDecodeError as e:
        raise BadInput(f"{path} line {n or e.lineno}: not valid JSON ({e.msg}); "
                       "correct it or fetch it again") from None
    if not n:
        raise BadInput(f"{path} is empty; remove it and download it again")


def first_turn(place, row):
    """What the human says first in a dialogue; a plain string is taken to be just that."""
    if isinstance(row, str):
        return row.strip()
    text = row.get("chosen") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        raise BadInput(f'{place} has no "chosen" dialogue that begins with a blank line and '
                       '"Human:"; give files of helpful-base and harmless-base')
    return re.split(r"\n\n(?:Human|Assistant):", text)[1].strip()


def side(name):
    """Which of the two query files a split or a file of this name feeds."""
    return "test" if "train" not in name and ("test" in name or "valid" in name) else "train"


def same(text):
    """Two queries that differ only in case and white space are the same query."""
    return " ".join(text.lower().split())


def write_queries(folder, train, test):
    """Writes train.jsonl and test.jsonl, both or neither.
    One that no file was given for keeps the queries it has."""
    if not train and not test:
        raise BadInput("there are no queries in these files; give others with --source=")
    for name, rows in (("train", train), ("test", test)):
        if not rows:
            print(f"{name}.jsonl keeps the queries it has: no file was given for it")
            rows += [row for _, row in read_rows(folder / f"{name}.jsonl")]
    held = {same(row["query"]) for row in test}
    kept = [row for row in train if same(row["query"]) not in held]
    if not kept:
        raise BadInput("every train query is a test query as well; "
                       "give different files for the two with --source=")
    for name, rows in (("train", kept), ("test", test)):
        (folder / f"{name}.jsonl.tmp").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("train", "test"):
        os.replace(folder / f"{name}.jsonl.tmp", folder / f"{name}.jsonl")
    print(f"{folder.name}: {len(kept):,} train and {len(test):,} test queries "
          f"({len(train) - len(kept):,} left out of train: they are test queries)")


def constants(path):
    """{name: string} of the plain assignments in a Python file, read without running it."""
    return {node.targets[0].id: node.value.value
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)}


def write_official(folder, own, principles, **prompts):
    """A task folder with the authors' principles and prompts;
    in all else it is our `own` task.json."""
    task = {**json.loads(own.read_text()), **prompts,
            "about": "The prompts and principles are those of the authors."}
    for key in ("train", "test"):
        task[key] = os.path.relpath(own.parent / task[key], folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((own.name, task), (task["principles"], principles)):
        (folder / f"{name}.tmp").write_text(json.dumps(content, indent=2) + "\n")
        os.replace(folder / f"{name}.tmp", folder / name)
    print(f"wrote {folder / own.name} with {len(principles)} principles")


def main(doc, make, official=None):
    """The flags and exit codes of every prepare.py: 0 done, 1 download failed, 2 wrong input."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--source", default="",
        help="local files to take instead of downloading, with commas between")
    if official:
        parser.add_argument(
            "--official", action="store_true",
            help="fetch the authors' prompts and principles instead")
    parser.add_argument(
        "--base_url", default="",
        help="download the same names from here (checksums are only printed)")
    args = parser.parse_args()
    try:
        if not getattr(args, "official", False):
            return make([Path(p) for p in args.source.split(",") if p], args.base_url)
        try:
            official(args.base_url)
        except (KeyError, ValueError, SyntaxError) as e:
            raise BadInput(f"the files in official/ are not the authors' ({e!r}); "
                           "remove them and run again") from None
    except (BadInput, DownloadFailed, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, BadInput) else 1)
