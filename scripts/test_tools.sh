#!/usr/bin/env bash
# What the tests use beside Python: a real SLURM (3 MB), shellcheck, and ip to make machines of network namespaces.
# Called by `make test`; a moment where they are there.
# Root gets them installed; for others, and where that fails, their tests are skipped, or fail if CI=true.
set -euo pipefail

packages=()
PATH=$PATH:/usr/sbin:/sbin # an ordinary user's has neither
for program in shellcheck ip:iproute2 slurmctld slurmd munged:munge sbatch:slurm-client; do
  command -v "${program%:*}" >/dev/null || packages+=("${program#*:}")
done
((${#packages[@]})) || exit 0

install=(apt-get install --no-install-recommends "${packages[@]}")
if (($(id -u) == 0)) && command -v apt-get >/dev/null; then
  echo "test: installing ${packages[*]} with apt-get"
  export DEBIAN_FRONTEND=noninteractive
  if apt-get update -qq && "${install[@]}" -y -qq -o Dpkg::Use-Pty=0 >/dev/null; then exit 0; fi
fi
echo "test: no SLURM, shellcheck or ip for some tests; to have them, as root: ${install[*]}"
