"""One run on a GPU that checks and measures what can only be pretended without one. RESULTS.md has an H100's.

    python tests/benchmarks/gpu.py                               all parts; meant to end within eight minutes on an H100
    python tests/benchmarks/gpu.py --parts training decode       some of them
    python tests/benchmarks/gpu.py --device cpu --shape demo     the same code, dry

Each part prints a line of JSON as soon as it is known; a part that fails prints its error, and the next one runs. The table
comes last. It needs no network, no checkpoint (a model of GPT-2 XL's shape is drawn on the device) and no package but the
six: what needs pytest, nltk, transformers or peft says so where they are missing. "expected" is exact where the program
decides it; of speed it is arithmetic for GPT-2 XL in bfloat16 on an H100 (minigpt/README.md).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from common import Peak, circumstances, first_line, profile, replaced, timings, waits

from minigpt import GPT, GPTConfig, Tokenizer, cache, checkpoint
from minigpt.config import PUBLISHED
from minigpt.generate import Prompt, generate
from minigpt.loss import nll_sum, padded_rows
from prefix.banks import Banks
from prefix.batches import BatchLoader
from prefix.data import corpus as data
from prefix.decoding import Decoding
from prefix.init import random_banks
from prefix.run import DEMO_CORPUS, DEMO_PREFIX
from prefix.sequences import pack_pairs
from prefix.trainer import Settings, Trainer
from prefix.translation import translate

SHAPES = {"demo": GPTConfig.from_file(checkpoint.DEMO / "config.json"), **PUBLISHED}
SENTENCE, SPREAD = 42, 0.5  # tokens of a sentence that is drawn, and the standard deviation of their logarithm
ROOM = 2e8  # bytes that the part `memory` leaves free
args = None  # of the command line


def main():
    global args
    args, rows = parse_arguments(), []
    for name in args.parts:
        began = time.perf_counter()
        try:
            found = PARTS[name]()
        except Exception as error:  # each part stands for itself
            traceback.print_exc()
            found = {"error": (f"{type(error).__name__}: {first_line(error)}", "none")}
        line = {"part": name, "seconds": round(time.perf_counter() - began, 1)}
        print(json.dumps(line | {what: value for what, (value, _) in found.items()}), flush=True)
        rows += [(name, what, *both) for what, both in found.items() if not isinstance(both[0], dict)]
        if cuda():
            torch.cuda.empty_cache()
    shown = lambda x: "" if x is None else f"{x:,.4g}" if isinstance(x, float) else str(x)
    print(f"\n{'part':10} {'':44} {'measured':>28}   expected")
    for name, what, value, expected in rows:
        print(f"{name:10} {what:44} {shown(value):>28}   {shown(expected)}")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Check and measure the project on one GPU.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--shape", choices=[*SHAPES], default="gpt2-xl", help="of the model that is measured (gpt2-xl)")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    return parser.parse_args()


cuda = lambda: args.device == "cuda"
dtype = lambda: torch.bfloat16 if cuda() else torch.float32
seconds = lambda work: median(timings(work, args.device, 0.3 if cuda() else 0.0))


def program(*words):
    """A python program in the project's folder -> its CompletedProcess; where it failed, the end of what it said is shown."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    if done.returncode:
        print(words, done.returncode, done.stdout[-4000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    return done


# The parts: each a function -> {what: (value, expected or None)}


def machine():
    found = circumstances(args.device)
    if cuda():
        found["compute capability"] = torch.cuda.get_device_capability()
        found["memory, GB"] = torch.cuda.get_device_properties(0).total_memory / 1e9
    return {what: (value, None) for what, value in found.items()}


def kernels():
    """Their own tests: values and gradients against float64."""
    if not (find_spec("pytest") and cuda()):
        return {"tests": ("need a GPU and pytest", "passed")}
    files = [f"tests/minigpt/test_{name}.py" for name in ("kernels", "decode_kernel")]
    done = program("-m", "pytest", "-q", "-n", 8, "--tb=short", *files)
    return {"tests": (first_line(done.stdout.strip().rpartition("\n")[2] or done.stderr), "passed")}


def demo_trainer(folder, device, dtype=torch.float32):
    model, tokenizer = GPT.from_pretrained("demo", device, dtype), Tokenizer.from_pretrained("demo")
    corpus = data.load([DEMO_CORPUS], None, tokenizer, limit=400, home=folder)
    banks = random_banks(model.config, corpus.columns, 10, seed=1).to(device)
    settings = Settings(steps=8, lr=0.05, batch_size=8, warmup=1, eval_every=0)
    return Trainer(model, banks, BatchLoader(corpus, tokenizer, settings, model.device), settings, folder)


def step(trainer):
    return trainer.optimizer_step(trainer.loader.step(trainer.progress.step))


def training():
    """The demo's first steps on the device and on the CPU, and a run that is resumed."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = demo_trainer(folder, args.device), demo_trainer(folder, "cpu")
        pairs = [(step(ours), step(theirs)) for _ in range(2)]
        apart = lambda name: max(abs(one[name] / other[name] - 1) for one, other in pairs)
        found = {"loss, float32, off the CPU's by": (apart("loss"), "< 1e-5")}
        found["norm, float32, off the CPU's by"] = (apart("grad_norm"), "< 1e-3")
        (Path(folder) / "last").mkdir()
        ours.log(pairs[-1][0])
        ours.save()
        record, n = waits(lambda: step(ours), args.device)
        found["waits in a step"] = (n, 1)
        resumed = demo_trainer(folder, args.device)
        resumed.resume()
        found["a resumed run has the same bits"] = (step(resumed) == record and step(resumed) == step(ours), True)
        for dtype in (torch.bfloat16, torch.float16):
            loss = step(demo_trainer(folder, args.device, dtype))["loss"]
            found[f"loss, {dtype}, off by"] = (abs(loss / pairs[0][1]["loss"] - 1), "< 2e-2")
    return found


def texts():
    """The demo's translations on the device and on the CPU: dtypes, beams, batch sizes, graphs, waits."""
    tokenizer = Tokenizer.from_pretrained("demo")
    corpus = data.load([DEMO_CORPUS], None, tokenizer)
    sources = [corpus.text(row, 1) for row in islice(corpus.rows("test"), 64 if cuda() else 3)]

    def run(device=args.device, dtype=torch.float32, **how):
        model = GPT.from_pretrained("demo", device, dtype)
        banks = Banks.load(DEMO_PREFIX, model)
        return [r.text for r in translate(model, tokenizer, banks, sources, ("fr", "en"), Decoding(**how))]

    share = lambda one, other: sum(a == b for a, b in zip(one, other)) / len(sources)
    exact, (ours, n) = run("cpu"), waits(run, args.device)
    found = {"same texts as the CPU, float32": (share(ours, exact), 1.0), "waits": (n, None)}
    found["same texts, batch of 5"] = (share(run(batch_size=5), exact), 1.0)
    found["same texts, 4 beams"] = (share(run(beams=4), run("cpu", beams=4)), 1.0)
    for dtype in (torch.bfloat16, torch.float16):
        found[f"same texts, {dtype}"] = (share(run(dtype=dtype), exact), None)
    for dtype, bound in {torch.float32: "< 1e-2", torch.bfloat16: "< 1e-1"}.items():
        apart = replays_against_steps(lambda: (run(dtype=dtype), run(dtype=dtype, beams=4)))
        found[f"{len(apart)} replays, {dtype}, off a step by"] = (max(apart, default=None), bound)
    return found | {"what decoding does without": (", ".join(cache.FAILED) or "nothing", "nothing")}


def replays_against_steps(work):
    """Runs work() -> of each replay: its logits less a plain step's from the same state, relative to their spread."""
    apart, gpu_step = [], cache.gpu_step

    def both(model, c, lengths):
        parts = c.state, c.ids, c.visible
        before, recorded = [x.clone() for x in parts], gpu_step(model, c, lengths)[: len(lengths)].clone()
        if c.graph:
            after = [x.clone() for x in parts]
            [x.copy_(old) for x, old in zip(parts, before)]
            with replaced(c, "kernel", None):
                plain = cache.decode_step(model, c, lengths).float()
            [x.copy_(new) for x, new in zip(parts, after)]
            apart.append(float((recorded.float() - plain).norm() / (plain - plain.mean(dim=-1, keepdim=True)).norm()))
        return recorded

    with replaced(cache, "gpu_step", both):
        work()
    return apart


def ceilings():
    """What the machine gives: a copy, and matrix products at the shape's sizes, in TFLOP/s."""
    c, (n, size, many) = SHAPES[args.shape], (16384, 8192, 24) if cuda() else (64, 128, 2)
    C, V = c.n_embd, c.vocab_size
    draw = lambda *shape: torch.randn(*shape, device=args.device, dtype=dtype())
    rate = lambda a, b: 2 * a.size(0) * a.size(1) * b.size(1) / seconds(lambda: a @ b) / 1e12
    x = draw(size, size)
    found = {"copy, GB/s": (2 * x.nbytes / seconds(x.clone) / 1e9, 3000.0), "square product": (rate(x, x), 790.0)}
    for name, (i, o) in {"c_attn": (C, 3 * C), "c_proj": (C, C), "c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}.items():
        found[name] = (rate(draw(n, i), draw(i, o)), 650.0)
        found[f"{name}, backward"] = (rate(draw(n, o), draw(i, o).T), 650.0)
    for rows in (V, -(-V // 64) * 64):  # 50,257 are not aligned
        found[f"head of {rows} rows"] = (rate(draw(1024, C), draw(rows, C).T), None)
    weights = [draw(C, 4 * C) for _ in range(many)]  # more than the L2 cache holds
    for rows in (1, 8, 32, 128):
        x = draw(rows, C)
        taken = seconds(lambda: [x @ w for w in weights])
        found[f"weights times {rows} tokens, GB/s"] = (sum(w.nbytes for w in weights) / taken / 1e9, None)
    return found


def random_model():
    """The shape, drawn on the device and frozen."""
    with torch.device("meta"):
        model = GPT(SHAPES[args.shape])
    model = model.to(dtype()).to_empty(device=args.device)
    wte = torch.zeros(padded_rows(model.config.vocab_size), model.config.n_embd, device=args.device, dtype=dtype())
    model.wte.weight = torch.nn.Parameter(wte[: model.config.vocab_size])  # as checkpoint.load_weights pads it
    for name, p in model.requires_grad_(False).named_parameters():
        p.normal_(std=0.02) if p.dim() == 2 else p.fill_(float("ln_" in name and name.endswith("weight")))
    return model.eval()


def random_batch(config, tokens):
    """Packed random pairs of so many tokens or a few more."""
    g, pairs, n, most = torch.Generator().manual_seed(0), [], 0, config.n_positions // 2 - 1
    while n < tokens:
        lengths = (torch.randn(2, generator=g).mul(SPREAD).exp() * SENTENCE).int().clamp(2, most).tolist()
        source, target = (torch.randint(config.vocab_size, (k,), generator=g).tolist() for k in lengths)
        pairs.append((source, target, len(pairs) % 2, 1 - len(pairs) % 2))
        n += sum(lengths) + 1
    return pack_pairs(pairs, 198, config.vocab_size - 1, torch.device(args.device))


def speed():
    """Training at the shape: tokens/s and memory of a micro-batch, and where its time goes."""
    model, found, c, full = random_model(), {}, SHAPES[args.shape], 16384 if cuda() else 200
    cases = {"full": (full, 10, False), "100 slots": (full, 100, False), "an eighth": (full // 8, 10, False)}
    for name, (tokens, prefix_len, again) in (cases | {"checkpointing": (full, 10, True)}).items():
        batch, banks = random_batch(c, tokens), random_banks(c, ["en", "fr"], prefix_len).to(args.device)
        optimizer, peak = torch.optim.AdamW(banks.parameters(), lr=1e-3), Peak(args.device)
        model.checkpoint_activations = again

        def work():
            hidden = model.hidden(batch.ids, batch.packed, banks.slots())
            nll_sum(hidden[batch.target_index], model.wte.weight, batch.targets).backward()
            optimizer.step()
            optimizer.zero_grad()

        taken, (N, M), expect = seconds(work), (len(batch.ids), len(batch.targets)), name == "full"
        flops = 4 * N * c.n_layer * (4 * c.n_embd**2 + 2 * c.n_embd * c.mlp_dim) + 4 * M * c.vocab_size * c.n_embd
        found[f"{name}: tokens/s"] = (N / taken, 75000.0 if expect else None)
        found[f"{name}: TFLOP/s of products"] = (flops / taken / 1e12, 455.0 if expect else None)
        found[f"{name}: peak GB"] = (peak.highest() / 1e9, 29.0 if expect else None)
        found[f"{name}: ms, launches"] = (profile(work, args.device), None)
    return found


def decode():
    """Greedy decoding at the shape, two banks of ten, prompts of 16 to 64 tokens."""
    model, found, c, new = random_model(), {}, SHAPES[args.shape], 48 if cuda() else 4
    slots = random_banks(c, ["en", "fr"], 10).to(args.device).slots().to(model.dtype)
    for rows, expected in ({1: 2.0, 8: 2.0, 32: 2.2, 128: 3.2} if cuda() else {1: None, 3: None}).items():
        ids = [torch.randint(c.vocab_size, (int(n),)).tolist() for n in torch.randint(16, 65, (rows,))]
        prompts = lambda k: [Prompt(i, k, [2] * (len(i) - 1) + [3]) for i in ids]
        run = lambda k: generate(model, prompts(k), [], slots, batch_size=rows)
        first, whole = seconds(lambda: run(1)), seconds(lambda: run(new))
        found[f"{rows} rows: ms to the first token"] = (1e3 * first, None)
        found[f"{rows} rows: ms a step"] = (1e3 * (whole - first) / (new - 1), expected)
        found[f"{rows} rows: ms, launches of all"] = (profile(lambda: run(new), args.device), None)
    return found


def memory():
    """Out of memory on purpose: the micro-batch is halved until it fits, and the step is done."""
    if not cuda():
        return {"halved": ("needs a GPU", True)}
    with tempfile.TemporaryDirectory() as folder:
        t = demo_trainer(folder, args.device)
        t.loader.batch_size, before = 512, t.loader.micro_batch_tokens
        filling = torch.empty(int(torch.cuda.mem_get_info()[0] - ROOM), dtype=torch.int8, device=args.device)
        loss, after = step(t)["loss"], t.loader.micro_batch_tokens
        del filling
        return {"halved": (after < before, True), "tokens that fit": (after, None), "loss": (loss, None)}


def commands():
    """The three commands on the demo; training is killed and resumed."""
    with tempfile.TemporaryDirectory() as folder:
        out, on = Path(folder) / "run", ["--device", args.device]
        words = ["train.py", *on, "--out", out, "--limit", 400, "--steps", 40 if cuda() else 4, "--batch-size", 8]
        words = [sys.executable, *map(str, words), "--save-every", "1", "--eval-every", "0"]
        killed, metrics = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL), out / "metrics.jsonl"
        while killed.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 1):
            time.sleep(0.02)
        killed.kill()
        found = {"train.py killed": (killed.wait(), -9)}
        found["train.py --resume"] = (program("train.py", *on, "--resume", out).returncode, 0)
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        found["each step is there once"] = (steps == list(range(1, len(steps) + 1)), True)
        found["translate.py"] = (program("translate.py", *on, "--prefix", out, "Il pleut.").returncode, 0)
        few = ["--prefix", out, "--limit", 4, "--draws", 1, "--shots", 1, "--max-new-tokens", 8]
        return found | {"evaluate.py": (program("evaluate.py", *on, *few).returncode if find_spec("nltk") else "needs nltk", 0)}


def others():
    """transformers' logits of the demo, and a training step of peft's prefix tuning at the shape."""
    if not (find_spec("transformers") and find_spec("peft")):
        return {"transformers and peft": ("not installed", None)}
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(checkpoint.DEMO, dtype=torch.float32).to(args.device).eval()
    ids = torch.randint(4096, (2, 20), device=args.device)
    with torch.no_grad():
        apart = GPT.from_pretrained("demo", args.device)(ids) - theirs(ids).logits
    c = SHAPES[args.shape]
    sizes = {name: getattr(c, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    with torch.device(args.device):  # there it is drawn in no time
        base = GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)).to(dtype())
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)).to(args.device)
    packed, peak = random_batch(c, 5000 if cuda() else 300).packed, Peak(args.device)
    padded = torch.randint(c.vocab_size, (len(packed.lengths), packed.longest), device=args.device)
    mask = (torch.arange(packed.longest) < torch.tensor(packed.lengths)[:, None]).long().to(args.device)
    taken = seconds(lambda: model(input_ids=padded, attention_mask=mask, labels=padded).loss.backward())
    found = {"logits off transformers' by": (float(apart.abs().max()), "< 1e-3")}
    found[f"peft, {len(padded)} pairs: tokens/s"] = (packed.n_tokens / taken, None)
    return found | {f"peft, {len(padded)} pairs: peak GB": (peak.highest() / 1e9, None)}


PARTS = (machine, kernels, training, texts, ceilings, speed, decode, memory, commands, others)
PARTS = {part.__name__: part for part in PARTS}


if __name__ == "__main__":
    main()
