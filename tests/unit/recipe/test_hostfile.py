"""A hostfile line becomes part of an ssh command: what is not plainly a host is refused."""

import pytest

from genrecal_ds.errors import UserError
from genrecal_ds.recipe.hostfile import cluster_of, read_hostfile

pytestmark = pytest.mark.unit


def test_comments_blank_lines_and_crlf(tmp_path):
    path = tmp_path / "hosts"
    path.write_bytes(b"# two nodes\r\nnode-1.local slots=8\r\n\r\n10.0.0.2   slots=4  # four\r\n")
    assert read_hostfile(path) == {"node-1.local": 8, "10.0.0.2": 4}


@pytest.mark.parametrize(
    "text, message",
    [
        ("-oProxyCommand=touch${IFS}x slots=1", ":1: .*write: hostname slots"),
        ("$(id) slots=1", ":1:"),
        ("a slots=8x", ":1:"),
        ("a slots=0", ":1:"),
        ("a slots=65", ":1:"),
        ("a,b slots=1", ":1:"),
        ("a", ":1:"),
        ("a slots=1\na slots=2", ":2: host a appears twice"),
        ("# nothing", "0 hosts"),
        ("a slots=1\x0cb slots=1", ":1:"),
        ("a slots=1\rb slots=1", ":1:"),
        ("a\u2028slots=1", ":1:"),
        ("a slots=1\x00", ":1:"),
        ("a slots=\u0661", ":1:"),
        ("a..;reboot slots=1", ":1:"),
        ("a slots=1 --launcher_args=x", ":1:"),
        ("".join(f"h{i} slots=1\n" for i in range(5000)), "5000 hosts"),
        ("#" * (2 << 20), "larger than"),
    ],
)
def test_bad_lines_are_refused(tmp_path, text, message):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_hostfile(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_hostfile(tmp_path / "none")


def test_a_cluster_is_as_stated_or_as_here_or_assumed(tmp_path):
    local_gpus = [80 << 30, 40 << 30]
    here = cluster_of(None, None, None, local_gpus)
    assert (here.gpus, here.per_host, here.gpu_bytes) == (2, 2, 40 << 30)
    assert here.host_bytes and here.described.endswith("of 40 GiB (as here), at most 2 on a host")
    stated = cluster_of(16, 24.0, None, local_gpus)
    assert stated[:4] == (16, 2, 24 << 30, None)
    assert cluster_of(None, None, None, [])[:4] == (1, 1, 80 << 30, None)
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=4\nb slots=8\n")
    assert cluster_of(None, None, hosts, [])[:4] == (12, 8, 80 << 30, None)
    with pytest.raises(UserError, match="leave one of the two out"):
        cluster_of(4, None, hosts, local_gpus)
