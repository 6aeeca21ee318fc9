#!/usr/bin/env bash
# What the cluster tests start themselves: sshd, SLURM's daemons, network namespaces.
# apt starts no daemon here; the tests start their own, on loopback or in namespaces of their own.
set -euo pipefail
missing=0
for command in sshd pdsh slurmctld slurmd munged ip unshare; do
    command -v "$command" >/dev/null || [ -x "/usr/sbin/$command" ] || missing=1
done
[ "$missing" = 1 ] || exit 0
export DEBIAN_FRONTEND=noninteractive
# Debian's packages start daemons where an init system runs; a policy that says no prevents it.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends \
    openssh-server openssh-client pdsh slurm-wlm munge iproute2 util-linux >/dev/null
