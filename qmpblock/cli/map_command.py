"""`qmpblock map`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli.app import Options, Size, emit, uncut
from qmpblock.cli.app import command as make_command
from qmpblock.cli.picture import svg_option, write_svg
from qmpblock.errors import printable

if TYPE_CHECKING:
    from qmpblock.extents.allocationmap import AllocationMap
    from qmpblock.host.closedimage import ClosedImage

__all__ = ["command"]

_ROWS = 40  # extents that the table shows before it refers to --json


@dataclass(frozen=True)
class _LayerView:
    """One layer, of a running disk or of a closed image."""

    depth: int
    node: str | None
    file: str
    format: str
    size: int
    map: AllocationMap
    source: str


@dataclass(frozen=True)
class _View:
    """All that one call shows. `layers` is empty where it was not asked for."""

    title: str
    size: int
    map: AllocationMap
    files: tuple[str, ...]
    layers: tuple[_LayerView, ...]


@make_command
@click.argument("target", metavar="ADDRESS DISK | IMAGE")
@click.argument("disk", metavar="", required=False)
@click.option("--offset", type=Size(), default=0, help="First byte to show (suffixes K, M, G, T).")
@click.option("--length", type=Size(), help="How many bytes to show; by default up to the end.")
@click.option("--layers", is_flag=True, help="Show the extents that each layer itself holds.")
@click.option("--totals", is_flag=True, help="Show only the sums for each layer.")
@svg_option
@click.option(
    "--format",
    "fmt",
    metavar="FMT",
    help="Format of a closed IMAGE, where its name does not tell; never probed.",
)
async def command(
    options: Options,
    target: str,
    disk: str | None,
    offset: int,
    length: int | None,
    layers: bool,
    totals: bool,
    svg: str | None,
    fmt: str | None,
) -> None:
    """Show which layer holds every byte of a disk.

    With ADDRESS and DISK: of a running guest's disk, read from QEMU itself while the guest
    goes on. With IMAGE alone: of an image that nothing uses, by `qemu-img map`.

    --json prints the records of `qemu-img map --output=json` (start, length, depth,
    present, zero, data); with --layers or --totals, see docs/schema/.
    """
    if sum((layers, totals, svg is not None)) > 1 or (options.json and svg):
        raise click.UsageError("--layers, --totals and --svg exclude each other, --svg --json too")
    if disk is not None and fmt is not None:
        raise click.UsageError("--format goes with IMAGE: QEMU knows the format of a DISK")
    # The records of --json alone have no room for what is reserved.
    reserved = not options.json or totals or layers
    held = layers or not (totals or options.json)
    view = await _look(options, target, disk, offset, length, held, reserved, fmt)
    if options.json:
        _print_json(view, layers=layers, totals=totals)
    elif svg is not None:
        _write_svg(view, svg)
    elif totals:
        _print_totals(view)
    elif layers:
        _print_layers(view)
    else:
        _print_picture(view)


async def _look(
    options: Options,
    target: str,
    disk: str | None,
    offset: int,
    length: int | None,
    layers: bool,
    reserved: bool,
    fmt: str | None,
) -> _View:
    # NumPy takes a tenth of a second to import: let that pass while QEMU, or qemu-img, answers.
    loading = asyncio.get_running_loop().run_in_executor(None, import_module, "qmpblock.extents")
    if disk is None:
        from qmpblock.host.closedimage import closed_image

        image = await closed_image(target, format=fmt, stall=options.stall)
        await loading
        return await _look_at_image(image, offset, length, layers, reserved)
    async with options.connect(target) as vm:
        selected = await vm.disk(disk)
        view = await selected.map(offset, length, reserved=reserved)
        held = await selected.layers() if layers else ()
        await loading
    return _View(
        f"{selected.name}  {selected.chain.active.file}",
        selected.size,
        view,
        tuple(layer.file for layer in selected.chain.layers),
        tuple(
            _LayerView(
                one.layer.depth,
                one.layer.node.name,
                one.layer.file,
                one.layer.format,
                one.layer.size,
                _window(one.map, view),
                one.source,
            )
            for one in held
        ),
    )


async def _look_at_image(
    image: ClosedImage, offset: int, length: int | None, layers: bool, reserved: bool
) -> _View:
    view = await image.map(offset, length, reserved=reserved)
    held = await image.layers(reserved=reserved) if layers else ()
    return _View(
        image.chain[0].file,
        image.size,
        view,
        tuple(one.file for one in image.chain),
        tuple(
            _LayerView(
                one.depth,
                None,
                one.file,
                one.format,
                one.size,
                _window(one.map, view),
                "qemu-img",
            )
            for one in held
        ),
    )


def _window(layer: AllocationMap, view: AllocationMap) -> AllocationMap:
    """Cut a layer's map to what is looked at; a short layer has less of it, or nothing."""
    start = min(view.start, layer.stop)
    return layer.clip(start, min(view.stop, layer.stop) - start)


