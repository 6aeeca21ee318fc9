"""Hostfiles, checked: which hosts a run may be started on, and how many ranks on each.

DeepSpeed puts a host into an ssh command line as it stands: a line such as
`-oProxyCommand=... slots=1` would run a command. So every line must match whole.
"""

import re
from pathlib import Path

from genrecal_ds.errors import UserError

_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9.-]{0,252})\s+slots=([1-9][0-9]?)")
MAX_HOSTS, MAX_SLOTS = 4096, 64


def read_hostfile(path: Path) -> dict[str, int]:
    """{host: slots}. Raises UserError naming file, line and fix."""
    if not path.is_file():
        raise UserError(f"--hostfile {path}: no such file")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if not match or int(match[2]) > MAX_SLOTS:
            raise UserError(f"{path}:{number}: {line!r}; write: hostname slots=1..{MAX_SLOTS}")
        if match[1] in hosts:
            raise UserError(f"{path}:{number}: host {match[1]} appears twice; add up its slots")
        hosts[match[1]] = int(match[2])
    if not 0 < len(hosts) <= MAX_HOSTS:
        raise UserError(f"{path}: {len(hosts)} hosts; 1..{MAX_HOSTS} are possible")
    return hosts
