"""Looks at PATH before DeepSpeed searches it.

On a machine without a GPU DeepSpeed asks `numactl` how many processors there are. It knows what to
do where no folder of PATH has that command, but not where a folder of PATH may not be searched:
then the system answers "Permission denied", and the run ends with PermissionError: 'numactl'.
`su USER` gives such a PATH, root's.
"""

import os
import shutil
from pathlib import Path

from genrecal_ds.errors import UserError


def refuse_closed_folders(path: str) -> None:
    """Raise UserError where DeepSpeed's search of this PATH for numactl would end the run."""
    if shutil.which("numactl", path=path):
        return
    for folder in path.split(os.pathsep):
        if _is_closed(Path(folder or ".") / "numactl"):
            raise UserError(
                f"PATH: {folder} may not be searched, and DeepSpeed looks there for numactl; take "
                "the folder out of PATH, or install numactl"
            )


def _is_closed(command: Path) -> bool:
    """True if the system may answer "Permission denied" when the command is started."""
    try:
        command.stat()
    except PermissionError:
        return True
    except OSError:  # not there
        return False
    return True  # it is there, and which() has found that it may not be run