def _print_json(view: _View, *, layers: bool, totals: bool) -> None:
    if totals:
        emit(json.dumps(view.map.totals().as_json(size=view.size), indent=2) + "\n")
    elif layers:
        emit(json.dumps({"layers": [_layer_document(one) for one in view.layers]}) + "\n")
    else:
        for chunk in view.map.to_qemu_img_json():
            emit(chunk)


def _layer_document(layer: _LayerView) -> dict[str, Any]:
    from qmpblock.extents.allocationmap import layer_extents_json

    return {
        "depth": layer.depth,
        "node": layer.node,
        "file": layer.file,
        "format": layer.format,
        "size": layer.size,
        "source": layer.source,
        "extents": layer_extents_json(layer.map),
    }


def _print_picture(view: _View) -> None:
    from rich.console import Console

    from qmpblock.pictures.text import text_picture

    console = Console(highlight=False)
    click.echo(f"{printable(view.title)}\n")
    click.echo(
        text_picture(
            _named_layers(view),
            view.map,
            width=console.width,
            ascii=not (console.encoding or "").lower().startswith("utf"),
            color=console.is_terminal and not console.no_color,
        )
    )
    _print_totals(view)
    click.echo()
    _print_extents([("depth", view.map)], limit=_ROWS)


def _print_layers(view: _View) -> None:
    for layer in view.layers:
        click.echo(
            f"@{layer.depth}  {layer.format}  {printable(layer.file)}"
            + (f"  (node {printable(layer.node)})" if layer.node else "")
        )
        _print_extents([("", layer.map)], limit=None)
        click.echo()


def _print_totals(view: _View) -> None:
    from rich.table import Table
    from rich.text import Text

    from qmpblock.sizes import human_size

    totals = view.map.totals()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "data", "zeros", "of them reserved"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for row in totals.layers:
        name = f"@{row.depth}  {printable(view.files[row.depth])}"
        table.add_row(Text(name), *(human_size(n) for n in (row.data, row.zero, row.reserved)))
    table.add_row("in no layer", "", human_size(totals.absent), "")
    uncut(table)


def _print_extents(maps: Sequence[tuple[str, AllocationMap]], *, limit: int | None) -> None:
    """Print one row for each extent, at most `limit`; every row is exact, in bytes."""
    rows = [("offset", "length", "layer", "holds")]
    left_out = 0
    for column, source in maps:
        for number, extent in enumerate(source):
            if limit is not None and number >= limit:
                left_out = len(source) - limit
                break
            holds = "data" if extent.data else "zeros" if extent.present else "nothing"
            if extent.data and extent.zero:
                holds = "zeros, allocated"
            elif extent.reserved:
                holds = "zeros, reserved"
            layer = f"@{extent.depth}" if column and extent.present else "-" if column else ""
            rows.append((f"{extent.offset:,}", f"{extent.length:,}", layer, holds))
    wide = [max(len(row[i]) for row in rows) for i in range(2)]
    for row in rows:
        click.echo(f"{row[0]:>{wide[0]}}  {row[1]:>{wide[1]}}  {row[2]:<5}  {row[3]}".rstrip())
    if left_out:
        click.echo(f"... and {left_out:,} more extents; --json prints them all")


def _named_layers(view: _View) -> list[tuple[str, AllocationMap]]:
    from posixpath import basename

    return [(basename(layer.file), layer.map) for layer in reversed(view.layers)]


def _write_svg(view: _View, path: str) -> None:
    from qmpblock.pictures.svg import svg_picture

    write_svg(path, svg_picture(_named_layers(view), view.map, title=view.title))
