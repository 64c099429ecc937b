r"""A secret of 32 bytes in a file of the state folder, for its user's eyes alone.

    TAG HEX\n     a tag and the secret in hex, so that a damaged or foreign file is told apart from
                  a secret, and a person sees what the file is

Made once and never changed. Knows nothing of what the secret is for.
"""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from natswarm.errors import NatswarmError

__all__ = ["SECRET_BYTES", "SecretFile"]

SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class SecretFile:
    """One kind of secret.

    Attributes:
        tag: First word of its files.
        noun: What errors call it, such as `identity`.
        error: What is raised.
        remedy: What to do about a damaged one, for people to read.
    """

    tag: str
    noun: str
    error: type[NatswarmError]
    remedy: str

    def load(self, path: Path) -> bytes | None:
        """Read a secret; None: there is no such file.

        Raises:
            NatswarmError: `error`: damaged, unreadable, or readable by other users.
        """
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            text = path.read_text("ascii")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise self.error(f"cannot read the {self.noun} at {path}: {error}") from error
        # Windows keeps its permissions elsewhere; its mode bits mean nothing.
        if os.name == "posix" and mode & 0o077:
            raise self.error(
                f"the {self.noun} at {path} can be read by other users (mode {mode:04o}); "
                f"run: chmod 600 {path}"
            )
        tag, _, secret = text.strip().partition(" ")
        try:
            if tag != self.tag or len(bytes.fromhex(secret)) != SECRET_BYTES:
                raise ValueError(tag)
            return bytes.fromhex(secret)
        except ValueError as error:
            raise self.error(
                f"{path} holds no {self.noun}, or is damaged; {self.remedy}"
            ) from error

    def store_new(self, path: Path, secret: bytes) -> bytes:
        """Store a secret with mode 0600, unless there is one; return the one that is there now.

        Raises:
            NatswarmError: `error`: it cannot be stored, or the one that is there is of no use.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Written beside and linked into place: a crash leaves no half a key, and of two
            # processes that start at once one wins and both read the winner's.
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(f"{self.tag} {secret.hex()}\n")
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return self.load(path) or secret
            finally:
                os.unlink(temporary)  # noqa: PTH108 - the pair of mkstemp
        except OSError as error:
            raise self.error(
                f"cannot store the {self.noun} at {path}: {error.strerror}; "
                "choose another folder with --state"
            ) from error
        return secret
