#!/bin/sh
# Debian's Slurm, for tests/slurm: real daemons on this host, started by the tests in a folder of their own.
set -eu
if ! command -v apt-get > /dev/null || [ "$(id -u)" != 0 ]; then
  echo "SLURM TESTS WILL NOT RUN: installing Slurm needs apt-get and root" >&2
  exit 0
fi
need=
for program in slurmctld slurmd srun munged shellcheck; do
  PATH="$PATH:/usr/sbin" command -v "$program" > /dev/null || need=yes
done
if [ -n "$need" ]; then
  export DEBIAN_FRONTEND=noninteractive
  if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge shellcheck; } > /dev/null; then
    echo "SLURM TESTS WILL NOT RUN: apt-get could not install slurmctld, slurmd, slurm-client, munge, shellcheck" >&2
    exit 0
  fi
fi
# The nodes' names, as a cluster's resolve; where they do not, the ranks ask Slurm for an address.
if ! getent hosts n4 > /dev/null; then
  echo "127.0.0.1 n1 n2 n3 n4 # nodes of tests/slurm" >> /etc/hosts || true
fi
