"""Two hosts on one machine: network namespaces joined by a cable, an sshd in each.

Each host has a PID, mount and host-name namespace of its own, so that what kills by name, or
looks into /proc, sees one host. All of a host ends with its first process, by pid.
"""

import os
import shlex
import subprocess
import time
from pathlib import Path

IP = "/usr/sbin/ip"
NAMES = ("genrecal-a", "genrecal-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "veth0"

SSHD_CONFIG = """
HostKey {folder}/hostkey
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
"""
SSH_CONFIG = """
Host *
  IdentityFile {folder}/key
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class TwoHosts:
    """Context: both hosts are up. Commands run on the first with `start`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "TwoHosts":
        self._remove_left_over()
        a, b = NAMES
        for name in NAMES:
            run(IP, "netns", "add", name)
            run(IP, "-n", name, "link", "set", "lo", "up")
        run(IP, "link", "add", "gr-a", "netns", a, "type", "veth", "peer", "gr-b", "netns", b)
        for name, end, address in zip(NAMES, ("gr-a", "gr-b"), ADDRESSES, strict=True):
            run(IP, "-n", name, "link", "set", end, "name", DEVICE)
            run(IP, "-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            run(IP, "-n", name, "link", "set", DEVICE, "up")
        self._write_keys()
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            sshd = f"/usr/sbin/sshd -D -e -f {self.folder}/sshd_config -o ListenAddress={address}"
            script = f"hostname {name} && exec {sshd}"
            self._daemons.append(
                subprocess.Popen(
                    [
                        IP,
                        "netns",
                        "exec",
                        name,
                        "unshare",
                        "--pid",
                        "--fork",
                        "--kill-child",
                        "--mount-proc",
                        "--uts",
                        "sh",
                        "-c",
                        script,
                    ],
                    stdout=(self.folder / f"{name}.log").open("w"),
                    stderr=subprocess.STDOUT,
                )  # fmt: skip
            )
        for address in ADDRESSES:
            self._wait_for(address)
        return self

    def __exit__(self, *error: object) -> None:
        for daemon in self._daemons:
            daemon.kill()  # and, by --kill-child, the host's first process and all of its own
            daemon.wait()
        self._remove_left_over()

    def hostfile(self, slots: int) -> Path:
        path = self.folder / f"hosts-{slots}"
        path.write_text("".join(f"{address} slots={slots}\n" for address in ADDRESSES))
        return path

    def environment(self, base: dict[str, str]) -> dict[str, str]:
        """`ssh` is ours and reads no ~/.ssh; gloo must be told which device to use."""
        return {
            **base,
            "PATH": f"{self.folder}/bin:{base['PATH']}",
            "GLOO_SOCKET_IFNAME": DEVICE,
            "DS_ACCELERATOR": "cpu",
        }

    def start(self, command: list[str], env: dict[str, str], cwd: Path) -> subprocess.Popen:
        """On the first host, beside its sshd."""
        return subprocess.Popen(
            [IP, "netns", "exec", NAMES[0], *command], env=self.environment(env), cwd=cwd,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def processes(self, host: int, word: str) -> list[int]:
        """Pids, as seen here, of a host's processes with this word in their command line."""
        init = self._first_process(host)
        namespace = os.readlink(f"/proc/{init}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "ns/pid") == namespace:
                    if word in (entry / "cmdline").read_bytes().decode().replace("\0", " "):
                        found.append(int(entry.name))
            except OSError:
                continue  # it ended meanwhile
        return sorted(found)

    def _first_process(self, host: int) -> int:
        parent = self._daemons[host].pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return int(children[0])

    def _write_keys(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("hostkey", "key"):
            path = str(self.folder / name)
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path)
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        (self.folder / "bin").mkdir()
        wrapper = self.folder / "bin/ssh"
        config = shlex.quote(str(self.folder / "ssh_config"))
        wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {config} "$@"\n')
        wrapper.chmod(0o755)

    def _wait_for(self, address: str) -> None:
        ssh = [str(self.folder / "bin/ssh"), "-o", "ConnectTimeout=2", address, "true"]
        for _ in range(50):
            if subprocess.run([IP, "netns", "exec", NAMES[0], *ssh]).returncode == 0:
                return
            time.sleep(0.2)
        raise RuntimeError(f"{address}: sshd does not answer")

    def _remove_left_over(self) -> None:
        for name in NAMES:
            subprocess.run([IP, "netns", "delete", name], capture_output=True)
