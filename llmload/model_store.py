"""The models of this device: take one in, list them, check one, make one for benchmarks.

A model in the store is a folder in Hugging Face layout under a name, with one more file that says
what it was when it came: `imported.json`. Taking in means reading and checking every value once, so
that a damaged download, another architecture or a pickle is refused here and not hours later on a
peer. Whoever has a model folder somewhere else may go on using it by its path.

This file does not know how a model computes.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from llmload.config import CONFIG_FILE_NAME, GPT2Config
from llmload.errors import ModelFolderError
from llmload.model_folder import remember_hash, save_config
from llmload.tokenizer import TOKENIZER_FILE_NAME, Tokenizer, byte_tokenizer
from llmload.weights import (
    SHARDS_FILE_NAME,
    WEIGHTS_FILE_NAME,
    content_hash_of_folder,
    random_weights,
    save_weights,
    weights_files,
)

__all__ = ["PUBLISHED_SHAPES", "ModelStore", "StoredModel"]

# n_layer, n_head, n_embd of the models that were published; all have this vocabulary and context.
PUBLISHED_SHAPES = {
    "distilgpt2": (6, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
_VOCAB_SIZE, _N_CTX, _END_OF_TEXT_ID = 50257, 1024, 50256

_IMPORTED_FILE_NAME = "imported.json"
# Names are folder names on every system, and never look like a path.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model of the store.

    Attributes:
        name: Its name on this device.
        folder: Its folder.
        content_hash: The hash that it had when it was taken in; "" if that is not known any more.
    """

    name: str
    folder: Path
    content_hash: str

    @property
    def byte_size(self) -> int:
        """Bytes of its files."""
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())


class ModelStore:
    """The models of this device.

    Args:
        root: Where they lie; None for the data folder of the user.
    """

    def __init__(self, root: Path | None = None) -> None:
        data = platformdirs.user_data_path("llmload", appauthor=False)
        self.root = data / "models" if root is None else root

    def models(self) -> Iterator[StoredModel]:
        """Yield the models by name."""
        if self.root.is_dir():
            for folder in sorted(self.root.iterdir()):
                if _NAME.fullmatch(folder.name) and (folder / CONFIG_FILE_NAME).is_file():
                    yield self._stored(folder)

    def find(self, name_or_folder: str) -> Path:
        """Return the folder of a model: a folder of that path, or a model of that name.

        Raises:
            ModelFolderError: There is neither.
        """
        folder = Path(name_or_folder)
        if folder.is_dir():
            return folder
        if _NAME.fullmatch(name_or_folder) and (self.root / name_or_folder).is_dir():
            return self.root / name_or_folder
        names = ", ".join(model.name for model in self.models()) or "none yet"
        raise ModelFolderError(
            folder,
            "is neither a folder nor the name of a model of this device",
            f"Models here: {names}. Add one with `llmload model import FOLDER`.",
        )

    def take_in(self, source: Path, name: str | None = None) -> StoredModel:
        """Check a model and copy it into the store.

        Args:
            source: A model folder, or the safetensors file in one where there are several.
            name: Its name from now on; None for the name of its folder.

        Raises:
            ModelFolderError: It is damaged, incomplete, of another architecture, or the name is
                taken. The store is as it was.
            OSError: It can't be copied.
        """
        folder = source if source.is_dir() else source.parent
        name = self._free_name(folder.resolve().name if name is None else name)
        config = GPT2Config.from_folder(folder)
        tokenizer = Tokenizer.from_folder(folder, config)

        def fill(new: Path) -> None:
            shutil.copyfile(folder / CONFIG_FILE_NAME, new / CONFIG_FILE_NAME)
            # Older folders have vocab.json and merges.txt; what is written is the newer form.
            (new / TOKENIZER_FILE_NAME).write_text(tokenizer.to_json(), encoding="utf-8")
            if source.is_file():
                shutil.copyfile(source, new / WEIGHTS_FILE_NAME)
                return
            for file in weights_files(folder):
                if not file.exists():
                    raise ModelFolderError(
                        file, f"is missing, but {SHARDS_FILE_NAME} names it", "Copy it as well."
                    )
                shutil.copyfile(file, new / file.name)
            if not (new / WEIGHTS_FILE_NAME).exists():
                shutil.copyfile(folder / SHARDS_FILE_NAME, new / SHARDS_FILE_NAME)

        return self._add(name, fill)

    def make_random(self, shape: str, seed: int, name: str | None = None) -> StoredModel:
        """Make a model of a published shape with fresh weights: right in size, and says nonsense.

        Args:
            shape: One of `PUBLISHED_SHAPES`.
            seed: Equal seeds give equal models.
            name: Its name; None for one made of shape and seed.

        Raises:
            ValueError: The shape is unknown.
            ModelFolderError: The name is taken.
            OSError: It can't be written.
        """
        if shape not in PUBLISHED_SHAPES:
            raise ValueError(f"there is no shape {shape!r}, only {', '.join(PUBLISHED_SHAPES)}")
        n_layer, n_head, n_embd = PUBLISHED_SHAPES[shape]
        config = GPT2Config(
            vocab_size=_VOCAB_SIZE,
            n_ctx=_N_CTX,
            n_embd=n_embd,
            n_layer=n_layer,
            n_head=n_head,
            bos_token_id=_END_OF_TEXT_ID,
            eos_token_id=_END_OF_TEXT_ID,
        )

        def fill(new: Path) -> None:
            save_config(new, config)
            save_weights(new, random_weights(config, seed))
            (new / TOKENIZER_FILE_NAME).write_text(byte_tokenizer().to_json(), encoding="utf-8")

        return self._add(self._free_name(name or f"{shape}-random-{seed}"), fill)

    def verify(self, name_or_folder: str) -> str:
        """Read every value of a model anew and return its hash.

        Raises:
            ModelFolderError: It is damaged, or not what was taken in.
        """
        folder = self.find(name_or_folder)
        config = GPT2Config.from_folder(folder)
        Tokenizer.from_folder(folder, config)
        found = content_hash_of_folder(folder, config=config)
        expected = self._stored(folder).content_hash
        if expected and found != expected:
            raise ModelFolderError(
                folder,
                f"its hash is {found[:16]}, and was {expected[:16]} when it was imported",
                "Import it again from a source that you trust.",
            )
        return found

    def _add(self, name: str, fill: Callable[[Path], None]) -> StoredModel:
        """Let `fill` make the folder; it appears whole and checked, or not at all."""
        self.root.mkdir(parents=True, exist_ok=True)
        new = self.root / f".new-{secrets.token_hex(4)}"
        new.mkdir()
        try:
            fill(new)
            identity = content_hash_of_folder(new)
            (new / _IMPORTED_FILE_NAME).write_text(
                json.dumps({"content_hash": identity}) + "\n", encoding="utf-8"
            )
            new.replace(self.root / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        remember_hash(self.root / name, identity)
        return self._stored(self.root / name)

    def _free_name(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ModelFolderError(
                Path(name),
                "is no name for a model: letters, digits, '.', '_' and '-', at most 64",
                "Choose one with --name.",
            )
        if (self.root / name).exists():
            raise ModelFolderError(
                self.root / name,
                f"there is a model called {name} already",
                "Choose another name with --name, or remove that folder.",
            )
        return name

    def _stored(self, folder: Path) -> StoredModel:
        identity = ""
        with suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads((folder / _IMPORTED_FILE_NAME).read_text(encoding="utf-8"))
            identity = str(facts["content_hash"])
        return StoredModel(folder.name, folder, identity)
