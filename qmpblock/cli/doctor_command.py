"""`qmpblock doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli.app import WARNED, Options, emit
from qmpblock.cli.app import command as make_command
from qmpblock.doctor import examine_host, examine_vm, no_monitor
from qmpblock.errors import MonitorError, printable

if TYPE_CHECKING:
    from qmpblock.doctor import Finding

__all__ = ["command"]


@make_command
@click.argument("address", required=False)
async def command(options: Options, address: str | None) -> int:
    """Say what is missing here, and what it is needed for; change nothing.

    Of this host and user, and of the VM whose monitor is at ADDRESS, if that is given. Ends with
    4 if something is missing that some command needs, and with 3 if the monitor cannot be used.
    """
    findings = examine_host()
    code = 0
    if address is not None:
        try:
            async with options.connect(address) as vm:
                findings += await examine_vm(vm)
        except MonitorError as error:
            findings.append(no_monitor(error))
            code = error.exit_code
    if options.json:
        emit(json.dumps([_document(one) for one in findings], indent=2) + "\n")
    else:
        _show(findings)
    return code or (WARNED if any(one.missing for one in findings) else 0)


def _document(finding: Finding) -> dict[str, Any]:
    """Return one record of docs/schema/doctor.schema.json."""
    return asdict(finding)


def _show(findings: list[Finding]) -> None:
    width = max(len(printable(one.what)) for one in findings)
    margin = " " * (width + 11)
    for one in findings:
        word = "missing" if one.missing else "ok"
        emit(f"{word:<7}  {printable(one.what):<{width}}  {printable(one.found, 1000)}\n")
        if one.missing:
            emit(f"{margin}needed for: {one.needed_for}\n")
            emit(f"{margin}remedy: {printable(one.remedy, 1000)}\n")
