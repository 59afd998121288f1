"""How much memory loading a checkpoint takes, beside the model itself.

Loading cannot take less than the model in its compute dtype. What it may take beside that is one tensor at a time,
no more: pages of the mapped file are the kernel's, which drops them as it likes, so they are not counted. Counted is
anonymous memory (RssAnon), which must be there or the program dies; a sampling thread keeps its maximum.

    python tests/benchmarks/loading.py                  gpt2-xl: writes 6.2 GB of random float32 weights to read
    python tests/benchmarks/loading.py --layers 4       the same, with fewer layers
    python tests/benchmarks/loading.py --dir DIR        ... and keeps them, to read them again the next time

The time is bound by reading: it is near (bytes of the file) / (bandwidth of the disk, or of memory where the file is
in the page cache). The last line printed is one JSON object.
"""

import argparse
import contextlib
import dataclasses
import json
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from minigpt import GPT
from minigpt.checkpoint import WEIGHTS
from minigpt.config import PUBLISHED


def main():
    parser = argparse.ArgumentParser(description="Measure the peak memory of GPT.from_pretrained.")
    parser.add_argument("--layers", type=int, default=48, help="of gpt2-xl's 48")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--dir", type=Path, help="write the checkpoint here and keep it; one that is there is used")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # how this script calls itself, to start afresh
    args = parser.parse_args()
    if args.load:
        return measure(args.load, args.dtype)
    with contextlib.nullcontext(args.dir) if args.dir else tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        if not (directory / WEIGHTS).exists():
            write_checkpoint(dataclasses.replace(PUBLISHED["gpt2-xl"], n_layer=args.layers), directory)
        command = [sys.executable, __file__, "--load", str(directory), "--dtype", args.dtype]
        return subprocess.run(command).returncode


def write_checkpoint(config, directory):
    """Random float32 weights, a tensor at a time: the safetensors format is a length, a JSON header, and the data."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(config).named_parameters()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    print(f"Writing {end / 1e9:.1f} GB to {directory}", file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    with open(directory / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            file.write(torch.randn(shape).mul_(0.02).numpy().data)


def measure(directory, dtype):
    """Load in this process, watching its memory; print what it took."""
    torch.zeros(1, dtype=getattr(torch, dtype)).float()  # torch is up before the baseline is taken
    with Watch(anonymous_memory) as watch:
        start = time.perf_counter()
        model = GPT.from_pretrained(directory, dtype=getattr(torch, dtype))
        seconds = time.perf_counter() - start
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    read = (directory / WEIGHTS).stat().st_size
    result = {
        "n_layer": model.config.n_layer,
        "dtype": dtype,
        "model_bytes": size,
        "peak_bytes": watch.peak,
        "ratio": round(watch.peak / size, 4),
        "seconds": round(seconds, 2),
        "read_bytes_per_second": round(read / seconds),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(f"{model.config.n_layer} layers in {dtype}: {size / 1e9:.3f} GB")
    print(f"peak of anonymous memory while loading: {watch.peak / 1e9:.3f} GB, {watch.peak / size:.3f} of the model")
    print(f"{seconds:.1f} s, {read / seconds / 1e9:.2f} GB/s read")
    print(json.dumps(result))
    return 0


class Watch:
    """Samples measure() in a thread while its block runs; `peak`: the most it rose above where it began."""

    def __init__(self, measure, interval=0.002):
        self.measure, self.interval, self.done = measure, interval, threading.Event()

    def __enter__(self):
        self.baseline = self.highest = self.measure()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.highest = max(self.highest, self.measure())
        self.peak = self.highest - self.baseline

    def _sample(self):
        while not self.done.wait(self.interval):
            self.highest = max(self.highest, self.measure())


def anonymous_memory():
    """Bytes of this process's memory that no file backs (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
