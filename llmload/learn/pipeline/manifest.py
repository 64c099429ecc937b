"""Which states together are one step of the whole model: a file beside them.

It is replaced once all of them are there, so whatever it names can be gone back to.

This file does not know how states get here: see `snapshots.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmload.errors import LearningFailed
from llmload.weights import replace_file

__all__ = ["Manifest"]

MANIFEST_NAME = "pipeline.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A step that can be gone back to.

    Attributes:
        run: Names the training towards its stages.
        model_hash: `Model.content_hash` of the model that it began with.
        step: Steps made.
        digests: SHA-256 of the state of each block on the stages, by its index in decimal.
    """

    run: bytes
    model_hash: str
    step: int
    digests: Mapping[str, str]

    @classmethod
    def load(cls, folder: Path, model_hash: str) -> Manifest | None:
        """Return that of a folder, if there is one.

        Raises:
            LearningFailed: It is of another model, or damaged.
        """
        file = folder / MANIFEST_NAME
        try:
            facts = json.loads(file.read_text("utf-8"))
            run = bytes.fromhex(facts["run"])
            found = cls(run, facts["model"], facts["step"], facts["digests"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise LearningFailed(f"{file} is damaged. Learn in another folder (--out)") from error
        if found.model_hash != model_hash:
            raise LearningFailed(
                f"{folder} holds the training of another model. Learn in another folder (--out)"
            )
        return found

    def save(self, folder: Path) -> None:
        """Take the place of what is in a folder.

        Raises:
            OSError: It can't be written.
        """
        facts = {
            "run": self.run.hex(),
            "model": self.model_hash,
            "step": self.step,
            "digests": self.digests,
        }
        replace_file(folder / MANIFEST_NAME, lambda path: path.write_text(json.dumps(facts)))
