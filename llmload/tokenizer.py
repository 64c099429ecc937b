"""Text to token ids and back, and text out of a stream of ids.

The tokenizer itself is the library `tokenizers`; it runs GPT-2's byte-level BPE in Rust. This file
adds what it does not do: it checks that the tokenizer fits the model, and it turns tokens into text
one at a time, as far as stop strings let it come.

Streaming is its own problem because a token is a piece of bytes, not of text: an emoji of four
bytes may be spread over three tokens. The library's own way (decode again, and hold the result back
while it ends in U+FFFD) waits for ever when a model emits bytes that never become a character. Here
the bytes go through Python's incremental UTF-8 decoder, which holds back at most three.

Source: Radford et al. 2019, section 2.2; `bytes_to_unicode` of https://github.com/openai/gpt-2.

This file does not know the model, only how many tokens it has.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llmload.config import GPT2Config
from llmload.errors import ModelFolderError
from llmload.stop import StopFilter

__all__ = ["TOKENIZER_FILE_NAME", "TextStream", "Tokenizer", "byte_tokenizer"]

TOKENIZER_FILE_NAME = "tokenizer.json"
# The two files of OpenAI's own layout, which older folders have instead.
VOCABULARY_FILE_NAME = "vocab.json"
MERGES_FILE_NAME = "merges.txt"
_END_OF_TEXT = "<|endoftext|>"

# GPT-2's has 1.3 MB, that of a vocabulary of 256 thousand about 20 MB.
MAX_TOKENIZER_BYTES = 100_000_000


class Tokenizer:
    """Byte-level BPE of one model.

    Args:
        library: A tokenizer whose decoder is ByteLevel, as all of GPT-2's descendants have.

    Raises:
        ValueError: `library` is another kind of tokenizer, or its vocabulary is not made of bytes.
    """

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        if not isinstance(library.decoder, decoders.ByteLevel):
            raise ValueError("this is no byte-level BPE tokenizer, as GPT-2 has")
        # Settings that training code leaves behind, and that would silently change a prompt.
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._token_bytes = _bytes_of_tokens(library)

    @classmethod
    def from_folder(cls, folder: Path, config: GPT2Config) -> Tokenizer:
        """Read `tokenizer.json` of a model folder, or else `vocab.json` and `merges.txt`.

        Raises:
            ModelFolderError: The file is missing, damaged, no byte-level BPE, or has tokens that
                the model does not know.
        """
        file = folder / TOKENIZER_FILE_NAME
        parts = [folder / VOCABULARY_FILE_NAME, folder / MERGES_FILE_NAME]
        files = [file]
        if not file.exists() and all(part.exists() for part in parts):
            file, files = parts[0], parts
        try:
            size_bytes = sum(part.stat().st_size for part in files)
        except OSError as error:
            raise ModelFolderError(
                file,
                f"can't be read ({error.strerror})",
                "transformers writes it with AutoTokenizer.from_pretrained(model)"
                ".save_pretrained(folder).",
            ) from error
        if size_bytes > MAX_TOKENIZER_BYTES:
            raise ModelFolderError(
                file, f"{size_bytes} bytes are too large", "This is no tokenizer of a GPT-2."
            )
        try:
            if files == parts:
                tokenizer = cls(_from_parts(*parts))
            else:
                tokenizer = cls(tokenizers.Tokenizer.from_file(str(file)))
        # The library raises bare `Exception` for whatever is wrong with the file.
        except Exception as error:
            raise ModelFolderError(
                file, f"damaged or not supported ({error})", "Copy the model folder again."
            ) from error
        # A model may have more rows than its tokenizer has tokens (padding to a round number).
        if tokenizer.largest_id >= config.vocab_size:
            raise ModelFolderError(
                file,
                f"has the token id {tokenizer.largest_id}, but the model only {config.vocab_size} "
                f"tokens",
                f"Take {file.name} and config.json from the same model.",
            )
        return tokenizer

    @property
    def largest_id(self) -> int:
        """The largest token id that `encode` can give."""
        return max(self._token_bytes, default=0)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without adding any; "" gives [].

        Raises:
            ValueError: The text came from bytes that are not UTF-8 (it holds lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("the text is not valid UTF-8") from error
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of whole tokens; U+FFFD where their bytes are no valid UTF-8.

        Special tokens such as <|endoftext|>, and ids that the tokenizer does not know, are no text.
        """
        stream = self.stream()
        return "".join(stream.push(token_id) for token_id in token_ids) + stream.finish()

    def to_json(self) -> str:
        """Return the content of a `tokenizer.json`, which `transformers` reads as well."""
        return self._library.to_str()

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """Return a decoder for one sequence of tokens that arrive one at a time.

        Args:
            stop: Strings before which the text ends.

        Raises:
            ValueError: A stop string is empty.
        """
        return TextStream(self._token_bytes, stop)


class TextStream:
    """Turns the tokens of one sequence into text as they come; see `Tokenizer.stream`."""

    def __init__(self, token_bytes: dict[int, bytes], stop: Sequence[str]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._filter = StopFilter(stop)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._filter.is_stopped

    def push(self, token_id: int) -> str:
        """Return the text that is certain with this token.

        Held back are characters that are not complete, and what may begin a stop string.
        """
        return self._filter.push(self._decoder.decode(self._token_bytes.get(token_id, b"")))

    def finish(self) -> str:
        """Return what is left at the end; U+FFFD for a character that never got complete."""
        return self._filter.push(self._decoder.decode(b"", final=True)) + self._filter.finish()


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer whose tokens are the 256 bytes: for models that never saw any text."""
    return Tokenizer(_library_of({name: byte for byte, name in _byte_alphabet().items()}, []))


def _from_parts(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    """Build the tokenizer that `tokenizer.json` would hold, with the settings of GPT-2."""
    return _library_of(*models.BPE.read_file(str(vocabulary), str(merges)))


def _library_of(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    if library.token_to_id(_END_OF_TEXT) is not None:
        library.add_special_tokens([_END_OF_TEXT])
    return library


def _bytes_of_tokens(library: tokenizers.Tokenizer) -> dict[int, bytes]:
    """Return the bytes that each token stands for; special tokens stand for none."""
    added = library.get_added_tokens_decoder()
    byte_of_character = {character: byte for byte, character in _byte_alphabet().items()}
    token_bytes = {}
    for token, token_id in library.get_vocab(with_added_tokens=True).items():
        if token_id in added:
            # Added tokens stand in the file as themselves, not in the alphabet of bytes.
            token_bytes[token_id] = b"" if added[token_id].special else token.encode()
        else:
            try:
                token_bytes[token_id] = bytes(byte_of_character[character] for character in token)
            except KeyError as error:
                raise ValueError(f"the token {token!r} is not made of bytes") from error
    return token_bytes


def _byte_alphabet() -> dict[int, str]:
    """Return the character that stands for each byte in the vocabulary of a byte-level BPE.

    Vocabularies are text files, so bytes that print badly (controls, the space) are written as the
    characters from U+0100 on: the space is U+0120. Bytes that print stand for themselves.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(0x100 + len(alphabet) - len(printable))
    return alphabet
