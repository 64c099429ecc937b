"""The `llmload model` command: the models of this device.

No logic of its own; see `model_store`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from llmload.config import parameter_shapes
from llmload.model_folder import load_model
from llmload.model_store import PUBLISHED_SHAPES, ModelStore, StoredModel
from llmload.weights import bundled_model_path

__all__ = ["app", "show_model"]

app = typer.Typer(name="model", help="Take in, list, check and make models.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="Its name on this device.", show_default=False),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[NAME|DIR]",
        help="A model of this device, or a model folder; without it, the one that is shipped.",
        show_default=False,
    ),
]

output = Console(soft_wrap=True, highlight=False)


@app.command("import")
def import_model(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|FILE",
            help="Folder of a GPT-2 in Hugging Face layout, or the safetensors file in it to take.",
        ),
    ],
    name: NameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a model, every value of it, and copy it to this device's models."""
    _tell(ModelStore().take_in(source, name), as_json)


@app.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """List the models of this device."""
    models = list(ModelStore().models())
    for model in models:
        _tell(model, as_json)
    if not models and not as_json:
        output.print("No models yet: add one with `llmload model import FOLDER`.", markup=False)


@app.command()
def info(model: ModelArgument = None, as_json: JsonOption = False) -> None:
    """Show the shape of a model, its size, and the hash by which peers know it."""
    show_model(_folder(model), as_json)


@app.command()
def verify(model: ModelArgument = None, as_json: JsonOption = False) -> None:
    """Read every value of a model anew, and compare it with what was imported."""
    identity = ModelStore().verify(str(_folder(model)))
    if as_json:
        _print_json({"ok": True, "hash": identity})
    else:
        output.print(f"All values are there and sound. Hash {identity}", markup=False)


@app.command("make-random")
def make_random(
    shape: Annotated[
        str, typer.Argument(metavar="SHAPE", help=f"One of {', '.join(PUBLISHED_SHAPES)}.")
    ],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Equal seeds give equal models.")] = 1,
    name: NameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a model of a published shape with random weights, for benchmarks."""
    try:
        made = ModelStore().make_random(shape, seed, name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="SHAPE") from error
    _tell(made, as_json)


def show_model(folder: Path, as_json: bool) -> None:
    """Print what there is to know of the model in a folder."""
    loaded = load_model(folder)
    config = loaded.config
    facts: dict[str, Any] = {
        "folder": str(loaded.folder),
        "hash": loaded.content_hash,
        "parameters": sum(
            math.prod(shape) for shape in parameter_shapes(config, config.blocks).values()
        ),
        "blocks": f"0-{config.n_layer - 1}",
        **dataclasses.asdict(config),
    }
    if as_json:
        _print_json(facts)
        return
    for name, value in facts.items():
        shown = f"{value:,}" if type(value) is int else str(value)
        output.print(f"{name:<21}{shown}", markup=False)


def _folder(model: str | None) -> Path:
    return bundled_model_path() if model is None else ModelStore().find(model)


def _tell(model: StoredModel, as_json: bool) -> None:
    facts = {
        "name": model.name,
        "hash": model.content_hash,
        "bytes": model.byte_size,
        "folder": str(model.folder),
    }
    if as_json:
        _print_json(facts)
    else:
        size_mb = model.byte_size / 1e6
        output.print(
            f"{model.name:<24}{size_mb:>9,.1f} MB  {model.content_hash[:16]}", markup=False
        )


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
