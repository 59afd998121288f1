"""Try to break the readers: a file that a stranger changed is read, or refused by a UserError of one line.

    python tests/fuzz.py                                       all targets, 100,000 inputs each
    python tests/fuzz.py csv prefix --inputs 1000 --seed 3     some of them
    python tests/fuzz.py csv --seed 3 --first 712 --inputs 1   one input again

A target is some sound files in a folder and what is done to read them. For each input one of the files is changed:
bytes flipped, cut, copied, swapped for something nasty; a value or a key of its JSON; a header or a tensor of its
tensors; or all of it drawn anew from its own words. Any exception but a UserError is a failure, and so are more than
SECONDS of computing or, for all inputs together, MEMORY bytes. The first input of a target that fails is kept in the
working directory.
"""

import argparse
import contextlib
import json
import math
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from minigpt import GPT, GPTConfig, Tokenizer, UserError, checkpoint
from minigpt.tokenizer import END_OF_TEXT, byte_characters
from prefix import Banks, peft
from prefix.data import corpus as data
from prefix.data.rows import Skipped, read_rows
from prefix.init import random_banks
from prefix.run import FREE, MACHINE, resume_config
from prefix.trainer import Settings, Trainer

SECONDS, MEMORY = 5, 1 << 29
SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None  # in memory: some disks take their time over each new content
CONFIG = GPTConfig(vocab_size=261, n_positions=16, n_embd=4, n_layer=1, n_head=2)
IDS = torch.arange(6)[None]
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "F8_E4M3": 1, "I64": 8, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8}
BITS = [b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff" * 4, b"\0" * 4]  # NaN, -infinity, ...
NASTY = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[2J", b"\x85", b"\r", b"\n", b"\r\n", b"\t", b" ", b'"', b"'"]
NASTY += [b",", b":", b";", b"{", b"}", b"[", b"]", b"\\", b"\\u0000", b"\\ud800", b"../", b"0", b"-1", b"1e999"]
NASTY += [b"NaN", b"null", b"true", b"9" * 30, b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b'""', b"PK\3\4"]
NASTY += ["\u2028\u202e👩‍👩‍👧é".encode(), b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n"]
VALUES = [None, True, False, 0, -1, 1, 2, 7, 2**31, 2**53, 2**63, 10**30, 10**400, 0.5, -1e308, math.inf, math.nan]
VALUES += ["", "0", "F32", "\0", "\ud800", "\x1b[2J\u202e", "../x", "/dev/zero", "x" * 9999, [], {}, [[]]]


# How a file is changed


def changed_bytes(rng, content):
    if rng.random() < 0.01:
        nasty = rng.choice(NASTY)
        return content + nasty * (150_000 // len(nasty))
    for _ in range(rng.randint(1, 3)):
        a = rng.randint(0, len(content))
        b = min(len(content), a + rng.choice([1, 8, len(content)]))
        nasty, old = rng.choice(NASTY), content[a:b]
        content = content[:a] + rng.choice([b"", old * 2, nasty, nasty + old, rng.randbytes(b - a)]) + content[b:]
        content = content[:b] if rng.random() < 0.1 else content
    return content


def drawn_anew(rng, content):
    return b"".join(rng.choices(re.findall(rb"\w+|\W", content[:5000]) + NASTY, k=rng.randint(0, 100)))


def changed_json(rng, content):
    return json.dumps(changed_value(rng, json.loads(content))).encode()


def changed_value(rng, value):
    """A JSON value with one node changed; a text that is JSON itself, as in safetensors' metadata, is looked into."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        value = value.copy()
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        what = rng.random()
        if what < 0.1:
            del value[key]
        elif what < 0.2 and isinstance(value, dict):
            value[rng.choice([*value, f"{key}x", "\x1b", "x" * 9999])] = value.pop(key)
        else:
            value[key] = changed_value(rng, value[key])
        return value
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.9:
        return json.dumps(changed_value(rng, json.loads(value)))
    if type(value) is int and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, 2 * value, -value, 10**9 * value, str(value), float(value)])
    return rng.choice(VALUES)


def changed_header(rng, content):
    """The header of a safetensors file: its metadata, anything, or its length."""
    header, tensors = parts(content)
    if "__metadata__" in header and rng.random() < 0.5:
        return joined(header | {"__metadata__": changed_value(rng, header["__metadata__"])}, tensors)
    if rng.random() < 0.9:
        return joined(changed_value(rng, header), tensors)
    return rng.choice([0, 1, 200, 1 << 30, (1 << 64) - 1]).to_bytes(8, "little") + content[8:]


def changed_tensor(rng, content):
    """A sound safetensors file in which one tensor has another name, type, shape or content, or is not there."""
    header, tensors = parts(content)
    result, body = {"__metadata__": header.pop("__metadata__", {})}, b""
    one, what = rng.choice(list(header)), rng.randrange(5)
    for name, info in header.items():
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        part = tensors[begin:end]
        if name == one and what == 0:
            continue
        if name == one and what == 1:
            name = rng.choice([name[:-1], f"{name}x", f"transformer.{name}", "lm_head.weight", "h.0.attn.bias"])
        elif name == one and what == 2:
            dtype = rng.choice(list(SIZES))
        elif name == one and what == 3:
            shape = rng.choice([shape[::-1], shape[1:], [*shape, 1], [0, *shape], [2 * n for n in shape]])
        elif name == one:
            part = rng.choice([*BITS, rng.randbytes(4)]) * (len(part) // 4)
        size = SIZES[dtype] * math.prod(shape)
        part = (part + bytes(size))[:size]
        result[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + size]}
        body += part
    return joined(result, body)


def parts(content):
    """A safetensors file -> (its header, the bytes of its tensors)."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def joined(header, tensors):
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + tensors


WAYS = {".json": [changed_json] * 3, ".safetensors": [changed_header, changed_tensor] * 2}


# Targets: each writes sound files into a folder -> (the names of those to change, a function that reads the folder)


def config(folder):
    checkpoint.save(tiny(), folder)
    return ["config.json"], lambda: GPT.from_pretrained(folder)(IDS)


def weights(folder):
    checkpoint.save(tiny(), folder)
    return [checkpoint.WEIGHTS], lambda: GPT.from_pretrained(folder)(IDS)


def shards(folder):
    checkpoint.save(tiny(), folder)
    (folder / checkpoint.WEIGHTS).rename(folder / "model-1.safetensors")
    weight_map = {name: "model-1.safetensors" for name, _ in tiny().named_parameters()}
    (folder / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [checkpoint.INDEX], lambda: GPT.from_pretrained(folder)(IDS)


def vocabulary(folder):
    merges, text = ["h e", "l l", "he ll", "hell o"], f"hello \0é{END_OF_TEXT}"
    tokens = [*byte_characters().values(), *(merge.replace(" ", "") for merge in merges), END_OF_TEXT]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))

    def read():
        tokenizer = Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
        return tokenizer

    return ["vocab.json", "merges.txt"], read


def prefix(folder):
    model, banks = tiny(), random_banks(CONFIG, ["en", "fr"], 3)
    banks.training_record = {"model": "demo", "data": ["demo"], "steps": 3}
    banks.save(folder / "prefix.safetensors", model)
    return ["prefix.safetensors"], lambda: Banks.load(folder / "prefix.safetensors", model).logits(model, IDS)


def adapter(folder):
    model = tiny()
    peft.export_bank(random_banks(CONFIG, ["en"], 3), "en", folder)
    return [peft.CONFIG, peft.WEIGHTS], lambda: peft.import_bank(folder, "en", model).logits(model, IDS, open=["en"])


def state(folder):
    tokenizer = vocabulary(folder)[1]()
    (folder / "x.csv").write_text("en,fr\n" + "".join(f"a{i},b{i}\n" for i in range(99)))
    corpus = data.load([folder / "x.csv"], None, tokenizer, max_tokens=12, home=folder)
    settings = Settings(steps=9, lr=0.1, batch_size=2)
    trainer = Trainer(tiny(), tokenizer, random_banks(CONFIG, ["en", "fr"], 3), corpus, settings, folder)
    (folder / "last").mkdir()
    trainer.log(trainer.optimizer_step())
    trainer.save()

    def read():
        trainer.resume()
        for p in trainer.trained:
            p.grad = torch.ones_like(p)
        trainer.optimizer.step()

    return ["last/state.safetensors", "metrics.jsonl"], read


def run(folder):
    machine = dict.fromkeys(["device", "dtype", "attention"], "auto") | {"micro_batch_tokens": None}
    sound = dict(model="demo", data=["demo"], columns=["en", "fr"], limit=None, max_tokens=384, init="text")
    sound |= dict(prefix_len=10, position_offset=0, settings=vars(Settings(steps=3, lr=0.1)), machine=machine)
    (folder / "config.json").write_text(json.dumps(sound))
    options = dict.fromkeys([*FREE, *MACHINE])
    return ["config.json"], lambda: resume_config(SimpleNamespace(resume=folder, **options))


def rows(**files):
    def target(folder):
        paths = [folder / name.replace("_", ".") for name in files]
        for path, content in zip(paths, files.values()):
            path.write_text(content, encoding="utf-8")
        return [path.name for path in paths], lambda: list(read_rows(paths, None, Skipped()))

    return target


TABLE = 'en,fr,n\nGood day.,Bonjour.,1\n"a ""b"", c","d\ne",2\nx,y\n,z,4\nlast,"derniér",5\n'
OBJECTS = "".join(f'{{"en": "a {i}", "fr": "é\\n{i}", "n": [{i}, null]}}\n' for i in range(5))
TARGETS = {
    **dict(config=config, vocabulary=vocabulary, weights=weights, shards=shards),
    **dict(prefix=prefix, adapter=adapter, state=state, run=run),
    **dict(csv=rows(x_csv=TABLE), tsv=rows(x_tsv=TABLE.replace(",", "\t")), jsonl=rows(x_jsonl=OBJECTS)),
    **dict(text=rows(x_en="a\nb b\n\nd\n", x_fr="é\nf\ng\n\n")),
}


def tiny():
    model, generator = GPT(CONFIG).requires_grad_(False), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.normal_(generator=generator)
    return model


# Running


class Hang(BaseException):
    """Not an OSError, as TimeoutError is: readers catch those."""


def on_alarm(*_):
    raise Hang(f"more than {SECONDS} s")


@contextlib.contextmanager
def limits():
    """Inside, the process gets MEMORY bytes more than it has; see `outcome` for the time."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGVTALRM, on_alarm)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(read, folder):
    """What became of an input, in a few words that are the same for inputs of one kind. Failures begin with FAILED."""
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 100)  # for what waits, or never comes back to Python: it ends the process
    try:
        read()
        return "accepted"
    except UserError as error:
        text = str(error)
        if len(text.splitlines()) != 1 or len(text) > 1100:
            return f"FAILED: no single line: {text!r:.80}"
        text = re.sub(r"'.*'|\".*\"|-?\d[\d.,e+-]*", "_", text.replace(str(folder), ""))
        return re.split(r" \(|\[|, not |, found |cannot be | = | is (?!not)", text)[0][:80]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        return f"FAILED: {type(error).__name__}: {error}"[:100]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def fuzz(name, inputs, seed, first=0):
    """-> (Counter of outcomes, the command that repeats the first failure or None)."""
    outcomes, failure = Counter(), None
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-", dir=SHM)))
        names, read = TARGETS[name](folder)
        sound = {file: (folder / file).read_bytes() for file in names}
        read()  # what torch imports at its first use does not count
        stack.enter_context(limits())
        for i in range(first, first + inputs):
            rng = random.Random(f"{name} {seed} {i}")
            file = rng.choice(names)
            way = rng.choice([changed_bytes, drawn_anew, *WAYS.get(Path(file).suffix, [changed_bytes])])
            changed = way(rng, sound[file])
            for other in names:
                (folder / other).write_bytes(changed if other == file else sound[other])
            words = outcome(read, folder)
            outcomes[words] += 1
            if words.startswith("FAILED") and failure is None:
                failure = f"python tests/fuzz.py {name} --seed {seed} --first {i} --inputs 1    # {words}"
                Path(f"fuzz-{name}-{seed}-{i}-{Path(file).name}").write_bytes(changed)
    return outcomes, failure


def main():
    parser = argparse.ArgumentParser(description="Read damaged files: each is accepted or refused, and nothing else.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--inputs", type=int, default=100_000, metavar="N", help="for each target (100,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the number of the first input (0)")
    args, failures = parser.parse_args(), []
    for name in args.targets or TARGETS:
        began = time.monotonic()
        outcomes, failure = fuzz(name, args.inputs, args.seed, args.first)
        seconds = time.monotonic() - began
        print(f"{name}: {args.inputs:,} inputs in {seconds:.0f} s, {outcomes['accepted']:,} accepted")
        for words, n in outcomes.most_common():
            print(f"  {n:8,}  {words}")
        failures += [failure] * bool(failure)
    print("\n".join(failures) or "No failure.")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
