#!/usr/bin/env bash
# Installs the system packages that some tests need: SLURM (3 MB), and iproute2, whose program ip creates network
# namespaces. `make test` calls this script, which takes only a moment if both are installed already.
# The script installs them only as root. If a package is missing afterwards, the tests that need it are skipped. With
# CI=true, those that need SLURM fail instead.
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
  echo "test: the tests that need ${packages[*]} cannot run; to install these packages, run as root: ${install[*]}"
fi
