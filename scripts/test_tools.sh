#!/usr/bin/env bash
# Installs what the tests use besides Python: a real SLURM (3 MB), and ip, which makes machines of network namespaces.
# Called by `make test`; takes only a moment if they are already there.
# Installs them only as root. Otherwise, or if that fails, the tests that need them are skipped, or fail if CI=true.
set -euo pipefail

packages=()
PATH=$PATH:/usr/sbin:/sbin # an ordinary user's PATH has neither
for program in ip:iproute2 slurmctld slurmd munged:munge sbatch:slurm-client; do
  command -v "${program%:*}" >/dev/null || packages+=("${program#*:}")
done
if ((${#packages[@]})); then
  install=(apt-get install --no-install-recommends "${packages[@]}")
  if (($(id -u) == 0)) && command -v apt-get >/dev/null; then
    echo "test: installing ${packages[*]} with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    if apt-get update -qq && "${install[@]}" -y -qq -o Dpkg::Use-Pty=0 >/dev/null; then exit 0; fi
  fi
  echo "test: skipping the tests that need ${packages[*]}; to run them, as root: ${install[*]}"
fi
