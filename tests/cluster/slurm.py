"""A SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd of our own.

No system file is touched: SLURM_CONF and munge's key and socket lie in the test's folder, and the
daemons, which listen on loopback only, end by their pids.
"""

import os
import pwd
import socket
import subprocess
import time
from pathlib import Path

CONTROLLER_PORT, NODE_PORTS = 16817, "[17001-17002]"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

CONF = """
ClusterName=genrecal
SlurmctldHost={host}(127.0.0.1)
SlurmctldAddr=127.0.0.1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge/socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPort={controller}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=3600
JobRequeue=1
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=4 RealMemory=8000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


class Slurm:
    """Context: the cluster is up. `sbatch` and `wait` are what the tests need."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Slurm":
        for name in ("munge", "state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        host = socket.gethostname().split(".")[0]
        ports = {"controller": CONTROLLER_PORT, "ports": NODE_PORTS}
        text = CONF.format(host=host, folder=self.folder, **ports)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self._start_munge()
        self._start("/usr/sbin/slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._start("/usr/sbin/slurmd", "-D", "-N", node)
        for _ in range(100):
            found = self.run("sinfo", "--noheader", "--format=%t %D")
            if found.stdout.split() == ["idle", "2"]:
                return self
            time.sleep(0.2)
        raise RuntimeError(f"SLURM does not start: {found}; see {self.folder}")

    def __exit__(self, *error: object) -> None:
        self.run("scancel", "--user", "root")
        time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, env={**self.environment, **env}, capture_output=True, text=True
        )

    def sbatch(self, *arguments: str, cwd: Path, **env: str) -> str:
        """Submit; returns the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments], env={**self.environment, **env}, cwd=cwd,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def fact(self, job: str, name: str) -> str:
        shown = self.run("scontrol", "show", "job", job, "--oneliner").stdout
        return shown.split(f" {name}=")[1].split()[0] if f" {name}=" in shown else ""

    def wait(self, job: str, seconds: float = 240) -> str:
        """Its state when it has ended. A requeued job, held for two minutes, starts at once."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.fact(job, "JobState")
            if state in ENDED:
                return state
            if state == "PENDING" and self.fact(job, "Reason") == "BeginTime":
                # Started in the second in which it ended, its credential counts as revoked.
                time.sleep(3)
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.3)
        raise AssertionError(f"job {job} is {state} after {seconds} s")

    def _start(self, *command: str) -> None:
        log = (self.folder / f"{Path(command[0]).name}.out").open("a")
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
        )

    def _start_munge(self) -> None:
        """As the user munge: the daemon refuses to run as root."""
        home = self.folder / "munge"
        key = home / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        user = pwd.getpwnam("munge")
        for path in (home, key):
            os.chown(path, user.pw_uid, user.pw_gid)
        self._start(
            "setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups",
            "/usr/sbin/munged", "-F", "-f", f"--key-file={key}", f"--socket={home}/socket",
            f"--pid-file={home}/pid", f"--log-file={home}/log", f"--seed-file={home}/seed",
        )  # fmt: skip
        for _ in range(50):
            if (home / "socket").exists():
                return
            time.sleep(0.1)
        raise RuntimeError("munged does not start")
