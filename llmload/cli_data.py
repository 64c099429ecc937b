"""`llmload data` and `llmload feedback`: what this device learns from, and what others may have.

No logic of its own; see `data/store.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from msgspec import structs

from llmload.cli_mesh import DEFAULT_STATE, StateOption
from llmload.cli_shared import JsonOption, output, print_json, remarks
from llmload.data.record import FeedbackRecord, Record, TextRecord, cut_text, sign_record
from llmload.data.store import Added, RecordStore, StoredRecord
from natswarm import Identity

__all__ = ["app", "feedback", "open_store"]

STORE_FILE_NAME = "records.sqlite"
# 48 bits: thousands of records rarely share so many.
SHOWN_CHARACTERS = 12

app = typer.Typer(
    name="data", help="Texts to learn from, and who may have them.", no_args_is_help=True
)

LicenceOption = Annotated[
    str,
    typer.Option(
        "--licence",
        metavar="NAME",
        help="What others may do with it, such as CC-BY-4.0; needed to share it.",
    ),
]
ShareOption = Annotated[
    bool, typer.Option("--share", help="Others may have it; else it never leaves this device.")
]
RecordArguments = Annotated[
    list[str],
    typer.Argument(metavar="ID...", help="As `llmload data list` shows them.", show_default=False),
]


@app.command()
def add(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", exists=True, dir_okay=False, help="UTF-8.", show_default=False
        ),
    ],
    licence: LicenceOption = "",
    language: Annotated[str, typer.Option("--language", metavar="TAG", help="Such as nl.")] = "",
    share: ShareOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Keep texts to learn from, cut into signed records of at most 8 KiB.

    They are private unless --share is given; `llmload data share` does it later.
    """
    records: list[Record] = []
    for file in files:
        try:
            pieces = list(cut_text(file.read_text("utf-8")))
        except UnicodeDecodeError as error:
            raise typer.BadParameter(f"{file} is no text in UTF-8", param_hint="FILE") from error
        if not pieces:
            raise typer.BadParameter(f"{file} holds no text", param_hint="FILE")
        records += [TextRecord(piece, licence, language, file.name[:200]) for piece in pieces]
    _keep(records, state, is_shared=share, as_json=as_json)


@app.command("list")
def list_records(state: StateOption = DEFAULT_STATE, as_json: JsonOption = False) -> None:
    """List all records: what is ours, what others gave, and what is shared."""
    records = open_store(state).records()
    for each in records:
        record = each.signed.record
        kind = "text" if isinstance(record, TextRecord) else f"{record.mark:+d}"
        said = record.title or record.text if isinstance(record, TextRecord) else record.answer
        if as_json:
            print_json(
                {
                    "id": each.signed.record_id.hex(),
                    "kind": kind,
                    "shared": each.is_shared,
                    "author": str(each.signed.author),
                    "giver": None if each.giver is None else str(each.giver),
                    "licence": record.licence,
                    "bytes": len(each.signed.sealed),
                    "shown": _shown(said),
                }
            )
        else:
            where = "shared" if each.is_shared else "private"
            source = "ours" if each.giver is None else f"from {each.giver.short}"
            output.print(
                f"{each.signed.record_id.hex()[:SHOWN_CHARACTERS]}  {kind:<5}{where:<8}{source:<14}"
                f"{len(each.signed.sealed):>6}  {_shown(record.licence):<12}  {_shown(said)}",
                markup=False,
            )
    if not records and not as_json:
        output.print("No texts yet: add some with `llmload data add FILE`.", markup=False)


@app.command()
def share(
    records: RecordArguments, licence: LicenceOption = "", state: StateOption = DEFAULT_STATE
) -> None:
    """Let others have records from now on. What they have got can't be called back.

    With --licence, records that have none get it, and a new ID by that.
    """
    store, identity = open_store(state), Identity.load_or_create(state / "identity")
    shared = {each.signed.record_id: each.signed for each in _find(store, records)}
    for record_id, signed in shared.items():
        if not signed.record.licence:
            _check_licence(licence)
            licensed = structs.replace(signed.record, licence=licence)
            shared[record_id] = sign_record(identity, licensed)
    store.share(shared)
    output.print(f"{len(shared)} shared", markup=False)


@app.command()
def forget(records: RecordArguments, state: StateOption = DEFAULT_STATE) -> None:
    """Remove records, and never take them or nearly the same again.

    Of shared ones others may have copies.
    """
    store = open_store(state)
    found = _find(store, records)
    store.forget([each.signed.record_id for each in found])
    output.print(f"{len(found)} forgotten", markup=False)


def feedback(
    mark: Annotated[
        str, typer.Argument(metavar="+1|-1", help="A good answer or a bad one.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option("--prompt", help="What was asked.")] = "",
    answer: Annotated[str, typer.Option("--answer", help="What the model went on with.")] = "",
    licence: LicenceOption = "",
    share: ShareOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Say what you think of an answer; `llmload learn` learns from it.

    Without --answer both are read from stdin as `llmload generate --json` prints them:
    llmload generate --json "Once" | tee /dev/stderr | llmload feedback +1
    """
    marks: dict[str, Literal[1, -1]] = {"+1": 1, "-1": -1}
    if mark not in marks:
        raise typer.BadParameter(f"{mark!r} is neither +1 nor -1", param_hint="+1|-1")
    if not answer:
        try:
            generated = msgspec.json.decode(sys.stdin.read(), type=_Generated)
            prompt, answer = generated.prompt, generated.text
        except msgspec.MsgspecError as error:
            raise typer.BadParameter(
                f"what came on stdin is not of `llmload generate --json` ({error})",
                param_hint="--answer",
            ) from error
    _keep(
        [FeedbackRecord(prompt, answer, marks[mark], licence)],
        state,
        is_shared=share,
        as_json=as_json,
    )


class _Generated(msgspec.Struct):
    """What `llmload generate --json` prints, as far as it is needed here."""

    prompt: str
    text: str


def open_store(state: Path) -> RecordStore:
    """Return the records in a state folder."""
    return RecordStore(state / STORE_FILE_NAME)


def _keep(records: Sequence[Record], state: Path, *, is_shared: bool, as_json: bool) -> None:
    """Sign records of this device, keep them, and tell what became of each."""
    if is_shared and records:
        _check_licence(records[0].licence)
    identity = Identity.load_or_create(state / "identity")
    try:
        signed = [sign_record(identity, record) for record in records]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    results = open_store(state).add(signed, is_shared=is_shared)
    for each, result in zip(signed, results, strict=True):
        record_id = each.record_id.hex()
        if as_json:
            print_json({"id": record_id, "result": result.name.lower()})
        else:
            output.print(f"{record_id[:SHOWN_CHARACTERS]}  {result.value}", markup=False)
    if not as_json and any(result in (Added.REPEATED, Added.NEAR) for result in results):
        remarks.print(
            "What is there stays as it was, private or shared, and what was forgotten stays away: "
            "see `llmload data list`.",
            markup=False,
        )


def _check_licence(licence: str) -> None:
    if not licence:
        raise typer.BadParameter(
            "without a licence nobody may use what is shared", param_hint="--licence"
        )


def _find(store: RecordStore, prefixes: Sequence[str]) -> list[StoredRecord]:
    """Return the records that a user has named by the beginnings of their ids."""
    found = []
    for prefix in prefixes:
        try:
            matching = store.find(bytes.fromhex(prefix))
        except ValueError as error:
            raise typer.BadParameter(f"{prefix!r} is no ID", param_hint="ID") from error
        if len(matching) != 1 or not prefix:
            problem = "several begin so" if matching else "it is not there"
            raise typer.BadParameter(f"{prefix}: {problem}; see `data list`", param_hint="ID")
        found += matching
    return found


def _shown(text: str) -> str:
    """Return the beginning of what somebody wrote as one line without control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:60])
